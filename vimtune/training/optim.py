"""The optimizer over what the adapters train, the learning-rate curve, and averages of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vimtune.adapters import AdaptedParameter
from vimtune.recipe.optimizers import OPTIMIZERS


def build_optimizer(
    parameters: Iterable[AdaptedParameter],
    *,
    name: str = "adamw",
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    layer_rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer with one group for each learning rate (of the head or the adapter, and its multiples) and
    each weight decay, and where it treats matrices apart, for these and for the rest.

    Each group keeps the peak of the run's rate as `peak_lr`, and its own multiple of it as `lr_multiple`;
    `set_learning_rate` follows the curve from there. The weight decay of a tensor is `weight_decay` times the
    tensor's own multiple.

    Args:
        parameters: what is trained.
        name: of the optimizer, see `vimtune.recipe.optimizers`.
        lr: peak learning rate.
        head_lr: that of the head; None for the same.
        weight_decay: that of tensors which decay once.
        betas, momentum: decay rates of the optimizer's averages; None for its own.
        layer_rates: multiple of the learning rate for each point that a rule acts on, by its path
            (`AdaptedParameter.base_name`), beside that of the rule; None for 1.

    Raises:
        ValueError: nothing is trainable, or the package of the optimizer is not installed.
    """
    kind = OPTIMIZERS[name]
    groups: dict[tuple[str, float, float, bool], list[nn.Parameter]] = {}
    for entry in parameters:
        rate = entry.learning_rate * (1.0 if layer_rates is None else layer_rates[entry.base_name])
        matrix = kind.matrix_tensors is not None and is_matrix(entry)
        groups.setdefault((entry.group, entry.weight_decay, rate, matrix), []).append(entry.parameter)
    if not groups:
        raise ValueError("the method trains no tensor of this model: check peft, targets and layers")
    settings: dict[str, Any] = {"lr": lr}
    if kind.betas is not None:
        settings["betas"] = kind.betas if betas is None else betas
    if kind.momentum is not None:
        settings["momentum"] = kind.momentum if momentum is None else momentum
    if name == "adamw":
        # Few launches for all tensors, and updates can be skipped without a wait.
        on_gpu = all(parameter.is_cuda for members in groups.values() for parameter in members)
        settings["fused"] = on_gpu or None
    return _create(
        name,
        [
            {
                "params": members,
                "peak_lr": head_lr if group == "head" and head_lr is not None else lr,
                "lr_multiple": rate,
                "weight_decay": weight_decay * decay,
                **({} if kind.matrix_tensors is None else {"use_muon": matrix}),
            }
            for (group, decay, rate, matrix), members in groups.items()
        ],
        settings,
    )


def _create(name: str, groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of the table by timm's factory, or from the package that has it."""
    if OPTIMIZERS[name].package is None:
        from timm.optim import create_optimizer_v2

        optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, name, **settings)
        return optimizer
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ValueError(
            f"opt = {name!r} needs a package that is not installed: pip install schedulefree"
        ) from error
    average: torch.optim.Optimizer = AdamWScheduleFree(groups, **settings)
    return average


def is_matrix(entry: AdaptedParameter) -> bool:
    """Whether a trained tensor is a matrix that multiplies activations: the weight of a linear layer or a
    factor of it. Heads, embeddings and parameters such as A_log, whose rows and columns mean something each,
    are not, however many dimensions they have."""
    *path, last = entry.base_name.split(".")
    embeds = bool(path) and "embed" in path[-1]
    return entry.parameter.dim() == 2 and entry.group != "head" and last == "weight" and not embeds


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then a half cosine down to `min_lr`; a pure function of the step.

    Being stateless it needs no saving. A run resumed with more epochs continues on the longer
    curve: at the step where it had ended near `min_lr` the rate jumps up to the longer cosine.
    """

    total_steps: int
    """Number of optimizer steps after which the curve has reached its end."""
    warmup_steps: int
    """Number of the steps in which the rate rises."""
    min_lr: float
    """The rate at the end, for groups whose peak is not lower still."""
    constant: bool = False
    """Whether the rate stays at its peak after the warm-up instead."""

    def __call__(self, step: int, peak: float) -> float:
        """Learning rate of the optimizer step number `step` (from 0)."""
        if step < self.warmup_steps:
            # The first step already moves: a zero rate would waste it and leave LoRA's B at zero.
            return peak * (step + 1) / self.warmup_steps
        if self.constant:
            return peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        low = min(self.min_lr, peak)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: CosineSchedule, step: int) -> float:
    """Give every group its rate at `step`; return the run's, which is that of the first group but for its
    multiple."""
    rates = [schedule(step, group["peak_lr"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * group["lr_multiple"]
    return rates[0]


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernels can leave an update out by a number that only the device knows."""
    return bool(optimizer.defaults.get("fused"))


def skip_unless_finite(optimizer: torch.optim.Optimizer, values: Tensor) -> None:
    """Have the next step of an optimizer that `skips_by_itself` change nothing, not even its counts of
    steps, if one of `values` is inf or NaN; the host does not wait to know."""
    skipped = 1.0 - torch.isfinite(values).all().float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined] # where GradScaler puts its own


class Average(Protocol):
    """Averaged weights, with which a model is evaluated and saved in the place of those of the last step."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The averages, by the names of the trained tensors."""

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""

    def applied(self) -> AbstractContextManager[None]:
        """The model with averaged weights, for the length of a block; afterwards every weight is bit for bit
        what it was."""

    def saved(self) -> Mapping[str, Tensor]:
        """What a saved state has to hold beside weights and optimizer."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what was saved."""


class WeightAverage:
    """Exponential moving average of the trained tensors (the frozen ones need none).

    The decay grows from 0.1 towards `decay` over the first steps, so that short runs are not
    dominated by the initial weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.tensors = _copied(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights, for the length of a block."""
        kept = _copied(self.parameters)
        _write(self.parameters, self.tensors)
        try:
            yield
        finally:
            _write(self.parameters, kept)

    def saved(self) -> Mapping[str, Tensor]:
        """The averages: nothing else tells them."""
        return self.tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])


class OptimizerAverage:
    """The averages that an optimizer keeps by itself, in its state and the weights of its steps together.

    Its step leaves the weights at which gradients are computed; `eval()` makes averages of them and `train()`
    goes back, to within rounding. The weights are therefore copied before, and put back as they were.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` has the methods `train` and `eval` besides those of torch's."""
        self.parameters, self.optimizer = dict(parameters), optimizer
        optimizer.train()  # type: ignore[attr-defined]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Copies of the averages."""
        with self.applied():
            return _copied(self.parameters)

    def update(self, step: int) -> None:
        """Nothing: the optimizer's step has done so."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights, for the length of a block."""
        kept = _copied(self.parameters)
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            _write(self.parameters, kept)

    def saved(self) -> Mapping[str, Tensor]:
        """Nothing: weights and optimizer tell them."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: weights and optimizer have been put back."""


def _copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
