"""SDT, sparse dimension tuning (Galim et al. 2025, arXiv 2410.09016): a few entries of the SSM's parameters.

    A_log' = A_log + scatter(theta_A),    B' = B + scatter(theta_B),    C' = C + scatter(theta_C)

A_log (E, N) trains at the kept states of the kept channels, the rows B and C of x_proj (N, E) in the columns
of the kept channels. Which ones is chosen by scores s (E, N) of A_log's entries: the channels d with the
largest sum_n s[d, n], and of each its states with the largest s[d, n]. Each direction of a Vim chooses for
itself. Only what is kept is stored, k l + 2 N k numbers for each direction of a layer with k channels and l
states; beside them their places are, as buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule

if TYPE_CHECKING:
    from vimtune.adapters.settling import TrainingBatches


class SparseRule(WeightRule):
    """`difference` (k, l) is added to the entries of a matrix at `places` (k l,), which count its entries row
    by row; zero at the start.

    While places are sought, `trial`, which has the shape of the matrix, is added in its stead.
    """

    def __init__(self, weight: Tensor, *size: int) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.difference = nn.Parameter(weight.new_zeros(size))
        self.register_buffer("places", torch.arange(math.prod(size), device=weight.device))
        self.places: Tensor
        self.register_parameter("trial", None)
        self.trial: nn.Parameter | None

    def effective_weight(self, weight: Tensor) -> Tensor:
        if self.trial is not None:
            return weight + self.trial
        spread = torch.zeros_like(weight).flatten().scatter(0, self.places, self.difference.flatten())
        return weight + spread.view_as(weight)

    def misfit(self, tensor: str, value: Tensor) -> str | None:
        if tensor != "places":
            return None
        size = self.shape[0] * self.shape[1]
        if bool((value < 0).any() or (value >= size).any() or (value.diff() <= 0).any()):
            return f"are no ascending places in a matrix of {size} entries"
        return self.misplaced(value)

    def misplaced(self, places: Tensor) -> str | None:
        """What is wrong with ascending places within the matrix: they have to be such as `select` gives."""
        raise NotImplementedError


class StatesRule(SparseRule):
    """Kept states of kept channels of A_log (E, N): `difference` is (channels, states)."""

    def select(self, scores: Tensor) -> Tensor:
        """Keep the channels and states with the largest scores (E, N); of equal ones the first.

        Returns:
            The kept channels (k,), ascending.
        """
        num_channels, num_states = self.difference.shape
        channels = _largest(scores.sum(1), num_channels)
        states = _largest(scores[channels], num_states)
        self.places.copy_((channels[:, None] * scores.shape[1] + states).flatten())
        return channels

    def misplaced(self, places: Tensor) -> str | None:
        num_channels, num_states = self.difference.shape
        channels = places.view(num_channels, num_states) // self.shape[1]
        if (channels == channels[:, :1]).all() and (channels[:, 0].diff() > 0).all():
            return None
        return f"are not {num_states} states of each of {num_channels} channels"


class ColumnsRule(SparseRule):
    """Kept columns of rows of x_proj (rows, E): `difference` is (rows, channels)."""

    def __init__(self, weight: Tensor, channels: Tensor) -> None:
        super().__init__(weight, len(weight), len(channels))
        self.select(channels)

    def select(self, channels: Tensor) -> None:
        """Keep the columns of these channels (k,)."""
        rows = torch.arange(self.shape[0], device=channels.device)
        self.places.copy_((rows[:, None] * self.shape[1] + channels).flatten())

    def misplaced(self, places: Tensor) -> str | None:
        rows = torch.arange(self.shape[0], device=places.device)
        columns = places.view(self.difference.shape) - rows[:, None] * self.shape[1]
        if (columns == columns[0]).all() and (columns >= 0).all() and (columns < self.shape[1]).all():
            return None
        return f"are not the same {columns.shape[1]} columns of each of {columns.shape[0]} rows"


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest scores along the last dimension, ascending."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def find_scores(
    states: Mapping[str, StatesRule],
    columns: Sequence[ColumnsRule],
    batches: TrainingBatches,
    by_gradient: bool,
    steps: int,
    lr: float,
) -> dict[str, Tensor]:
    """Scores (E, N) of the entries of every A_log, from training batches.

    They are the squared changes of A_log after some updates in which all of it trains, beside what the other
    methods of the adapter train; afterwards everything is as it was.

    Args:
        states: the rules for A_log by the path of their site.
        columns: the method's other rules, which rest meanwhile.
        batches: the training batches.
        by_gradient: nothing is updated, and the scores are the squared gradients of A_log, summed over as
            many batches.
        steps: number of updates, or of batches.
        lr: learning rate of the updates.

    Raises:
        ValueError: there are too few batches, or a loss is not finite.
    """
    with _trials([*states.values()], columns) as trials:
        if by_gradient:
            for run in batches.take(steps):
                run()
            found = [trial.grad for trial in trials]
        else:
            with batches.warmed_up(steps, lr):
                found = [trial.detach().clone() for trial in trials]
    return {path: value.square() for path, value in zip(states, found, strict=True) if value is not None}


@contextmanager
def _trials(states: Sequence[StatesRule], columns: Sequence[ColumnsRule]) -> Iterator[list[nn.Parameter]]:
    """Within the block the whole of every A_log trains, by the tensors that are given, and nothing else of
    the method."""
    resting = [rule.difference for rule in (*states, *columns)]
    trials = [nn.Parameter(rule.difference.new_zeros(rule.shape)) for rule in states]
    for difference in resting:
        difference.requires_grad_(False)
    for rule, trial in zip(states, trials, strict=True):
        rule.trial = trial
    try:
        yield trials
    finally:
        for rule in states:
            rule.trial = None
        for difference in resting:
            difference.requires_grad_(True)
