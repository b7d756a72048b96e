"""AdamW over what the adapters train, the learning-rate curve, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vimtune.adapters import AdaptedParameter


def build_optimizer(
    parameters: Iterable[AdaptedParameter],
    *,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW with one group for each learning rate (of the head or the adapter, and its multiples) and each
    weight decay.

    Each group keeps the peak of the run's rate as `peak_lr`, and its own multiple of it as `lr_multiple`;
    `set_learning_rate` follows the curve from there. The weight decay of a tensor is `weight_decay` times the
    tensor's own multiple.

    Raises:
        ValueError: nothing is trainable.
    """
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for entry in parameters:
        kind = (entry.group, entry.weight_decay, entry.learning_rate)
        groups.setdefault(kind, []).append(entry.parameter)
    on_gpu = all(parameter.is_cuda for members in groups.values() for parameter in members)
    if not groups:
        raise ValueError("the method trains no tensor of this model: check peft, targets and layers")
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "peak_lr": head_lr if group == "head" and head_lr is not None else lr,
                "lr_multiple": rate,
                "weight_decay": weight_decay * decay,
            }
            for (group, decay, rate), members in groups.items()
        ],
        lr=lr,
        betas=betas,
        fused=on_gpu or None,  # few launches for all tensors, and updates can be skipped without a wait
    )


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

    def __call__(self, step: int, peak: float) -> float:
        """Learning rate of the optimizer step number `step` (from 0)."""
        if step < self.warmup_steps:
            # The first step already moves: a zero rate would waste it and leave LoRA's B at zero.
            return peak * (step + 1) / self.warmup_steps
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


class WeightAverage:
    """Exponential moving average of the trained tensors (the frozen ones need none).

    The decay grows from 0.1 towards `decay` over the first steps, so that short runs are not
    dominated by the initial weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights, for the length of a block."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._write(self.tensors)
        try:
            yield
        finally:
            self._write(kept)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
