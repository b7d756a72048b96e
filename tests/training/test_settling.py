"""Methods that choose from data see training batches once, before the first step."""

from __future__ import annotations

import itertools
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import interrupt_at
from tiny_runs import assert_same_weights, metrics, weights
from two_ranks import run_two

from vimtune.methods.lora import LoRA
from vimtune.methods.sdt import SDT
from vimtune.recipe import load_recipe
from vimtune.tensor_file import read_metadata
from vimtune.training import InputError, Interrupted, settling, train
from vimtune.training.identity import ResumeError

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def seen(monkeypatch):
    """LoRA looks at three batches before training; gives their losses, and gradients so far after each."""
    losses, gradients = [], []

    def look(self, rules, batches):
        rule = next(iter(rules.values()))
        for _ in range(3):
            losses.append(next(batches)())
            gradients.append(rule.branch.lora_B.grad.clone())

    monkeypatch.setattr(LoRA, "settle", look)
    monkeypatch.setattr(LoRA, "settles", True)
    return losses, gradients


def test_a_look_changes_nothing_and_sees_the_batches_of_training(tiny, seen, monkeypatch):
    settings = {"epochs": 1, "mixup": 0.4, "ema": 0.9, "lr": 1e-9, "batch_size": 10}
    settled = train(tiny("settled", **settings))
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "settles", False)
        plain = train(tiny("plain", **settings))
    assert_same_weights(weights(settled.run_dir), weights(plain.run_dir))
    assert metrics(settled.run_dir) == metrics(plain.run_dir)
    losses, gradients = seen
    # Weights hardly move at this learning rate, so the first steps have the losses that were seen.
    assert losses == pytest.approx([record["loss"] for record in metrics(plain.run_dir)[:3]], rel=1e-6)
    added = [later - earlier for earlier, later in itertools.pairwise(gradients)]
    assert all(float(gradient.abs().max()) > 0 for gradient in [gradients[0], *added])


def test_what_is_chosen_is_trained_and_averaged(tiny, monkeypatch):
    def start(self, rules, batches):
        with torch.no_grad():
            for rule in rules.values():
                rule.branch.lora_B.fill_(0.25)

    monkeypatch.setattr(LoRA, "settle", start)
    monkeypatch.setattr(LoRA, "settles", True)
    report = train(tiny(epochs=1, lr=1e-9, ema=0.9))
    for name, tensor in weights(report.run_dir).items():
        if name.endswith("lora_B"):
            torch.testing.assert_close(tensor, torch.full_like(tensor, 0.25))
    saved = load_file(Path(report.run_dir, "adapter.safetensors"))
    assert all(tensor.allclose(torch.tensor(0.25)) for name, tensor in saved.items() if "lora_B" in name)


def test_lora_starts_from_the_gradient_of_the_first_batches(tiny):
    settings = {"epochs": 1, "lr": 1e-9, "rank": 2, "peft_kwargs": {"start": "gradient"}}
    report = train(tiny(**settings))
    found = [tensor for name, tensor in weights(report.run_dir).items() if name.endswith("lora_A")]
    assert found and all((A @ A.T).allclose(torch.eye(2), atol=1e-4) for A in found)
    again = train(tiny("again", **settings))
    assert_same_weights(weights(report.run_dir), weights(again.run_dir))


def test_only_once_also_when_more_batches_are_wanted_than_an_epoch_has(tiny, monkeypatch):
    calls = []

    def look(self, rules, batches):
        calls.append([next(batches)() for _ in range(6)])

    monkeypatch.setattr(LoRA, "settle", look)
    monkeypatch.setattr(LoRA, "settles", True)
    recipe = tiny(epochs=1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(recipe)
    train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert len(calls) == 1 and len(set(calls[0])) == 6


def test_an_image_that_cannot_be_read_ends_the_run(tiny, seen, damaged):
    damaged(lambda index, turn: turn == 9)
    recipe = tiny(epochs=1)
    with pytest.raises(InputError, match=r"cannot decode image.*stopped after step 0 of 4"):
        train(recipe)
    damaged(lambda index, turn: False)
    assert train(load_recipe(None, {"resume": recipe.run.output_dir})).steps == 4


SDLORA = {
    "peft": "lora+sdt",
    "targets": {"lora": "out_proj"},
    "peft_kwargs": {"sdt": {"frozen_channels": 0.9, "selection_steps": 5, "selection_lr": 0.01}},
}
"""The five updates before the first step take more than the four batches of an epoch."""


def places(state):
    return {name: tensor for name, tensor in state.items() if name.endswith("places")}


def test_a_choice_that_was_interrupted_is_made_again(tiny, monkeypatch, capsys):
    straight = train(tiny("straight", epochs=1, **SDLORA))
    assert "before the first step the method chooses from training batches" in capsys.readouterr().out
    recipe, passes = tiny("stopped", epochs=1, **SDLORA), []
    with monkeypatch.context() as patch:

        def run(*arguments, original=settling._run):
            passes.append(1)
            if len(passes) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        patch.setattr(settling, "_run", run)
        with pytest.raises(Interrupted):
            train(recipe)
    assert len(passes) == 2
    stopped = weights(recipe.run.output_dir)
    assert not any(
        tensor.any() for name, tensor in stopped.items() if name.endswith(("lora_B", "difference"))
    )
    train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(recipe.run.output_dir), weights(straight.run_dir))


def test_a_run_that_goes_on_keeps_its_choice(tiny, monkeypatch):
    straight = train(tiny("straight", epochs=1, **SDLORA))
    recipe = tiny("stopped", epochs=1, **SDLORA)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(recipe)
    monkeypatch.setattr(SDT, "settle", None)  # nobody asks for it
    train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(recipe.run.output_dir), weights(straight.run_dir))
    before = [*places(weights(straight.run_dir)).values()]
    assert before and any(not torch.equal(own, torch.arange(len(own))) for own in before)


def test_a_state_with_places_beyond_the_matrix_is_refused(tiny, monkeypatch):
    recipe = tiny(epochs=1, **SDLORA)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(recipe)
    path = Path(recipe.run.output_dir, "checkpoint.safetensors")
    tensors, metadata = load_file(path), read_metadata(path)
    tensors["adapter/layers.0.mixer.A_log.places"][-1] = 512
    save_file(tensors, path, metadata)
    with pytest.raises(ResumeError, match=r"A_log\.places are no ascending places in a matrix of 512"):
        train(load_recipe(None, {"resume": recipe.run.output_dir}))


def note_places(folder: str) -> None:
    settle = SDT.settle

    def look(self, rules, batches):
        settle(self, rules, batches)
        found = {path: rule.places.tolist() for path, rule in rules.items()}
        Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))

    SDT.settle = look  # type: ignore[method-assign]


@pytest.mark.processes
def test_two_processes_choose_the_same_entries(tiny, tmp_path):
    recipe = tiny(epochs=1, **SDLORA)
    assert run_two(recipe, prepare=partial(note_places, str(tmp_path))) == ["", ""]
    own, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert own == other and own
    saved = places(weights(recipe.run.output_dir))
    assert saved["layers.0.mixer.A_log.places"].tolist() == own["layers.0.mixer.A_log"]


def note_losses(folder: str) -> None:
    def look(self, rules, batches):
        rule = next(iter(rules.values()))
        losses = [next(batches)() for _ in range(4)]  # the last one is a single image
        text = json.dumps([*losses, float(rule.branch.lora_B.grad.norm())])
        Path(folder, f"{os.environ['RANK']}.json").write_text(text)

    LoRA.settle, LoRA.settles = look, True  # type: ignore[method-assign]


@pytest.mark.processes
def test_two_processes_see_what_one_sees(tiny, seen, tmp_path):
    assert run_two(tiny(epochs=1), prepare=partial(note_losses, str(tmp_path))) == ["", ""]
    of_both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    train(tiny("one", epochs=1))
    assert of_both[0] == of_both[1] and of_both[0][:3] == pytest.approx(seen[0], rel=1e-5)
