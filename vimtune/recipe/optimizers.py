"""The table of optimizers that a run can use: what each is called, what belongs to its state. Without torch.

An optimizer is here when a run with it continues exactly from its saved state, lowers the loss, changes
weights in place, and works with pieces of tensors (`--shard`); `tests/training/test_optimizers.py` holds
every entry to that. They are built by timm's factory, by timm's names, but for those whose package is named
(`vimtune.training.optim`). To add one is an entry in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vimtune.text import quote, suggest


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """What the trainer has to know about an optimizer."""

    summary: str
    """One line for tables."""
    betas: tuple[float, float] | None = None
    """Its decay rates unless a recipe gives others; None where it has none."""
    momentum: float | None = None
    """Its momentum unless a recipe gives another; None where it has none."""
    tensors: tuple[str, ...]
    """What it keeps for each weight that has the weight's shape."""
    counts_steps: bool = False
    """Whether it keeps the number of steps, `step`, for each weight."""
    group_numbers: tuple[str, ...] = ()
    """Numbers that it keeps for each group of weights and changes as it goes."""
    matrix_tensors: tuple[str, ...] | None = None
    """What it keeps for matrices instead, which it treats in a way of their own; None where it does not."""
    averages: bool = False
    """Whether it averages the weights itself, which takes the place of a falling learning rate."""
    package: str | None = None
    """Distribution that it comes from, if not torch or timm."""

    def layout(self, matrix: bool) -> dict[str, bool]:
        """What belongs to the state of one weight: name -> whether it has the weight's shape, or is a number.

        Args:
            matrix: whether the weight is one of the matrices that `matrix_tensors` is about.
        """
        if matrix and self.matrix_tensors is not None:
            return dict.fromkeys(self.matrix_tensors, True)
        numbers = (("step",) if self.counts_steps else ()) + self.group_numbers
        return dict.fromkeys(self.tensors, True) | dict.fromkeys(numbers, False)


def _like_adam(summary: str, betas: tuple[float, float] = (0.9, 0.999)) -> OptimizerKind:
    """An optimizer that keeps what Adam keeps."""
    return OptimizerKind(summary=summary, betas=betas, tensors=("exp_avg", "exp_avg_sq"), counts_steps=True)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": _like_adam("Adam with decoupled weight decay (Loshchilov & Hutter 2019)"),
    "adam": _like_adam("Adam; weight decay is a part of the gradient (Kingma & Ba 2015)"),
    "cadamw": _like_adam("AdamW without the steps that point against the gradient (Liang et al. 2024)"),
    "radam": _like_adam("Adam whose first steps wait for a reliable variance (Liu et al. 2020)"),
    "nadamw": _like_adam("AdamW with Nesterov momentum (Dozat 2016)"),
    "adoptw": _like_adam("ADOPT with decoupled weight decay (Taniguchi et al. 2024)", betas=(0.9, 0.9999)),
    "lion": OptimizerKind(
        summary="the sign of the momentum; takes a third to a tenth of AdamW's rate (Chen et al. 2023)",
        betas=(0.9, 0.99),
        tensors=("exp_avg",),
    ),
    "clion": OptimizerKind(
        summary="lion without the steps that point against the gradient (Liang et al. 2024)",
        betas=(0.9, 0.99),
        tensors=("exp_avg",),
    ),
    "muon": OptimizerKind(
        summary="orthogonal steps for matrices of linear layers, AdamW for the rest (Jordan et al. 2024)",
        betas=(0.9, 0.95),
        momentum=0.95,
        tensors=("exp_avg", "exp_avg_sq"),
        counts_steps=True,
        matrix_tensors=("momentum_buffer",),
    ),
    "schedulefree": OptimizerKind(
        summary="AdamW that averages the weights; constant rate after the warm-up (Defazio et al. 2024)",
        betas=(0.9, 0.999),
        tensors=("z", "exp_avg_sq"),
        group_numbers=("k", "weight_sum", "lr_max"),
        averages=True,
        package="schedulefree",
    ),
    "sgd": OptimizerKind(
        summary="gradient descent with Nesterov momentum; weight decay is a part of the gradient",
        momentum=0.9,
        tensors=("momentum_buffer",),
    ),
    "sgdw": OptimizerKind(
        summary="sgd with decoupled weight decay (Loshchilov & Hutter 2019)",
        momentum=0.9,
        tensors=("momentum_buffer",),
    ),
}
"""All optimizers by name."""

NEVER_NEGATIVE = ("step", "exp_avg_sq", "k", "weight_sum")
"""What no state has below zero."""

_REFUSED = {
    "adafactor": "its state has other shapes than the weights and cannot be shared out or compared with them",
    "adahessian": "it needs second derivatives, which the scan does not have",
    "kron": "it draws random numbers as it goes, which a saved state does not hold",
    "bnb": "its states of 8 bits have not been tested here",
    "fused": "it needs apex and has not been tested here; adamw is fused on a GPU by itself",
    "lamb": "its steps depend on norms of whole tensors, of which --shard has pieces",
    "lar": "its steps depend on norms of whole tensors, of which --shard has pieces",
    "adan": "it has three betas, and a recipe has two",
    "lookahead": "it keeps weights beside its state, which a saved state does not hold",
}
"""Beginnings of timm's names of optimizers that are not in the table, and why."""


def parse_optimizer(value: Any) -> str:
    """The name of an optimizer as a recipe or a flag gives it.

    Raises:
        ValueError: there is none of that name here; where timm has it, the message says why.
    """
    name = value.lower() if isinstance(value, str) else ""
    if name in OPTIMIZERS:
        return name
    reasons = (reason for start, reason in _REFUSED.items() if name.removeprefix("c").startswith(start))
    why = next(
        (f" {quote(value)} is left out: {reason}." for reason in reasons),
        " Others of timm are left out until runs with them are known to continue exactly from a saved state.",
    )
    raise ValueError(f"expected one of {', '.join(OPTIMIZERS)}.{why}{suggest(name, OPTIMIZERS)}")


def list_optimizers() -> Mapping[str, str]:
    """Names of all optimizers with a line about each."""
    return {name: kind.summary for name, kind in OPTIMIZERS.items()}
