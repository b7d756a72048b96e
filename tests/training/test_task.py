"""The trainer serves a task without images: tokens, several scores, likelihoods, no classes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_graph import ON_GPU, difference, run_once
from test_resume import interrupt_at
from tiny_runs import assert_same_weights, largest_difference, metrics, weights
from toy_task import CHOICES, Bigrams, Likelihoods, Sequences, log_likelihoods
from two_ranks import register_toy_task, run_two

from vimtune.recipe import load_recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.precision import build_autocast
from vimtune.training import Interrupted, ScoreReport, evaluate, train
from vimtune.training.report import print_report
from vimtune.training.state import load_run_state

CPU = torch.device("cpu")
MIXED = {"noise": 0.2, "drop_path": 0.2, "ema": 0.9, "grad_accum": 2, "batch_size": 5}
"""Whatever has a state or draws random numbers."""


@pytest.fixture
def toy(tiny):
    """`toy("name", **changes)`: recipe of a run of the task `continuation`."""
    settings = {
        "task": "continuation",
        "peft": "lora",
        "targets": ["mix"],
        "epochs": 2,
        "lr": 3e-2,
        "batch_size": 8,
    }
    return lambda name="run", **changes: tiny(name, **{**settings, **changes})


def test_it_learns_and_reports(toy, capsys):
    recipe = toy(epochs=6, peft="full", rank=None, targets=None, lr=5e-2)
    report = train(recipe)
    assert isinstance(report, ScoreReport) and report.task == "continuation"
    losses = [record["train_loss"] for record in report.history]
    assert losses[-1] < 0.7 * losses[0] and report.scores["acc"] > 80
    assert report.scores == report.best_scores and report.scores["nats"] == pytest.approx(report.loss)
    assert (report.num_examples, report.split, report.selection_split) == (20, "val", "val")
    folder = Path(recipe.run.output_dir)
    stored = json.loads((folder / "report.json").read_text())
    assert stored == report.to_dict() == ScoreReport(**stored).to_dict()
    assert (folder / "learning_curve.png").exists() and not list(folder.glob("confusion*"))
    steps = [record for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    assert all("tokens_per_second" in record and "images_per_second" not in record for record in steps)
    assert steps[-1].keys() >= {"loss", "acc", "acc_norm", "nats", "train_loss"}
    text = capsys.readouterr().out
    assert "val acc 100.00 %" in text and "tok/s" in text and "accuracy per token (val)" in text
    tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["scalars"]
    assert {"val/acc", "val/nats", "train/tokens_per_second", "final/val_acc", "final/best_val_acc"} <= {
        *tags
    }


def test_its_report_is_read_again(toy, capsys):
    report = train(toy(resume="auto", epochs=1))
    capsys.readouterr()
    assert train(toy(resume="auto", epochs=1)) == report
    first, shown = capsys.readouterr().out.split("\n", 1)
    assert "is finished already" in first
    print_report(report, Console())
    assert "accuracy (val)" in shown and capsys.readouterr().out.split() == shown.split()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("changes", [{"batch_size": 4, "grad_accum": 2}, {"batch_size": 2, "grad_accum": 4}])
def test_the_gradient_is_the_mean_over_the_tokens_there_are(toy, changes):
    """Sequences have different lengths, so the batches of a step count different numbers of tokens."""
    whole, parts = train(toy("whole")), train(toy("parts", **changes))
    assert largest_difference(weights(whole.run_dir), weights(parts.run_dir)) < 1e-5


def test_scores_equal_their_definitions(toy):
    torch.manual_seed(0)
    model = Bigrams(0.0)
    loader = Sequences("val", 13, toy(), Processes(), train=False)
    found = evaluate(model, loader, Likelihoods(), device=CPU, autocast=build_autocast("none", CPU))
    hits, norm, nats = 0, 0, 0.0
    for index, (_, length) in enumerate(loader.examples):
        tokens = loader.collate([loader.examples[index]]).tensors["tokens"][0]
        sums, means = [], []
        for row in tokens:
            answer = log_likelihoods(model(row[None]), row[None])[0, length // 2 - 1 :]
            sums.append(answer.sum().item())
            means.append(answer.sum().item() / int((answer != 0).sum()))
        hits += sums.index(max(sums)) == 0
        norm += means.index(max(means)) == 0
        nats -= sums[0]
    assert len(sums) == CHOICES and found.count == 13
    assert found.scores["acc"] == pytest.approx(100 * hits / 13)
    assert found.scores["acc_norm"] == pytest.approx(100 * norm / 13)
    assert found.loss == pytest.approx(nats / 13, rel=1e-5)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("call", [2, 5])
def test_resume_is_exact(toy, monkeypatch, call):
    straight, recipe = train(toy("straight", **MIXED)), toy("parts", **MIXED)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", call, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(recipe)
    state = load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors"))
    assert state.progress.step == call and state.facts.outputs == {}
    report = train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(recipe.run.output_dir), weights(straight.run_dir))
    assert metrics(recipe.run.output_dir) == metrics(straight.run_dir)
    assert (report.scores, report.warnings) == (straight.scores, [])


@pytest.mark.processes
def test_two_processes_give_the_result_of_one(toy):
    """The last batch has one example: the first process's share of it is empty."""
    one, two = toy("one", batch_size=12, ema=0.9), toy("two", batch_size=12, ema=0.9)
    report = train(one)
    sharded = toy("sharded", batch_size=12, ema=0.9, shard=True)
    assert run_two(two, sharded, prepare=register_toy_task) == ["", ""]
    for other in (two, sharded):
        assert largest_difference(weights(one.run.output_dir), weights(other.run.output_dir)) < 1e-5
    stored = json.loads(Path(two.run.output_dir, "report.json").read_text())
    assert stored["scores"] == pytest.approx(report.scores) and stored["processes"] == 2


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("changes", [{}, MIXED], ids=str)
def test_replays_change_nothing(toy, replaying, changes):
    eager = train(toy("eager", **changes))
    replaying()
    replayed = train(toy("replayed", **changes))
    assert replayed.cuda_graph and not eager.cuda_graph
    assert_same_weights(weights(eager.run_dir), weights(replayed.run_dir))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, MIXED, {"amp": "bf16"}], ids=str)
def test_on_a_gpu_it_is_replayed(toy, changes):
    of_images = ("transforms", "augmentation")
    settings = {key: value for key, value in ON_GPU.items() if key not in of_images}
    settings |= {"epochs": 4, **changes}
    eager, replayed = (run_once(toy(graph, **settings, cuda_graph=graph)) for graph in ("off", "on"))
    assert replayed[0].cuda_graph and replayed[0].warnings == []
    assert difference(eager, replayed) < 1e-4
