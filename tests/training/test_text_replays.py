"""Runs on texts whose batches are padded to few shapes and replayed, against runs without either."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from interruption import interrupt_at
from recorders import RepeatingRecorder
from test_graph import difference, run_once
from text_files import ARC, write_lines
from text_runs import SETTINGS
from tiny_runs import assert_same_weights, largest_difference, metrics, relative_difference, weights

from vimtune.recipe import Recipe, load_recipe
from vimtune.tasks.text.job import TextJob
from vimtune.training import Interrupted, train
from vimtune.training.graph import CaptureError

pytestmark = pytest.mark.usefixtures("no_pictures")

KINDS = {
    "likelihood": {"task": "arc_easy"},
    "ratings": {"task": "arc_easy", "head": "classifier", "pooling": "last"},
    "classes": {"task": "text", "head": "classifier", "pooling": "mean"},
}
"""Every kind of head: their batches are padded in different ways."""
METHODS = {
    "lora": {"rank": 2},
    "prodial": {"peft": "prodial", "rank": 2},
    "full": {"peft": "full", "rank": None, "lr": 1e-4},
}
"""Settings of a run, by its method."""
WINDOWS = {"ema": 0.9, "grad_accum": 2, "clip_grad": 0.5}
"""Settings of a run whose steps have several batches."""


@pytest.fixture
def texts(tmp_path):
    """`texts("name", kind, **changes)`: recipe of a run on 40 texts, short and long, with two choices or
    three."""
    draw = random.Random(0)
    written = ["abc " * int(draw.lognormvariate(1.5, 0.6)) + "?" for _ in range(40)]
    lines = {
        "arc_easy": [
            {
                "question": text,
                "choices": {name: values[: 2 + (number % 7 > 0)] for name, values in ARC["choices"].items()},
                "answerKey": draw.choice("AB"),
            }
            for number, text in enumerate(written)
        ],
        "text": [{"text": text, "label": draw.choice(["good", "bad"])} for text in written],
    }

    def build(name: str, kind: str, **changes):
        values = {**SETTINGS, "epochs": 2, "log_interval": 1, **KINDS[kind], **changes}
        own = lines[values["task"]]
        files = {
            f"{split}_file": str(write_lines(tmp_path / f"{split}.jsonl", part))
            for split, part in (("train", own), ("test", own[:4]))
        }
        return Recipe(output_dir=str(tmp_path / name), **files, **values)

    return build


def losses(folder) -> torch.Tensor:
    """Losses and gradient norms of a run, step by step."""
    return torch.tensor([[r["loss"], r["grad_norm"]] for r in metrics(folder) if "grad_norm" in r])


def assert_same_course(one: str, other: str) -> None:
    """The runs in two folders differ by rounding."""
    torch.testing.assert_close(losses(one), losses(other), rtol=1e-3, atol=1e-4)
    assert relative_difference(weights(one), weights(other)) < 5e-3


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("likelihood", {**METHODS["prodial"], **WINDOWS}),
        ("ratings", METHODS["lora"]),
        ("classes", METHODS["full"]),
    ],
    ids=str,
)
def test_padding_and_replaying_change_nothing(texts, replaying, kind, settings):
    eager = train(texts("eager", kind, **settings))
    recorders = replaying()
    replayed = train(texts("replayed", kind, **settings))
    assert replayed.cuda_graph and replayed.warnings == []
    assert len(recorders[0].recorded) >= 2 and recorders[0].num_replays >= 3
    assert_same_course(eager.run_dir, replayed.run_dir)


def test_a_stopped_run_goes_on_as_if_it_had_not(texts, replaying, monkeypatch):
    """With dropout, too: what is drawn depends on the size to which a batch is padded, which is the same
    whatever was recorded before."""
    settings = {"targets": "out_proj", "dropout": 0.3, "epochs": 3}
    replaying()
    whole = train(texts("whole", "likelihood", **settings))
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 13)
        with pytest.raises(Interrupted):
            train(texts("parts", "likelihood", **settings))
    recorders = replaying()
    report = train(load_recipe(None, {"resume": texts("parts", "likelihood").run.output_dir}))
    assert report.warnings == [] and recorders[0].num_replays > 0
    assert_same_weights(weights(whole.run_dir), weights(report.run_dir))
    assert metrics(whole.run_dir) == metrics(report.run_dir)


def test_without_graphs_batches_keep_their_lengths(texts, monkeypatch):
    monkeypatch.setattr(TextJob, "expect_replays", lambda self: pytest.fail("nothing is replayed"))
    assert not train(texts("run", "likelihood", epochs=1)).cuda_graph


class FailingLater(RepeatingRecorder):
    """Can record two shapes and no more."""

    def record(self, work):
        if len(self.recorded) == 2:
            raise CaptureError("out of memory")
        return super().record(work)


def test_when_a_later_shape_cannot_be_recorded_all_batches_run_eagerly(texts, replaying):
    eager = train(texts("eager", "likelihood"))
    recorders = replaying(FailingLater)
    other = train(texts("other", "likelihood"))
    (warning,) = other.warnings
    assert warning == "the CUDA graph could not be recorded, batches run eagerly: out of memory"
    assert other.cuda_graph and 0 < recorders[0].num_replays < 6
    assert_same_course(eager.run_dir, other.run_dir)


# --- on a GPU -----------------------------------------------------------------------------------

ON_GPU = {"device": "cuda", "backend": "auto", "epochs": 3}


@pytest.fixture
def padded_only(monkeypatch):
    """Run a recipe with batches padded as for replays, and replay none of them."""

    def run(recipe):
        pad = TextJob.expect_replays
        with monkeypatch.context() as patch:
            patch.setattr(TextJob, "expect_replays", lambda self: 0 * pad(self))
            return run_once(recipe)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, settings) for kind in KINDS for settings in METHODS.values()),
        ("likelihood", {"targets": "out_proj", "dropout": 0.3, "amp": "fp16", **WINDOWS}),
        ("ratings", {"amp": "bf16", **METHODS["prodial"]}),
        ("likelihood", {"amp": "bf16", "model": "mamba2_tiny", "targets": "out_proj"}),
    ],
    ids=str,
)
def test_on_a_gpu_replays_are_as_close_to_eager_as_eager_runs_to_each_other(
    texts, padded_only, kind, settings
):
    settings = {**ON_GPU, **settings}
    first, second = (padded_only(texts(f"eager{n}", kind, **settings)) for n in (1, 2))
    replayed = run_once(texts("replayed", kind, **settings, cuda_graph="on"))
    assert (first[0].cuda_graph, replayed[0].cuda_graph) == (False, True)
    assert replayed[0].warnings == []
    spread = difference(first, second)
    print(f"{kind}, {settings}: eager spread {spread:.2e}, replayed {difference(first, replayed):.2e}")
    assert difference(first, replayed) <= max(10 * spread, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_padding_and_replaying_change_nothing(texts, kind):
    eager, replayed = (
        train(texts(graph, kind, **ON_GPU, **METHODS["prodial"], cuda_graph=graph)) for graph in ("off", "on")
    )
    assert replayed.cuda_graph and replayed.warnings == []
    assert_same_course(eager.run_dir, replayed.run_dir)


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_continues_as_if_it_had_not_stopped(texts):
    settings = {**ON_GPU, "targets": "out_proj", "dropout": 0.3, "warmup_epochs": 0, "min_lr": SETTINGS["lr"]}
    whole = run_once(texts("whole", "likelihood", **{**settings, "epochs": 6}))
    recipe = texts("parts", "likelihood", **settings)
    train(recipe)
    report = train(load_recipe(None, {"resume": recipe.run.output_dir, "epochs": "6"}))
    assert largest_difference(whole[1], weights(report.run_dir)) < 1e-6
