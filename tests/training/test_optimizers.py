"""Every optimizer of the table: its state is what the table says, it resumes exactly, it lowers the loss."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import assert_same_weights, largest_difference, metrics, weights
from torch import nn
from two_ranks import run_two

import vimtune
from vimtune import adapters
from vimtune.recipe import Recipe, RecipeError
from vimtune.recipe.components import OptimisationSettings
from vimtune.recipe.optimizers import NEVER_NEGATIVE, OPTIMIZERS, parse_optimizer
from vimtune.runtime.distributed import Processes
from vimtune.training import Callback, EpochRecord, Session, train
from vimtune.training.identity import ResumeError
from vimtune.training.layers import layer_rates
from vimtune.training.optim import CosineSchedule, is_matrix, set_learning_rate
from vimtune.training.sharding import Replicated
from vimtune.training.state import Progress, RunState, load_run_state, save_run_state
from vimtune.training.trained import Trained, build_trained


def needs(name: str) -> Any:
    """The optimizer as a parameter of a test, which is skipped where its package is missing."""
    package = OPTIMIZERS[name].package
    missing = package is not None and find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


EACH = [needs(name) for name in OPTIMIZERS]


class Small(nn.Module):
    """Weights of every kind: a matrix, a filter, biases, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) tokens to (B, 5) logits."""
        hidden = self.inner(self.embed(tokens)).relu()
        return self.head(self.conv(hidden.transpose(1, 2)).mean(2))

    def get_classifier(self) -> nn.Module:
        """The head, as timm's models say which one it is."""
        return self.head


@dataclass
class Training:
    """A model whose steps are those of the trainer, on batches that depend on the step's number alone."""

    trained: Trained
    number: int = 0
    schedule = CosineSchedule(total_steps=12, warmup_steps=2, min_lr=0.0)

    @classmethod
    def start(cls, name: str, **options: Any) -> Training:
        model = Small()
        vimtune.inject(model, "full")
        settings = OptimisationSettings(opt=name, lr=3e-2, weight_decay=0.1, **options)
        return cls(build_trained(settings, model, Replicated(Processes())))

    def loss(self, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 7, (32, 4), generator=draw)
        return nn.functional.cross_entropy(self.trained.model(tokens), tokens.sum(1) % 5)

    def steps(self, count: int) -> None:
        for step in range(self.number, self.number + count):
            set_learning_rate(self.trained.optimizer, self.schedule, step)
            for parameter in self.trained.parameters.values():
                parameter.grad = None
            self.loss(step).backward()
            self.trained.optimizer.step()
            if self.trained.average is not None:
                self.trained.average.update(step)
        self.number += count


def state_of(training: Training, name: str) -> RunState:
    """The state of a run that stands there, without its data."""
    from vimtune.training.identity import Facts

    recipe = Recipe(opt=name)
    facts = Facts(outputs={}, train_examples=1, base_hash="")
    tensors = training.trained.tensors()
    return RunState(recipe, facts, Progress(step=training.number), **tensors)


@pytest.mark.parametrize("name", EACH)
def test_a_state_is_what_the_table_says_and_continues_exactly(name: str, tmp_path: Path) -> None:
    straight, first = Training.start(name), Training.start(name)
    places = {key: p.data_ptr() for key, p in straight.trained.parameters.items()}
    straight.steps(8)
    assert places == {key: p.data_ptr() for key, p in straight.trained.parameters.items()}
    first.steps(5)
    with first.trained.averaged():
        pass  # evaluations in between change nothing
    file = tmp_path / "state.safetensors"
    save_run_state(file, state_of(first, name))
    saved = load_run_state(file)
    for key, slots in saved.optimizer.items():
        parameter = first.trained.parameters[key]
        layout = first.trained.layouts[key]
        assert {slot: tensor.dim() > 0 for slot, tensor in slots.items()} == layout
        assert all(slots[slot].shape == parameter.shape for slot, shaped in layout.items() if shaped)
        assert all(float(slots[slot].min()) >= 0 for slot in layout if slot in NEVER_NEGATIVE)
    assert saved.optimizer.keys() == first.trained.parameters.keys()
    second = Training.start(name)
    second.trained.restore(saved)
    second.number = 5
    second.steps(3)
    for key, expected in straight.trained.parameters.items():
        assert torch.equal(second.trained.parameters[key], expected), key
    for key, expected in straight.trained.scored.items():
        assert torch.equal(second.trained.scored[key], expected), key


@pytest.mark.parametrize("name", EACH)
def test_eight_steps_lower_the_loss(name: str) -> None:
    training = Training.start(name)
    before = training.loss(99).item()
    training.steps(8)
    with training.trained.averaged():
        assert training.loss(99).item() < before


@pytest.mark.parametrize("name", ["adamw", "muon", needs("schedulefree")])
def test_a_state_that_lacks_something_is_refused(name: str, tmp_path: Path) -> None:
    training = Training.start(name)
    training.steps(2)
    state = state_of(training, name)
    key, slots = next(iter(state.optimizer.items()))
    for slot in slots:
        broken = {**state.optimizer, key: {other: slots[other] for other in slots if other != slot}}
        with pytest.raises(ResumeError, match=f"{key}/{slot}"):
            Training.start(name).trained.restore(
                RunState(state.recipe, state.facts, state.progress, state.adapter, broken, {}, {})
            )
        if slot in NEVER_NEGATIVE:
            negative = {**state.optimizer, key: {**slots, slot: slots[slot] - 1e9}}
            with pytest.raises(ResumeError, match=f"{slot}' is negative"):
                Training.start(name).trained.restore(
                    RunState(state.recipe, state.facts, state.progress, state.adapter, negative, {}, {})
                )


@pytest.mark.skipif(find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_numbers_of_a_group_are_the_same_for_all_its_weights() -> None:
    training = Training.start("schedulefree")
    training.steps(2)
    state = state_of(training, "schedulefree")
    group = training.trained.optimizer.param_groups[0]["params"]
    name = next(key for key, p in training.trained.parameters.items() if p is group[-1])
    state.optimizer[name]["weight_sum"] = state.optimizer[name]["weight_sum"] + 1
    with pytest.raises(ResumeError, match="several values of weight_sum"):
        Training.start("schedulefree").trained.restore(state)


@pytest.mark.skipif(find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_schedule_free_weights_are_averages_of_those_of_plain_steps() -> None:
    """x, the mean of all z weighted by squared rates, and the gradient at y = (1 - beta) z + beta x."""
    training = Training.start("schedulefree", betas=[0.9, 0.999])
    trained = training.trained
    zs, rates = [], []
    for _ in range(4):
        training.steps(1)
        group = trained.optimizer.param_groups[0]
        rates.append(group["lr_max"] ** 2)
        zs.append({key: trained.optimizer.state[p]["z"].clone() for key, p in trained.parameters.items()})
    for key, p in trained.parameters.items():
        x = sum(rate * z[key] for rate, z in zip(rates, zs, strict=True)) / sum(rates)
        torch.testing.assert_close(trained.scored[key], x, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(p.detach(), 0.1 * zs[-1][key] + 0.9 * x, atol=1e-5, rtol=1e-4)


def test_matrices_are_the_weights_of_linear_layers_and_their_factors() -> None:
    model = timm.create_model("test_vim", num_classes=5)
    vimtune.inject(model, "lora+a_tuning+prompt")
    found = {entry.base_name for entry in adapters.adapter_parameters(model) if is_matrix(entry)}
    assert found == {
        f"layers.{block}.mixer.{name}.weight" for block in range(3) for name in ("in_proj", "out_proj")
    }
    trained = Training.start("muon").trained
    matrix = {p: group["use_muon"] for group in trained.optimizer.param_groups for p in group["params"]}
    assert [key for key, p in trained.parameters.items() if matrix[p]] == ["inner.weight.value"]


def test_layers_learn_slower_towards_the_input() -> None:
    model = timm.create_model("test_vim", num_classes=5)
    vimtune.inject(model, "lora+prompt+affix+d_tuning")
    rates = layer_rates(model, adapters.adapter_parameters(model), 0.5)
    for path, rate in rates.items():
        block = (
            int(path.split(".")[1])
            if path.startswith("layers.")
            else {"head": 3, "encode()": -1}[path.split(".")[0]]
        )
        assert rate == 0.5 ** (3 - block), path
    assert "layers.1.mixer.scan()" in rates and "layers.2.mixer.D" in rates
    settings = OptimisationSettings(layer_decay=0.5)
    groups = build_trained(settings, model, Replicated(Processes())).optimizer.param_groups
    assert {group["lr_multiple"] for group in groups} == {0.5**power for power in range(5)}


def test_layers_of_a_model_that_does_not_name_them_are_its_blocks() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.last = nn.Linear(4, 4)

    model = Stack()
    vimtune.inject(model, "full")
    rates = layer_rates(model, adapters.adapter_parameters(model), 0.1)
    powers = {"embed": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "last": 0}
    assert rates == {
        f"{name}.{kind}": pytest.approx(0.1**power)
        for name, power in powers.items()
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adafactorbv", "other shapes"),
        ("cadafactor", "other shapes"),
        ("kronw", "random numbers"),
        ("bnbadam8bit", "8 bits"),
        ("lookahead_adam", "beside its state"),
        ("lambc", "norms of whole tensors"),
        ("lars", "norms of whole tensors"),
        ("adanw", "three betas"),
        ("mars", "Others of timm are left out until"),
        ("lyon", "Did you mean"),
    ],
)
def test_others_are_refused_with_a_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_optimizer(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"opt": "sgd", "betas": [0.9, 0.99]}, "betas = .* does nothing"),
        ({"opt": "adamw", "momentum": 0.9}, "momentum = 0.9 does nothing"),
        ({"opt": "schedulefree", "ema": 0.9}, "ema = 0.9 does not go"),
        ({"opt": "schedulefree", "min_lr": 1e-5}, "min_lr = 1e-05 does not go"),
        ({"opt": "schedulefree", "betas": [0, 0.9]}, "nothing for opt"),
    ],
)
def test_what_an_optimizer_does_not_take_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**values)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(ValueError, match="pip install schedulefree"):
        Training.start("schedulefree")


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_was_stopped_goes_on_with_its_optimizer_to_its_last_step(tiny: Any) -> None:
    name = "schedulefree" if find_spec("schedulefree") else "muon"
    changes = {
        "opt": name,
        "layer_decay": 0.8,
        "epochs": 5,
        "max_steps": 6,
        "limit": 20,
        "batch_size": 5,
        "model_kwargs": {"depth": 1},
    }

    class Enough(Exception):
        pass

    class Stop(Callback):
        def on_epoch(self, session: Session, epoch: EpochRecord) -> None:
            raise Enough

    report = train(tiny("whole", **changes))
    assert (report.steps, report.epochs, report.stopped_early) == (6, 2, False)
    assert "20 images" in report.data["train"] and "for limit 20 drawn" in report.data["train"]
    with pytest.raises(Enough):
        train(tiny("parts", **changes), callbacks=[Stop()])
    train(tiny("parts", resume="auto", **changes))
    with pytest.raises(ValueError, match="opt was"):
        train(tiny("parts", resume="auto", **{**changes, "opt": "adamw", "max_steps": 7}))
    with pytest.raises(ValueError, match="raise --max-steps to train longer"):
        train(tiny("parts", resume=tiny("parts").run.output_dir, **changes))
    folders = [tiny(which).run.output_dir for which in ("whole", "parts")]
    assert_same_weights(*map(weights, folders))
    assert metrics(folders[0]) == metrics(folders[1])


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_every_optimizer_works_with_pieces_of_tensors(tiny: Any) -> None:
    """Two processes that share the model take the steps of one that holds it whole."""
    kinds = [name for name, kind in OPTIMIZERS.items() if kind.package is None or find_spec(kind.package)]
    recipes = [tiny(name, opt=name, peft="full", rank=None, max_steps=3) for name in kinds]
    for recipe in recipes:
        train(recipe)
    sharded = [
        recipe.replace(output_dir=f"{recipe.run.output_dir}-sharded", shard=True) for recipe in recipes
    ]
    assert run_two(*sharded) == ["", ""]
    for one, other in zip(recipes, sharded, strict=True):
        # Muon multiplies its matrices in bf16, whose sums depend on their order.
        tolerance = 1e-3 if one.optimisation.opt == "muon" else 1e-5
        states = [load_run_state(Path(r.run.output_dir, "checkpoint.safetensors")) for r in (one, other)]
        assert states[0].optimizer.keys() == states[1].optimizer.keys()
        assert largest_difference(states[0].adapter, states[1].adapter) < tolerance, one.optimisation.opt
