"""Comparisons from beginning to end: killed, continued, stopped, failing, and of runs that are there."""

from __future__ import annotations

import json
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from earlier_states import forget_options
from safetensors.torch import load_file, save_file
from tiny_plans import TINY, InProcess

from vimtune import cli, plugins
from vimtune.compare import command, execution, quickstart
from vimtune.compare.command import compare, run_compare
from vimtune.compare.execution import Processes
from vimtune.compare.plan import Cell, Plan, PlanError, load_plan
from vimtune.download import DownloadError
from vimtune.methods import METHODS
from vimtune.recipe import Recipe
from vimtune.run_folder import RunFolder, hold
from vimtune.tasks.classification import Classification
from vimtune.training.interrupt import Interrupted
from vimtune.training.result import read_result

ROOT = Path(__file__).resolve().parents[2]
DATA = "synthetic_flowers"
TABLES = {
    "table.md",
    "table.csv",
    "runs.csv",
    "rates.csv",
    "paired.csv",
    "table.tex",
    "pareto.png",
    "curves.png",
}
FILES = TABLES | {"plan.yaml", "runs"}


def plan(**changes):
    return Plan.from_values(
        {**TINY, "methods": {"lora": {"rank": 2}, "linear": {}}, "seeds": "0,1", **changes}
    )


@pytest.fixture
def runs(monkeypatch, no_pictures, each_flower_is_painted_once):
    """The runs that were made; they share this process. Pictures of their tables are empty files: those of
    `test_reproducing.py` and `test_tables.py` are drawn."""
    made = InProcess()
    monkeypatch.setattr("vimtune.compare.tables.files.save_picture", lambda figure, path: path.touch())
    monkeypatch.setattr(command, "Processes", made)
    monkeypatch.setattr(command, "POLL_SECONDS", 0)
    return made


def test_a_killed_comparison_goes_on_and_repeats_nothing(runs, tmp_path, capsys):
    methods = {"lora": {"rank": 2}}
    asked = plan(methods=methods, lrs="1e-3,1e-2")
    runs.dies_at = 2
    with pytest.raises(SystemExit):
        compare(asked, tmp_path)
    assert len(runs.started) == 2 and not (tmp_path / "table.md").exists()
    finished = {cell: (tmp_path / cell.path / "report.json").stat().st_mtime_ns for cell in runs.started}
    runs.dies_at = None
    assert cli.main(["compare", "--resume", str(tmp_path)]) == 0
    assert "comparison of 3 runs, 2 finished" in capsys.readouterr().out
    assert len(runs.started) == len(set(runs.started)) == 3
    assert all(
        (tmp_path / cell.path / "report.json").stat().st_mtime_ns == when for cell, when in finished.items()
    )
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == FILES
    # A third time there is nothing to do, and the rows are the same.
    (row,), _ = compare(asked, tmp_path)
    assert len(runs.started) == 3 and len(row.results) == 2
    # The learning rate is the one that the validation split prefers.
    grid = {lr: read_result(tmp_path / Cell("lora", DATA, lr, 0).path).rank for lr in (1e-3, 1e-2)}
    assert row.lr == max(grid, key=grid.get)
    # More seeds are added to what is there.
    compare(plan(methods=methods, lrs="1e-3,1e-2", seeds="0,1,2"), tmp_path)
    assert len(runs.started) == 4


def test_draws_of_the_data_are_added_to_what_is_there(runs, tmp_path):
    few = {"methods": {"lora": {"rank": 2}}, "shots": 1, "seeds": "0"}
    compare(plan(**few), tmp_path)
    (row,), _ = compare(plan(**few, data_seeds="0,1"), tmp_path)
    assert [(cell.seed, cell.data_seed) for cell in runs.started] == [(0, None), (0, 1)]
    assert len(row.results) == 2 and row.data_differ and row.score.count == 2
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "over the 2 pairs of the seeds (0) and the data seeds (0, 1)." in table
    (again,), _ = compare(load_plan(tmp_path / "plan.yaml", {}), tmp_path)
    assert len(runs.started) == 2 and len(again.results) == 2


def test_runs_with_other_settings_are_refused_all_at_once(runs, tmp_path):
    compare(plan(seeds="0"), tmp_path)
    with pytest.raises(PlanError) as caught:
        compare(plan(seeds="0", epochs=2), tmp_path)
    assert caught.value.problems == [
        "lora on synthetic_flowers, lr 0.001, seed 0: epochs was 1 and is now 2",
        "linear on synthetic_flowers, lr 0.001, seed 0: epochs was 1 and is now 2",
        f"{tmp_path} has runs with other settings: choose another --output-dir",
    ]
    compare(plan(seeds="0", threads=2, data_dir=None), tmp_path)  # what has no part in the results may change
    assert len(runs.started) == 2


def test_runs_with_defaults_of_another_version_are_refused(runs, tmp_path):
    asked = plan(methods="prodial", seeds="0")
    compare(asked, tmp_path)
    compare(asked, tmp_path)
    report = tmp_path / Cell("prodial", DATA, 1e-3, 0).path / "report.json"
    report.write_text(report.read_text().replace('"variant": "exp"', '"variant": "free"'))
    with pytest.raises(PlanError) as caught:
        compare(asked, tmp_path)
    assert caught.value.problems == [
        "prodial on synthetic_flowers, lr 0.001, seed 0: variant of prodial was 'free' and is now 'exp'",
        "prodial: to go on with its runs, state options that have other defaults now, under `methods` in "
        f"{tmp_path / 'plan.yaml'}: prodial: {{peft_kwargs: {{variant: free}}}}",
        f"{tmp_path} has runs with other settings: choose another --output-dir",
    ]
    assert len(runs.started) == 1
    # What the message says is done, and its tables are made in any case.
    assert cli.main(["compare", str(tmp_path)]) == 0
    stated = plan(methods={"prodial": {"peft_kwargs": {"variant": "free"}}}, seeds="0,1")
    compare(stated, tmp_path)
    assert len(runs.started) == 2
    compare(stated, tmp_path)
    assert len(runs.started) == 2


def test_unfinished_runs_with_defaults_of_another_version_are_refused(runs, tmp_path):
    asked, stated = (
        plan(methods={"prodial": {"peft_kwargs": kwargs}}, seeds="0") for kwargs in ({}, {"variant": "free"})
    )
    compare(stated, tmp_path)
    run = RunFolder(tmp_path / Cell("prodial", DATA, 1e-3, 0).path)
    run.report.unlink()
    forget_options(run.checkpoint)
    asked.recipe(Cell("prodial", DATA, 1e-3, 0), tmp_path).save(run.recipe)
    with pytest.raises(PlanError, match="variant of prodial was 'free' and is now 'exp'"):
        compare(asked, tmp_path)
    assert len(runs.started) == 1
    compare(stated, tmp_path)
    assert len(runs.started) == 2


def test_runs_from_other_weights_are_other_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one.safetensors", "other.safetensors"):
        save_file(timm.create_model("test_vim", num_classes=4).state_dict(), name)
    asked = {"methods": "linear", "seeds": "0", "checkpoint": "one.safetensors"}
    compare(plan(**asked), tmp_path / "c")
    for changes in ({"checkpoint": "other.safetensors"}, {"checkpoint": None, "pretrained": True}):
        with pytest.raises(PlanError, match=r"checkpoint was '.*one.safetensors' and is now "):
            compare(plan(**asked | changes), tmp_path / "c")
    # The plan does not depend on the folder in which it was begun, and tables need nothing but reports.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["compare", "--resume", str(tmp_path / "c")]) == 0
    (tmp_path / "one.safetensors").unlink()
    assert cli.main(["compare", str(tmp_path / "c"), "-o", "tables"]) == 0
    assert Path("tables/table.md").is_file() and len(runs.started) == 1
    assert cli.main(["compare", "--resume", str(tmp_path / "c")]) == 2


def test_gpus_that_are_not_there_are_refused_before_any_run(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="device = 'cuda:9': GPU 9 is asked for and this machine has 1"):
        compare(plan(seeds="0", devices="cuda:0,cuda:9"), tmp_path)
    assert not runs.started


def test_a_comparison_is_no_work_of_several_processes(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        compare(plan(), tmp_path / "out")
    assert not runs.started and not (tmp_path / "out").exists()


def test_missing_data_are_refused_before_any_run(runs, tmp_path, capsys):
    values = {"dataset_kwargs": {}, "download": False, "data_dir": str(tmp_path), "seeds": "0"}
    data = {"flowers": {}, "cars": {}, "made": {"dataset": DATA, "dataset_kwargs": TINY["dataset_kwargs"]}}
    with pytest.raises(PlanError) as caught:
        compare(plan(**values, data=data), tmp_path / "out")
    first, second = caught.value.problems
    assert first.startswith("data: flowers: ") and second.startswith("data: cars: ")
    assert not runs.started and not (tmp_path / "out").exists()
    # What is finished needs its data no more.
    made = {"data": {"made": data["made"]}, "methods": "linear", "data_dir": None}
    compare(plan(**{**values, **made}), tmp_path / "out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "check_data", lambda *_: pytest.fail("nothing is to be run"))
        compare(plan(**{**values, **made}), tmp_path / "out")
    assert len(runs.started) == 1


def test_a_server_that_does_not_answer_is_waited_for_once(runs, tmp_path, monkeypatch):
    """The runs of several methods may want other parts of one data set. Nothing is left of the folder."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def fail(url, path, md5):
        asked.append(url)
        raise DownloadError("no answer.")

    monkeypatch.setattr("vimtune.download.download_file", fail)
    values = {"dataset_kwargs": {}, "seeds": "0", "data": "flowers"}
    methods = {"linear": {}, "lora": {"limit": 8}}
    options = {"config": None, "output_dir": None, "resume": None}
    with pytest.raises(PlanError, match=r"^data: flowers: .* and: no answer"):
        run_compare(runs=[], values=plan(**values, methods=methods).to_dict(), **options)
    assert len(asked) == 1 and not list(tmp_path.iterdir())


def test_weights_that_cannot_be_opened_are_told_before_the_first_run(runs, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(PlanError) as caught:
        compare(plan(seeds="0", checkpoint=str(tmp_path / "weights.safetensors")), tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.startswith("model: test_vim: ") and "weights.safetensors" in problem
    assert not runs.started and not (tmp_path / "out" / "plan.yaml").exists()


def test_equal_budgets(runs, tmp_path):
    rows, _ = compare(plan(methods="lora,dora,prodial", seeds="0", budget=3000), tmp_path)
    assert all(0.6 * 3000 < row.parameters <= 3000 for row in rows)
    assert all(re.fullmatch(r"rank=\d", row.size) for row in rows)
    assert f"| {rows[0].parameters:,} | {rows[0].size} |" in (tmp_path / "table.md").read_text(
        encoding="utf-8"
    )
    with pytest.raises(PlanError, match="methods: linear: budget = 3000: method 'linear' has no option"):
        plan(budget=3000)
    plan(methods="{lora: {}, linear: {budget: none}}", budget=3000)


def test_a_run_that_fails_is_named_and_the_others_go_on(runs, tmp_path, capsys):
    runs.fails = "lora"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "pretrained"]
    arguments = ["compare", "--methods", "lora,linear", "-o", str(tmp_path), *flags, "--no-pretrained"]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "lora on synthetic_flowers, lr 0.001, seed 0 failed: the loss is not finite" in out
    assert "- lora on synthetic\\_flowers" in (tmp_path / "table.md").read_text(encoding="utf-8")
    runs.fails = ""
    assert cli.main(arguments) == 0
    assert [cell.method for cell in runs.started] == ["lora", "linear", "lora"]


@pytest.mark.parametrize(("imported", "flag"), [([], ""), (["mine", "more"], " --import mine,more")])
def test_ctrl_c_ends_cleanly_with_what_there_is(runs, tmp_path, monkeypatch, capsys, imported, flag):
    start = InProcess.start

    def interrupted(self, cell, folder):
        start(self, cell, folder)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(InProcess, "start", interrupted)
    monkeypatch.setattr(plugins, "_imported", imported)
    with pytest.raises(Interrupted):
        compare(plan(), tmp_path)
    assert capsys.readouterr().out.endswith(f"go on with:\n  vimtune compare --resume {tmp_path}{flag}\n")
    assert len(runs.started) == 1 and "1 of 2" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_what_is_published_comes_from_the_runs_alone(runs, tmp_path, monkeypatch):
    folder = tmp_path / "native"
    compare(plan(lrs="1e-3,1e-2"), folder)
    for path in folder.iterdir():  # as it comes from another machine
        if path.is_file() and path.name != "plan.yaml":
            path.unlink()
    monkeypatch.setattr("sys.argv", ["", str(folder), str(tmp_path / "results")])
    runpy.run_path(str(ROOT / "benchmarks" / "image_tables.py"), run_name="__main__")
    names = {"native.csv", "native_paired.csv", "native.png", "native_paired.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    lines = (tmp_path / "results" / "native.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 and sum(",True," in line for line in lines) == 2 * 2


def test_tables_of_finished_runs(runs, tmp_path, capsys):
    compare(plan(), tmp_path / "one")
    folders = [str(path.parent) for path in sorted((tmp_path / "one").rglob("report.json"))]
    capsys.readouterr()
    (tmp_path / "again").symlink_to(folders[0])
    twice = [*folders, folders[0] + "/.", str(tmp_path / "again"), str(tmp_path)]
    assert cli.main(["compare", *twice, "-o", str(tmp_path / "tables")]) == 0
    out = capsys.readouterr().out
    assert f"left out: {str(tmp_path)!r} has no report.json" in out
    assert (tmp_path / "tables" / "pareto.png").is_file()
    by_plan = (tmp_path / "one" / "table.csv").read_text().splitlines()
    by_runs = (tmp_path / "tables" / "table.csv").read_text().splitlines()
    assert sorted(by_plan) == sorted(by_runs)
    assert cli.main(["compare", str(tmp_path / "one")]) == 0  # a whole comparison
    assert "linear" in capsys.readouterr().out
    assert len(runs.started) == 4
    assert cli.main(["compare", str(tmp_path / "nothing")]) == 2
    assert cli.main(["compare", *folders, "--epochs", "3"]) == 2
    assert cli.main(["compare", "--resume", str(tmp_path / "tables")]) == 2
    shown = capsys.readouterr().err
    for part in ("none of 1 folder has", "expected no other flags than --output-dir", "has no plan.yaml"):
        assert part in shown


def test_the_plan_of_the_language_tasks_is_one():
    file = ROOT / "benchmarks" / "text_methods.yaml"
    plan = load_plan(file, {"model": "mamba_tiny"}, check_paths=False)  # The texts are not at hand.
    assert len(plan.pairs) == 6 * 7 and plan.rates("full", "piqa") == [3e-5, 1e-4, 3e-4]
    recipes = [plan.recipe(Cell(*pair, 1e-3, 0), ROOT) for pair in plan.pairs]
    assert {recipe.task.name for recipe in recipes} >= {"arc_easy", "winogrande", "text"}
    heads = {recipe.task.head for recipe in recipes if recipe.method.peft == "linear"}
    assert heads == {"classifier"}


@pytest.mark.parametrize(
    "name, methods",
    [
        ("image_methods", 29),
        ("image_budget", 16),
        ("compositions", 19),
        ("components", 12),
        ("prodial_ablation", 17),
    ],
)
def test_the_plans_of_the_tables_are_some(name, methods):
    file = ROOT / "benchmarks" / f"{name}.yaml"
    plan = load_plan(file, {}, check_paths=False)  # The images are not at hand.
    assert len(plan.methods) == methods and set(plan.data) >= {"flowers", "cars", "rsscn7", "caltech"}
    method, data = plan.pairs[0]
    recipe = plan.recipe(plan.cells(method, data, plan.rates(method, data)[0])[0], ROOT)
    assert recipe.run.eval_interval > recipe.optimisation.epochs and not recipe.run.pictures
    if name == "image_methods":  # every method but the one that trains nothing by itself
        trained = {part for own in plan.methods.values() for part in own["peft"].split("+")}
        assert trained == set(METHODS)
    if name == "prodial_ablation":
        assert not recipe.data.test


def test_without_any_flag_the_quickstart_is_compared(runs, tmp_path, monkeypatch, capsys):
    plan = load_plan(quickstart.PLAN, {})
    probe, adapter = (plan.recipe(Cell(*pair, 1e-3, 0), ROOT) for pair in plan.pairs)
    assert probe.method.peft == "linear" and probe.task.augmentation == "none"  # its features repeat
    assert adapter.method.peft == "prodial" and probe.backbone == adapter.backbone == Recipe().backbone
    small = {name: {**own, "epochs": 1} for name, own in plan.methods.items()}
    monkeypatch.setattr(quickstart, "load_plan", lambda *_: Plan.from_values({**TINY, "methods": small}))
    monkeypatch.chdir(tmp_path)
    assert cli.train_main([]) == 0
    out = capsys.readouterr().out
    assert [cell.method for cell in runs.started] == ["linear", "prodial"]
    for shown in ("top-1 (test), %", "trained", "training", "adapter", "Each score is that of one run"):
        assert shown in out
    folder = Path("runs") / "quickstart"
    assert f"scores in training: {folder / 'curves.png'}\n" in out and (folder / "curves.png").is_file()
    (line,) = [line for line in out.splitlines() if line.startswith("its adapter: ")]
    assert Path(line.removeprefix("its adapter: ")).is_file()
    assert f"{Path(line.removeprefix('its adapter: ')).with_name('examples.png')}\n" in out


def test_a_quickstart_that_was_stopped_goes_on_and_a_finished_one_does_not(
    runs, tmp_path, monkeypatch, capsys
):
    def let_the_plan_be(methods: str) -> None:
        text = yaml.safe_dump({**TINY, "methods": methods})
        quickstart.PLAN.write_text(text, encoding="utf-8")

    monkeypatch.setattr(quickstart, "PLAN", tmp_path / "plan.yaml")
    let_the_plan_be("linear,lora")
    monkeypatch.chdir(tmp_path)
    start = InProcess.start

    def interrupted(self, cell, folder):
        start(self, cell, folder)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(InProcess, "start", interrupted)
        quickstart.run_quickstart()
    first, second, third = (Path("runs") / name for name in ("quickstart", "quickstart-2", "quickstart-3"))
    with hold(RunFolder(first)):  # as another process would
        assert quickstart._stopped(load_plan(quickstart.PLAN, {})) is None
    assert quickstart.run_quickstart() == 0
    assert "going on with what was stopped: runs/quickstart\n" in capsys.readouterr().out
    assert [cell.method for cell in runs.started] == ["linear", "lora"] and not second.exists()
    assert quickstart.run_quickstart() == 0 and second.is_dir() and len(runs.started) == 4
    (second / Cell("lora", DATA, 1e-3, 0).path / "report.json").unlink()
    let_the_plan_be("linear")  # as another version has it
    assert quickstart.run_quickstart() == 0 and third.is_dir() and len(runs.started) == 5


def test_reports_are_not_trusted(runs, tmp_path):
    compare(plan(seeds="0", methods="linear"), tmp_path)
    report = tmp_path / Cell("linear", DATA, 1e-3, 0).path / "report.json"
    values = json.loads(report.read_text())
    for wrong in (
        "[]",
        "{}",
        "{",
        json.dumps({**values, "top1": "x"}),
        json.dumps({**values, "recipe": {"task": "y"}}),
    ):
        report.write_text(wrong)
        with pytest.raises(ValueError, match=r"report\.json"):
            read_result(report.parent)
    report.write_text(json.dumps({**values, "history": []}))
    with pytest.raises(ValueError, match="the loss of epoch 1 in the history"):
        print(read_result(report.parent).rank)
    # Reports of earlier versions lack the newer fields.
    report.write_text(
        json.dumps({k: v for k, v in values.items() if k not in ("head_parameters", "adapter_bytes")})
    )
    assert read_result(report.parent).method_parameters is None


WORKER = """
import json, os, signal, sys
for line in sys.stdin:
    folder = json.loads(line)
    with open(f"{folder}/log.txt", "a") as log:
        print(os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], file=log)
    with open(f"{folder}/asked") as asked:
        what = asked.read()
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        print("error: the \\x1b[31msecond\\nhint", file=open(f"{folder}/log.txt", "a"))
    code = 2 if what == "fail" else 0
    print(code, flush=True)
    if code:
        sys.exit(code)
"""
"""Stands in for `vimtune.compare.worker`: what it does is written in the run folder."""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Give a run to `Processes` whose workers do what is written in its folder, and wait for it."""
    monkeypatch.setattr(execution, "WORKER", (sys.executable, "-c", WORKER))

    def run(processes, number, asked):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        (folder / "asked").write_text(asked)
        processes.start(Cell("lora", DATA, 1e-3, number), folder)
        return folder

    def wait(processes):
        until = time.monotonic() + 30
        ended = []
        while processes.running and time.monotonic() < until:
            ended += processes.ended()
            time.sleep(0.002)
        return ended

    return SimpleNamespace(run=run, wait=wait)


def said(folder):
    return (folder / "log.txt").read_text().split()


def test_a_process_makes_one_run_after_the_other_until_one_fails(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "log.txt").write_text("error: first\n")
    processes = Processes(1, None)
    codes, processes_of_runs, reasons = [], [], []
    for number, asked in enumerate(["", "", "fail", "die", "", ""]):
        folder = scripted.run(processes, number, asked)
        assert not processes.has_room
        (run,) = scripted.wait(processes)
        assert processes.has_room
        codes.append(run.code)
        processes_of_runs.append(said(folder)[-3 if asked != "fail" else -7])
        reasons += [run.failure()] if run.code else []
    processes.kill()
    assert codes == [0, 0, 2, -9, 0, 0]
    first, second, third, fourth, fifth, sixth = processes_of_runs
    assert (
        first == second == third != fourth != fifth == sixth
    )  # Only what has failed takes its process along.
    assert reasons == ["the \\x1b[31msecond", "it ended with code -9"]


def test_processes_import_the_packages_that_were_named(scripted, monkeypatch):
    monkeypatch.setattr(plugins, "_imported", ["mine", "more"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    telling = f"import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(sys.argv[1:])\n{WORKER}"
    monkeypatch.setattr(execution, "WORKER", (sys.executable, "-c", telling))
    processes = Processes(1, None)
    folder = scripted.run(processes, 0, "")
    scripted.wait(processes)
    processes.kill()
    assert said(folder)[1] == "mine,more"


def test_a_process_that_died_between_two_runs_is_replaced(scripted, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = Processes(1, None)
    scripted.run(processes, 0, "")
    (run,) = scripted.wait(processes)
    run.slot.worker.kill()
    run.slot.worker.wait()
    scripted.run(processes, 1, "")
    (run,) = scripted.wait(processes)
    processes.kill()
    assert run.code == 0


def test_runs_see_their_gpu_alone_and_take_their_share_of_the_processor(scripted, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vimtune.compare.execution.usable_cores", lambda: 9)
    for visible, expected in ((None, ["0", "1"]), ("5,7", ["5", "7"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        processes = Processes(2, ["cuda:0", "cuda:1"])
        folders = []
        while processes.has_room:
            folders.append(scripted.run(processes, len(folders), ""))
        assert len(scripted.wait(processes)) == 4
        processes.kill()
        assert [said(folder)[-2] for folder in folders] == expected * 2
        assert {said(folder)[-1] for folder in folders} == {"2"}


def test_a_process_that_is_told_to_stop_while_it_starts_makes_no_run(tmp_path):
    asked = plan(methods="lora", seeds="0", epochs=100_000)
    cell = Cell("lora", DATA, 1e-3, 0)
    (tmp_path / cell.path).mkdir(parents=True)
    asked.recipe(cell, tmp_path).save(tmp_path / cell.path / "recipe.yaml")
    processes = Processes(1, None)
    processes.start(cell, tmp_path / cell.path)
    processes.ask_to_stop()
    processes.running[0].slot.worker.wait()
    (ended,) = processes.ended()
    assert ended.code == -signal.SIGTERM


def test_a_process_stops_when_the_comparison_ends_and_goes_on_later(runs, tmp_path):
    """The pipe that ends here ends also when the comparison is killed. The run that stops has a process that
    has made another one before, and it comes out as without that."""
    short = plan(methods={"lora": {"rank": 2, "dropout": 0.1}}, seeds="0", pictures=False)
    asked = plan(methods="lora", seeds="0", lr=1e-2, epochs=20, pictures=False)
    cells = [(short, Cell("lora", DATA, 1e-3, 0)), (asked, Cell("lora", DATA, 1e-2, 0))]
    processes = Processes(1, None)
    until = time.monotonic() + 120
    for made, cell in cells:
        folder = tmp_path / cell.path
        folder.mkdir(parents=True)
        made.recipe(cell, tmp_path).save(folder / "recipe.yaml")
        processes.start(cell, folder)
        assert not processes.has_room
        awaited = "report.json" if made is short else "checkpoint.safetensors"
        while not (folder / awaited).exists() and time.monotonic() < until:
            time.sleep(0.02)
        while made is short and not (ended := list(processes.ended())):
            time.sleep(0.02)
    assert ended[0].code == 0 and ended[0].slot.worker is processes.running[0].slot.worker
    processes.ask_to_stop()
    processes.running[0].slot.worker.wait()
    (stopped,) = processes.ended()
    assert stopped.code == 130 and processes.has_room
    assert not (folder / "report.json").exists()
    ((row,), _) = compare(asked, tmp_path)
    assert row.results[0].report.epochs == 20 and len(runs.started) == 1
    compare(asked, tmp_path / "alone")
    files = [at / cells[1][1].path / "adapter.safetensors" for at in (tmp_path, tmp_path / "alone")]
    first, second = map(load_file, files)
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_adapters_of_all_seeds_make_a_soup(runs, tmp_path, capsys):
    """Only seeds that share their base weights average: those of `linear` do, those of `lora` drew theirs."""
    torch.save(timm.create_model("test_vim").state_dict(), tmp_path / "base.pth")
    asked = plan(
        methods={"linear": {"checkpoint": str(tmp_path / "base.pth")}, "lora": {"rank": 2}}, soups=True
    )
    folder = tmp_path / "compared"
    rows, _ = compare(asked, folder)
    by_method = {row.method: row for row in rows}
    (scores,) = by_method["linear"].soups
    assert scores.keys() == by_method["linear"].results[0].scores.keys() and not by_method["lora"].soups
    printed = capsys.readouterr().out
    assert "no soup of lora on synthetic_flowers" in printed and "other base weights" in printed
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "| soup |" in table and "the average of those of all seeds" in table
    soup = folder / "soups" / DATA / "linear-lr0.001"
    written = (soup / "adapter.safetensors").stat().st_mtime_ns
    # What is there is not made again, and is shown without training.
    again, _ = compare(asked, folder)
    assert cli.main(["compare", str(folder)]) == 0 and "soup" in capsys.readouterr().out
    assert again[0].soups == rows[0].soups and (soup / "adapter.safetensors").stat().st_mtime_ns == written
