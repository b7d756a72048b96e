"""The comparison of benchmarks/gpu_step.py: counts, times, tables, survival."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from fragile import Fragile
from torch.utils.flop_counter import FlopCounterMode

from vimtune import ops
from vimtune.adapters import CallRule, Method, register_method
from vimtune.methods import METHODS as REGISTRY

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_step  # noqa: E402
import methods  # noqa: E402
import step_plot  # noqa: E402
from counts import VimShape, count_exponentials, count_instructions, count_matmul_flops  # noqa: E402
from step_cases import METHODS, VIT, Case, StepRunner, build_model  # noqa: E402
from step_tables import growth_table, ratio_table, roofline_table, size_table  # noqa: E402
from workers import Worker, WorkerFailed  # noqa: E402


@pytest.fixture(autouse=True)
def own_choice_of_a_backend():
    """The benchmark chooses one for its process, which here is that of all tests."""
    yield
    ops.set_backend("auto")


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forward", "linear", "frozen", "full"])
def test_matmul_flops_are_those_that_torch_counts(method):
    """The convolution and the scan are custom operations, which torch's counter does not know."""
    model = build_model(Case("test", "cpu", method, 32, 3))
    with FlopCounterMode(display=False) as counter:
        if method == "forward":
            with torch.no_grad():
                model(torch.randn(3, 3, 32, 32))
        else:
            model(torch.randn(3, 3, 32, 32)).sum().backward()
    assert count_matmul_flops(VimShape.of(model, 3, 102), method, 16) == counter.get_total_flops()


def test_low_rank_gradients_take_the_cheaper_way():
    model = timm.create_model("vim_tiny_patch16_224", num_classes=102, depth=1)
    shape = VimShape.of(model, 2, 102)
    assert shape.rows == 2 * 197 and shape.model.inner == 384 and shape.model.dt_rank == 12
    flops = {rank: count_matmul_flops(shape, "lora", rank) for rank in (1, 16, 400)}
    frozen, full = (count_matmul_flops(shape, method, 16) for method in ("frozen", "full"))
    assert flops[1] < flops[16] < flops[400] < full
    assert flops[400] - frozen == 2 * shape.rows * 384 * 192  # both dense gradients, less that input's


def test_counts_are_linear_in_images_and_tokens():
    one, two = (VimShape.of(timm.create_model("test_vim", img_size=32), batch, 10) for batch in (1, 2))
    for method in METHODS:
        for count in (count_exponentials, count_instructions):
            assert count(two, method) == 2 * count(one, method)
    assert count_exponentials(one, "forward") == 3 * 17 * 32 * (2 * 16 + 7)
    assert count_exponentials(one, "prodial") == 2 * count_exponentials(one, "forward")


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", VIT])
def test_steps_of_every_method(kernels):
    losses = {}
    with ops.use_backend("auto"):  # undoes the choice that the runner makes for its process
        runner = StepRunner(kernels, "cpu")
        for method in METHODS:
            case = Case("test", kernels, method, 32, 2)
            facts = runner.prepare(case, capture=True)
            assert runner.visit(case, seconds=1e-3) > 0
            assert len(facts["eager_ms"]) >= 2 and not facts["graph"] and facts["tokens"] == 17
            assert (facts["trained"] > 0) == (method != "forward")
            losses[method] = facts["first_loss"]
        slow = Case("test", kernels, "full", 32, 3)
        facts = runner.prepare(slow, capture=True, slow=1e-9)
        assert len(facts["eager_ms"]) == 2 and not facts["kept"] and slow not in runner.steps
    # Adapters change nothing at the start.
    assert all(loss == pytest.approx(losses["forward"], rel=1e-5) for loss in losses.values())
    runner.drop()
    assert not runner.steps and runner.images is None


def test_lora_trains_as_much_of_the_vit_as_of_the_vim():
    trained = []
    for kernels in ("torch", VIT):
        with torch.device("meta"):
            model = build_model(Case("tiny", kernels, "lora", 224, 1))
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert trained[0] == trained[1] == 609_510


def test_frozen_case_goes_back_through_the_whole_backbone():
    model = build_model(Case("test", "torch", "frozen", 32, 2))
    seen = []
    for block in model.layers:
        block.register_full_backward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(seen) == len(model.layers)
    trained = {name.rpartition("adapters.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"pos_embed", "weight", "bias"}


# --- all methods ---------------------------------------------------------------------------------


class Here:
    """A worker that is no process of its own."""

    def __init__(self, factory, *arguments):
        self.target = factory(*arguments)

    def call(self, method, *arguments, seconds):
        try:
            return getattr(self.target, method)(*arguments)
        except ValueError as error:
            raise WorkerFailed(type(error).__name__, str(error)) from error

    def stop(self):
        pass


class Added(CallRule):
    """Adds a vector to what out_proj gives."""

    def __init__(self, site):
        super().__init__()
        self.offset = torch.nn.Parameter(site.new_empty(site.owner.out_features).zero_())

    def around(self, call, x):
        return call(x) + self.offset


def test_all_methods_side_by_side(monkeypatch, tmp_path, capsys):
    """Methods that are registered later are there by themselves; one that fails costs its own row."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        summary = "an offset of a call"
        default_targets = "out_proj()"

        def build_rule(self, site):
            return Added(site)

    @dataclass(frozen=True, kw_only=True)
    class Broken(Mine):
        summary = "a mistake"

        def build_rule(self, site):
            raise ValueError(f"it does not fit {site.path}")

    names = {name: REGISTRY.get(name) for name in ("prodial", "lora", "ia3")}
    monkeypatch.setattr(REGISTRY, "_things", names)
    register_method("mine")(Mine)
    register_method("broken")(Broken)
    monkeypatch.setattr(methods, "Worker", Here)
    arguments = ["--rounds", "2", "--device", "cpu", "--backend", "torch", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["methods.py", *arguments])
    methods.main()
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "methods.csv").open())}
    assert list(rows) == ["plain", "lora", "prodial", "ia3", "mine", "broken"]
    assert rows["lora"]["step_ratio"] == rows["plain"]["inference_ratio"] == "1.0"
    assert rows["lora"]["trained"] == str(3 * 16 * (16 + 64 + 32 + 16)) and rows["plain"]["trained"] == "0"
    served = ["plain", "merged", "merged", "merged", "as it is", ""]
    assert [row["served"] for row in rows.values()] == served
    assert "it does not fit layers.0.mixer.out_proj()" in rows["broken"]["problem"]
    assert all(float(row["step_ms"]) > 0 for row in list(rows.values())[1:-1])
    printed = capsys.readouterr().out
    for part in (tmp_path / "methods.md").read_text().split("\n\n"):  # the heading, and the table
        assert part in printed
    assert "| broken | 0 | yes | - | - | - | - | - | - | ValueError: it does not fit" in printed


# --- workers ------------------------------------------------------------------------------------


def test_worker_survives_errors_and_comes_back_after_death_and_hanging():
    worker = Worker(Fragile)
    try:
        assert worker.call("add", 2, seconds=60) == 2
        with pytest.raises(WorkerFailed, match=r"^FloatingPointError: first line$") as error:
            worker.call("fail", seconds=60)
        assert error.value.kind == "FloatingPointError"
        assert worker.call("add", 3, seconds=60) == 5 and worker.generation == 1
        with pytest.raises(WorkerFailed, match="ended during 'die'"):
            worker.call("die", seconds=60)
        assert worker.call("add", 1, seconds=60) == 1 and worker.generation == 2
        with pytest.raises(WorkerFailed, match="no answer to 'hang'"):
            worker.call("hang", seconds=0.5)
        worker.send("add", 4)
        assert worker.receive(60) == 4 and worker.generation == 3
    finally:
        worker.stop()


def test_worker_that_cannot_start_says_why():
    worker = Worker(Fragile, "fails")
    with pytest.raises(WorkerFailed, match="ValueError: cannot start here"):
        worker.receive(60)
    worker.stop()


# --- tables and plot ----------------------------------------------------------------------------


def row(kernels, method, img_size, samples, **changes):
    tokens = (img_size // 16) ** 2 + 1
    facts = {
        "model": "vit" if kernels == VIT else "vim",
        "kernels": kernels,
        "method": method,
        "img_size": img_size,
        "batch_size": 4,
        "tokens": tokens,
        "first_loss": 4.6,
        "graph": True,
        "eager_ms": [9.0],
        "peak_gib": 2.0,
        "samples": samples,
        "counts": {"bytes": 2e9, "matmul_flops": 4e9, "exponentials": 1e9, "instructions": 3e9},
    }
    return {**facts, **changes}


def cells(table: str, *starts: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.split()[: len(starts)] == list(starts)]
    return line.split()[len(starts) :]


def test_size_table_gives_medians_and_doubts_a_loss_that_differs():
    rows = [
        row("triton", "lora", 224, [8.0, 10.0, 9.0]),
        row("cuda", "lora", 224, [20.0]),
        row("torch", "lora", 224, [], eager_ms=[40.0, 44.0], first_loss=5.1, graph=False),
        {"kernels": "nvrtc", "method": "lora", "error": "out of memory"},
    ]
    table = size_table(rows)
    assert cells(table, "triton", "lora") == ["9.00", "8.00", "10.00", "9.00", "444", "2.00", "yes"]
    assert cells(table, "torch", "lora")[:3] == ["42.00", "40.00", "44.00"]
    assert "WRONG? torch lora begins with a loss of 5.1000, the others with 4.6000" in table
    assert "nvrtc" not in table and table.count("WRONG") == 1


def test_ratios_pair_the_rounds():
    rows = [
        row("triton", "frozen", 224, [10.0, 20.0, 10.0]),
        row("triton", "lora", 224, [11.0, 22.0, 12.0, 99.0]),
        row("cuda", "lora", 224, [44.0, 88.0, 48.0], peak_gib=4.0),
        row(VIT, "lora", 224, [5.5, 11.0, 6.0]),
    ]
    table = ratio_table(rows)
    assert cells(table, "triton:", "lora", "/", "frozen")[:3] == ["1.100", "1.100", "1.200"]
    assert cells(table, "lora:", "triton", "/", "cuda") == ["0.250", "0.250", "0.250", "memory", "0.50"]
    assert cells(table, "lora:", "triton", "/", "vit")[0] == "2.000"
    assert ratio_table(rows[:1]) == ""


def test_growth_exponents():
    rows = [row("triton", "prodial", size, [tokens * 0.1]) for size, tokens in ((224, 197), (448, 785))]
    rows += [row(VIT, "prodial", size, [tokens**2 * 1e-4]) for size, tokens in ((224, 197), (448, 785))]
    table = growth_table(rows)
    assert cells(table, "triton", "prodial")[-2:] == ["(1.00)", "1.00"]
    assert cells(table, "vit", "prodial")[-2:] == ["(2.00)", "2.00"]
    assert growth_table(rows[:1]) == ""


def test_roofline_shares():
    ceilings = {"bytes": 4e12, "matmul_flops": 8e12, "exponentials": 1e12, "instructions": 1e12, "x": 1.0}
    table = roofline_table([row("triton", "lora", 224, [10.0])], ceilings)
    assert cells(table, "224", "triton", "lora") == ["10.00", "3.00", "5.0", "5.0", "10.0", "30.0"]
    assert cells(table, "224", "4", "lora") == ["2", "4", "1", "3", "3.00"]
    assert roofline_table([row("triton", "lora", 224, [10.0])], {}) == ""


def test_plot_is_drawn_from_the_report(tmp_path):
    rows = [
        row(k, m, size, [9.0, 8.0]) for k in ("triton", VIT) for m in ("lora", "full") for size in (224, 448)
    ]
    rows.append({"kernels": "nvrtc", "method": "lora", "error": "out of memory"})
    target = tmp_path / "plot.png"
    step_plot.draw([{"rows": rows, "machine": {"device": "a card"}}], ["prodial", "full"], target)
    assert target.stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        step_plot.draw([{"rows": rows}], ["dora"], target)


# --- the run ------------------------------------------------------------------------------------


class ScriptedWorker:
    """Answers as a GPU's process would; `trouble` maps (what is asked, of which method) to a failure."""

    def __init__(self, trouble: dict[tuple[str, str], WorkerFailed], milliseconds: float = 5.0) -> None:
        self.trouble, self.milliseconds = trouble, milliseconds
        self.generation = 1
        self.asked: list[tuple] = []

    def call(self, question, *arguments, seconds):
        self.asked.append((question, *arguments))
        if question in ("recover", "drop"):
            return None
        case = arguments[0]
        failure = self.trouble.get((question, case.method))
        if failure is not None and not (failure.kind == "CaptureFailed" and not arguments[1]):
            raise failure
        if question == "visit":
            return self.milliseconds
        facts = row(case.kernels, case.method, case.img_size, [], graph=arguments[1])
        kept = self.milliseconds <= 1e3 * arguments[2]
        return {**facts, "eager_ms": [self.milliseconds], "kept": kept}

    def stop(self) -> None:
        self.generation += 1


def comparison(tmp_path, workers: dict[str, ScriptedWorker], **changes) -> gpu_step.Comparison:
    settings = {"scale": "tiny", "methods": ["forward", "lora", "frozen", "full"], "rounds": 3}
    settings |= {"minutes": 1.0, "slow_ms": 1000.0, "output": tmp_path}
    made = gpu_step.Comparison(argparse.Namespace(**{**settings, **changes}))
    made.workers = workers
    return made


def test_run_goes_on_after_every_kind_of_failure(tmp_path, capsys):
    trouble = {
        ("prepare", "lora"): WorkerFailed("OutOfMemoryError", "too much"),
        ("visit", "full"): WorkerFailed("Died", "the process ended"),
    }
    workers = {"triton": ScriptedWorker(trouble), "cuda": ScriptedWorker({})}
    run = comparison(tmp_path, workers)
    run.measure(224, 128)
    found = {
        (r["kernels"], r["method"]): r for r in json.loads((tmp_path / "gpu_step.json").read_text())["rows"]
    }
    assert found["triton", "lora"]["error"] == "OutOfMemoryError: too much"
    assert "lost" in found["triton", "full"] and found["triton", "full"]["samples"] == []
    for key in (("triton", "forward"), ("triton", "frozen"), ("cuda", "lora"), ("cuda", "full")):
        assert found[key]["samples"] == [5.0] * 3
    text = capsys.readouterr().out
    assert "triton lora at 224 px failed: OutOfMemoryError: too much" in text
    assert "triton full lost in round 1" in text
    assert workers["triton"].asked[-1] == ("drop",)


def test_backend_that_cannot_be_captured_is_timed_eagerly(tmp_path):
    refusing = {("prepare", method): WorkerFailed("CaptureFailed", "no") for method in METHODS}
    workers = {"cuda": ScriptedWorker(refusing), "triton": ScriptedWorker({})}
    run = comparison(tmp_path, workers)
    run.measure(224, 128)
    graphs = {(row["kernels"], row["method"]): row["graph"] for row in run.rows}
    assert len(graphs) == 8 and all(graph == (kernels == "triton") for (kernels, _), graph in graphs.items())
    assert all(len(row["samples"]) == 3 for row in run.rows)
    assert run.report["uncaptured"] == {"cuda": "CaptureFailed: no"}
    assert workers["cuda"].generation == 2  # a fresh process, once


def test_slow_backend_leaves_the_rest_out_and_time_limits_the_run(tmp_path, capsys):
    workers = {"torch": ScriptedWorker({}, 4000.0), "triton": ScriptedWorker({})}
    run = comparison(tmp_path, workers)
    for size in (224, 448, 64):
        run.measure(size, 8)
    seen = [(row["img_size"], row["method"]) for row in run.rows if row["kernels"] == "torch"]
    assert seen == [(224, "forward"), (64, "forward")]
    assert len(run.rows) == 2 + 3 * 4
    late = comparison(tmp_path, {"triton": ScriptedWorker({})}, minutes=0.0)
    late.measure(224, 8)
    assert late.rows == [] and "time is up: 4 cases at 224 px" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_comparison_on_the_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_step.py"), "--scale", "test", "--device", "cpu"]
    command += ["--sizes", "32:2", "128:2", "--backends", "torch", "cuda", "--methods", "forward", "lora"]
    command += ["--rounds", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda left out: BackendUnavailable" in done.stdout
    for heading in ("ratio of step times", "growth", "roofline"):
        assert heading in done.stdout
    again = [sys.executable, str(BENCHMARKS / "step_tables.py"), str(tmp_path / "gpu_step.json")]
    tables = subprocess.run(again, capture_output=True, text=True, check=True).stdout
    assert tables.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    report = json.loads((tmp_path / "gpu_step.json").read_text())
    assert len(report["rows"]) == 8 and all(len(row["samples"]) == 2 for row in report["rows"])
    assert report["ceilings"].keys() == {"bytes", "matmul_flops", "exponentials", "instructions"}


@pytest.mark.slow
def test_scaling_is_measured_without_gpus(tmp_path):
    command = [sys.executable, "gpu_scaling.py", "--device", "cpu", "--amp", "none", "--gpus", "1", "2"]
    command += ["--cases", "vim_nano_patch8_64:2", "--methods", "lora", "--steps", "4", "--rounds", "1"]
    subprocess.run([*command, "--output", str(tmp_path / "scaling.json")], cwd=BENCHMARKS, check=True)
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["gpus"], row["way"]) for row in rows] == [
        (count, way) for count in (1, 2) for way in ("sum", "ddp", "trainer")
    ]
    assert all(row["images_per_second_per_gpu"] > 0 for row in rows)


# --- mixed batches ------------------------------------------------------------------------------


def test_mixed_batches_are_measured(monkeypatch, capsys):
    import mixed_batches

    sizes = ["--model", "test_vim", "--rounds", "1", "--adapters", "2", "--batch-size", "3", "--threads", "2"]
    monkeypatch.setattr(sys, "argv", ["mixed_batches.py", *sizes])
    mixed_batches.main()
    printed = capsys.readouterr().out
    assert printed.count("of the speed of one") == 6 and printed.count("  2 threads: ") == 2


# --- exported files -----------------------------------------------------------------------------


@pytest.mark.slow
def test_exported_files_are_measured(monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import exported

    arguments = ["--model", "test_vim", "--batch-sizes", "1", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["exported.py", *arguments])
    exported.main()
    printed = capsys.readouterr().out
    assert printed.count(" written in ") == 2 and printed.count("times the weights") == 2
    for batch in (1, 3):
        assert f"ms an image, batch {batch}:" in printed
    assert printed.count("PyTorch, vimtune's kernels") == 2 and printed.count("  .onnx ") == 2
