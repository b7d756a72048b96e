"""Buffers of an adapter's rules belong to the state of a run."""

from __future__ import annotations

import signal

import pytest
import torch
from test_resume import interrupt_at
from tiny_runs import assert_same_weights, weights

from vimtune.adapters.rules.lora import LoRARule
from vimtune.methods.lora import LoRA
from vimtune.recipe import load_recipe
from vimtune.training import Interrupted
from vimtune.training import train as run_training

pytestmark = pytest.mark.usefixtures("no_pictures")


class CountingRule(LoRARule):
    """Grows with the number of its training passes, which it counts in a buffer."""

    batchable = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("passes", torch.zeros(()))

    def effective_weight(self, weight):
        if self.training:
            self.passes.add_(1)
        return super().effective_weight(weight) * (1 + self.passes / 100)


def test_a_resumed_run_has_the_buffers_of_an_uninterrupted_one(tiny, monkeypatch):
    monkeypatch.setattr(
        LoRA,
        "build_rule",
        lambda self, site: CountingRule(self.build_branch(site)),
    )
    straight, stopped = tiny("straight", epochs=1), tiny("stopped", epochs=1)
    run_training(straight)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            run_training(stopped)
    run_training(load_recipe(None, {"resume": stopped.run.output_dir}))
    state = weights(stopped.run.output_dir)
    assert_same_weights(state, weights(straight.run.output_dir))
    assert state["layers.0.mixer.in_proj.weight.passes"] == 4
