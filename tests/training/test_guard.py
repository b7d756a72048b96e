"""Non-finite values are traced to the place where they arise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_weights, metrics
from torch import nn

from vimtune.runtime.seeds import derive_seed
from vimtune.tasks.classification import Classification
from vimtune.training import NonFiniteError, passes, stepper, train
from vimtune.training.guard import find_nonfinite
from vimtune.training.state import load_run_state


class TwoFactors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_factor, backward_factor):
        ctx.backward_factor = backward_factor
        return x * forward_factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.backward_factor, None, None


class Scale(nn.Module):
    """Multiplies by `forward_factor`; the gradient by `backward_factor`."""

    def __init__(self, forward_factor: float = 1.0, backward_factor: float = 1.0) -> None:
        super().__init__()
        self.forward_factor, self.backward_factor = forward_factor, backward_factor

    def forward(self, x):
        return TwoFactors.apply(x, self.forward_factor, self.backward_factor)


def build(**factors: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), Scale()),
        nn.Sequential(nn.Linear(4, 4), Scale(**factors), nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )


def find(model: nn.Module, images=None, backward: bool = True, forward=None) -> str | None:
    images = torch.randn(3, 4) if images is None else images
    forward = forward or (lambda x: model(x).square().sum())
    return find_nonfinite(model, {"images": images}, lambda: forward(images), backward=backward)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_places(bad):
    assert find(build()) is None
    images = torch.randn(3, 4)
    images[1, 2] = bad
    assert "the input images (1 of 12 values" in find(build(), images)

    model = build()
    with torch.no_grad():
        model[1][0].weight[0, 0] = bad
    assert find(model).startswith("the weight 1.0.weight (1 of 16 values")

    place = find(build(forward_factor=bad))
    assert place.startswith("the output of 1.1 (Scale)") and "its input: 0 of 12" in place
    assert find(build(forward_factor=bad), backward=False).startswith("the output of 1.1 (Scale)")

    model = build()
    assert "the loss; the outputs" in find(model, forward=lambda x: model(x).sum() * bad)

    place = find(build(backward_factor=bad))
    assert place.startswith("the backward of 1.1 (Scale)") and "passes to 1.0 (Linear)" in place
    assert find(build(backward_factor=bad), backward=False) is None

    model = build()
    model[0][0].weight.register_hook(lambda gradient: gradient * bad)
    assert find(model).startswith("the gradient of 0.0.weight (16 of 16 values")


def test_hooks_are_removed():
    model = build(forward_factor=float("nan"))
    find(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{}, {"grad_checkpointing": True, "grad_accum": 2, "batch_size": 4}])
def test_run_names_the_layer(tiny, fused, reading_ahead, monkeypatch, options, late):
    """A mixer that overflows from the third step on; with its loss read `late`, the fourth has begun."""
    original, seed, seeds = Classification.open, passes.seed_generators, []
    monkeypatch.setattr(passes, "seed_generators", lambda *a: (seeds.append(a[0]), seed(*a)))
    if late:
        fused()
        reading_ahead()

    def with_a_bad_layer(task, recipe, processes):
        job = original(task, recipe, processes)
        mixer, block = job.model.layers[1].mixer, job.model.layers[1].mixer.forward
        calls = []

        def overflows(x, *flow):
            calls.append(1)
            # Two calls a step with checkpointing or accumulation, four with both.
            limit = 2 * (2 if "grad_accum" in options else 1) * (2 if "grad_checkpointing" in options else 1)
            return block(x, *flow) * (1.0 if len(calls) <= limit else float("inf"))

        mixer.forward = overflows
        return job

    monkeypatch.setattr(Classification, "open", with_a_bad_layer)
    with pytest.raises(NonFiniteError) as error:
        train(tiny(**options))
    message = str(error.value)
    assert "non-finite loss in epoch 1, step 3" in message
    assert "the output of layers.1.mixer (BiMambaMixer)" in message
    assert "lower --lr" in message
    # What was replayed last to find it draws the numbers of that step.
    assert seeds[-1] == derive_seed(0, "step", 2, 0, 0)


@pytest.mark.usefixtures("no_pictures")
def test_what_is_launched_before_the_loss_is_known_is_the_same(tiny, fused, reading_ahead, monkeypatch):
    """Nothing; the update; the update and the passes of the next step."""
    fused()
    settings = {"ema": 0.9, "grad_accum": 2, "batch_size": 4}
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "skips_by_itself", lambda optimizer: False)
        reports = [train(tiny("nothing", **settings))]
    reports.append(train(tiny("update", **settings)))
    reading_ahead()
    reports.append(train(tiny("passes", **settings)))
    states = [load_run_state(Path(r.run_dir, "checkpoint.safetensors")) for r in reports]
    for report, state in zip(reports[1:], states[1:], strict=True):
        assert_same_weights(state.adapter, states[0].adapter)
        assert_same_weights(state.ema, states[0].ema)
        assert metrics(report.run_dir) == metrics(reports[0].run_dir)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("launched", ["nothing", "update", "passes"])
def test_no_update_is_made_with_it(tiny, fused, reading_ahead, monkeypatch, launched):
    """The model stays as it was after the second step, whatever is launched before the look at the loss."""
    made = [] if launched == "nothing" else fused()
    if launched == "passes":
        reading_ahead()
    original, kept = Classification.open, {}

    def with_a_bad_gradient(task, recipe, processes):
        job = original(task, recipe, processes)
        forward, calls = job.model.forward, []

        def fails_in_step_3(images):
            calls.append(1)
            if len(calls) != 3:  # the fourth step, if it has begun, must not be updated with either
                return forward(images)
            kept.update({name: p.detach().clone() for name, p in job.model.named_parameters()})
            kept["model"] = job.model
            return TwoFactors.apply(forward(images), 1.0, float("inf"))

        job.model.forward = fails_in_step_3
        return job

    monkeypatch.setattr(Classification, "open", with_a_bad_gradient)
    with pytest.raises(NonFiniteError, match="non-finite gradient in epoch 1, step 3"):
        train(tiny())
    model = kept.pop("model")
    assert_same_weights(dict(model.named_parameters()), kept)
    for optimizer in made:
        assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.usefixtures("no_pictures")
def test_run_names_a_gradient(tiny, monkeypatch):
    original = Classification.open

    def with_a_bad_backward(task, recipe, processes):
        job = original(task, recipe, processes)
        block, forward = job.model.layers[1], job.model.layers[1].forward
        block.forward = lambda x: forward(TwoFactors.apply(x, 1.0, float("nan")))
        return job

    monkeypatch.setattr(Classification, "open", with_a_bad_backward)
    with pytest.raises(NonFiniteError) as error:
        train(tiny())
    assert "non-finite gradient in epoch 1, step 1" in str(error.value)
    assert "passes to layers.0 (Block)" in str(error.value)
