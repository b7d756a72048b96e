"""Comparisons from beginning to end: killed, continued, stopped, failing, and of runs that are there."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from tiny_plans import TINY, InProcess

from vimtune import cli
from vimtune.compare import command
from vimtune.compare.command import compare
from vimtune.compare.execution import Processes
from vimtune.compare.plan import Cell, Plan, PlanError, load_plan
from vimtune.compare.results import read_result
from vimtune.training.interrupt import Interrupted

ROOT = Path(__file__).resolve().parents[2]
DATA = "synthetic_flowers"
FILES = {"table.md", "table.csv", "runs.csv", "table.tex", "pareto.png", "plan.yaml", "runs"}


def plan(**changes):
    return Plan.from_values(
        {**TINY, "methods": {"lora": {"rank": 2}, "linear": {}}, "seeds": "0,1", **changes}
    )


@pytest.fixture
def runs(monkeypatch, no_pictures, each_flower_is_painted_once):
    """The runs that were made; they share this process."""
    made = InProcess()
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
    assert "comparison of 3 runs, 2 are finished" in capsys.readouterr().out
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


def test_gpus_that_are_not_there_are_refused_before_any_run(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="device = 'cuda:9': GPU 9 is asked for and this machine has 1"):
        compare(plan(seeds="0", devices="cuda:0,cuda:9"), tmp_path)
    assert not runs.started


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


def test_ctrl_c_ends_cleanly_with_what_there_is(runs, tmp_path, monkeypatch, capsys):
    start = InProcess.start

    def interrupted(self, cell, folder):
        start(self, cell, folder)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(InProcess, "start", interrupted)
    with pytest.raises(Interrupted):
        compare(plan(), tmp_path)
    assert capsys.readouterr().out.endswith(f"go on with:\n  vimtune compare --resume {tmp_path}\n")
    assert len(runs.started) == 1 and "1 of 2" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_tables_of_finished_runs(runs, tmp_path, capsys):
    compare(plan(), tmp_path / "one")
    folders = [str(path.parent) for path in sorted((tmp_path / "one").rglob("report.json"))]
    capsys.readouterr()
    assert cli.main(["compare", *folders, str(tmp_path), "-o", str(tmp_path / "tables")]) == 0
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
    for part in ("none of the 1 folders", "expected no other flags than --output-dir", "has no plan.yaml"):
        assert part in shown


def test_the_plan_of_the_language_tasks_is_one(monkeypatch):
    monkeypatch.setattr("vimtune.compare.plan.path_problems", lambda values: [])  # the texts are not at hand
    plan = load_plan(ROOT / "benchmarks" / "text_methods.yaml", {"model": "mamba_tiny"})
    assert len(plan.pairs) == 6 * 7 and plan.rates("full", "piqa") == [3e-5, 1e-4, 3e-4]
    recipes = [plan.recipe(Cell(*pair, 1e-3, 0), ROOT) for pair in plan.pairs]
    assert {recipe.task.name for recipe in recipes} >= {"arc_easy", "winogrande", "text"}
    heads = {recipe.task.head for recipe in recipes if recipe.method.peft == "linear"}
    assert heads == {"classifier"}


def test_the_plan_of_the_quickstart_is_one():
    plan = load_plan(ROOT / "benchmarks" / "quickstart.yaml", {})
    probe, adapter = (plan.recipe(Cell(*pair, 1e-3, 0), ROOT) for pair in plan.pairs)
    assert probe.method.peft == "linear" and probe.task.augmentation == "none"  # its features repeat
    assert adapter.method.peft == "prodial" and probe.backbone == adapter.backbone


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


def test_why_a_process_failed_is_what_it_said_last_and_not_what_it_said_before(tmp_path, monkeypatch):
    ended = SimpleNamespace(poll=lambda: 2, stdin=None, returncode=2)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: ended)
    reasons = []
    for text in ("error: first\n", "epoch 1\nerror: the \x1b[31msecond\nhint\n", "epoch 1\n"):
        processes = Processes(1, None, [])
        processes.start(Cell("lora", DATA, 1e-3, 0), tmp_path)
        with open(tmp_path / "log.txt", "a") as log:
            log.write(text)
        reasons += [run.failure() for run in processes.ended()]
    assert reasons == ["first", "the \\x1b[31msecond", "it ended with code 2"]


def test_runs_see_their_gpu_alone_and_take_their_share_of_the_processor(tmp_path, monkeypatch):
    """A process is not started here: what it would be given is written down."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vimtune.compare.execution.usable_cores", lambda: 9)
    given = []
    ended = SimpleNamespace(poll=lambda: 0, stdin=None, returncode=0)
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: given.append(env) or ended)
    for visible, expected in ((None, ["0", "1"]), ("5,7", ["5", "7"])):
        given.clear()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        processes = Processes(2, ["cuda:0", "cuda:1"], [])
        while processes.has_room:
            processes.start(Cell("lora", DATA, 1e-3, len(given)), tmp_path)
        assert [env["CUDA_VISIBLE_DEVICES"] for env in given] == expected * 2
        assert {env["OMP_NUM_THREADS"] for env in given} == {"2"}
        assert len(list(processes.ended())) == 4 and processes.has_room


def test_a_process_stops_when_the_comparison_ends_and_goes_on_later(runs, tmp_path):
    """The pipe that ends here ends also when the comparison is killed."""
    asked = plan(methods="lora", seeds="0", lr=1e-2, epochs=20)
    cell = Cell("lora", DATA, 1e-2, 0)
    folder = tmp_path / cell.path
    folder.mkdir(parents=True)
    asked.recipe(cell, tmp_path).save(folder / "recipe.yaml")
    processes = Processes(1, None, [])
    processes.start(cell, folder)
    assert not processes.has_room
    until = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    processes.ask_to_stop()
    processes.running[0].process.wait(60)
    (ended,) = processes.ended()
    assert ended.process.returncode == 130 and processes.has_room
    assert not (folder / "report.json").exists()
    ((row,), _) = compare(asked, tmp_path)
    assert row.results[0].report.epochs == 20 and len(runs.started) == 1


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
