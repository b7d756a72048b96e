"""The gradient of the loss by T, where W' = W T replaces the weight of a projector, at T = I.

The chain rule gives dL/dT = W^T dL/dW, (I, I), so one backward pass with the weights of the model before
training is enough. ProDiaL is built on the observation that this gradient concentrates on the diagonal (Ham
et al. 2025, arXiv 2411.15224).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vimtune.adapters.manage import head_parameters
from vimtune.analysis.diagonal import DiagonalShare, diagonal_share
from vimtune.analysis.drawing import draw_concentration
from vimtune.analysis.parameters import PROJECTORS, projector_of
from vimtune.analysis.subject import Loss, NotApplicable, Subject
from vimtune.pages.section import Picture, Section, Table
from vimtune.text import counted

Shares = dict[str, list[tuple[int, DiagonalShare]]]
"""What the diagonal has of a gradient, for each layer, by the name of the projector."""


def transformation_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """dL/dT (I, I) at T = I, of W (O, I) and dL/dW (O, I)."""
    return weight.double().T @ gradient.double()


def transformation_gradients(model: nn.Module, losses: Iterable[Loss]) -> Iterator[dict[str, Tensor]]:
    """dL/dT of every projector for each loss, by the path of the weight.

    Raises:
        NotApplicable: the model has no projectors.
    """
    projectors = {path: weight for path, weight in model.named_parameters() if projector_of(path) is not None}
    if not projectors:
        raise NotApplicable("the model has no in_proj and no out_proj")
    model.requires_grad_(False)
    for weight in projectors.values():
        weight.requires_grad_(True)
    for loss in losses:
        gradients = torch.autograd.grad(loss(model), list(projectors.values()))
        yield {
            path: transformation_gradient(weight.detach(), gradient)
            for (path, weight), gradient in zip(projectors.items(), gradients, strict=True)
        }


def analyze(subject: Subject) -> Section:
    """The share of the diagonal in the squared gradients of training batches."""
    squares: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    count = 0
    for gradients in transformation_gradients(with_head_of(subject), subject.losses()):
        count += 1
        for path, own in gradients.items():
            squares[path] = squares.get(path, torch.zeros_like(own)) + own.square()
            totals[path] = totals.get(path, torch.zeros_like(own)) + own
    if not count:
        raise NotApplicable("it needs training batches: name a data set with --dataset")
    single = _shares(squares)
    summed = _shares({path: total.square() for path, total in totals.items()})
    return Section(
        title="The gradient of T at the identity",
        explanation="With W' = W T in the place of each projector's weight, dL/dT = W^T dL/dW at T = I: "
        "weights before training, the head of the trained model, augmented training batches of the run. "
        "The table has the concentration of squared gradients on the diagonal, as a multiple of chance "
        "(columns in random order: 1; all of it on the diagonal: I), for the gradients of single batches "
        "and for that of all of them together; `excess` is what is left beyond the sizes of rows and "
        "columns.",
        findings=[_finding(name, own, count) for name, own in single.items()],
        numbers={
            "batches": count,
            "projectors": [
                {
                    "layer": layer,
                    "projector": name,
                    "single_batches": share.to_dict(),
                    "all_batches": all_of.to_dict(),
                }
                for name, own in single.items()
                for (layer, share), (_, all_of) in zip(own, summed[name], strict=True)
            ],
        },
        tables=[_table(single, summed)],
        pictures=[
            Picture(
                "Concentration of the squared gradients of single batches on the diagonal. The dotted line "
                "is chance, the pale bands two standard deviations around it; thin lines are what the "
                "sizes of rows and columns explain.",
                draw_concentration(single),
            )
        ],
    )


def with_head_of(subject: Subject) -> nn.Module:
    """A copy of the model before training with the head that it has afterwards, in evaluation mode.

    Raises:
        NotApplicable: the two heads are for other numbers of classes.
    """
    model = copy.deepcopy(subject.before)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for path in head_parameters(model):
            value = subject.weights_after[path]
            if own[path].shape != value.shape:
                raise NotApplicable(
                    "the head of the trained model is for other classes than those of the data"
                )
            own[path].copy_(value)
    return model


def _shares(squares: dict[str, Tensor]) -> Shares:
    """Those of all projectors, by name and layer; without those whose gradient is 0."""
    found: Shares = {name: [] for name in PROJECTORS}
    for path, own in squares.items():
        place = projector_of(path)
        assert place is not None, "only these were taken"
        if (share := diagonal_share(own, seed=place[0])) is not None:
            found[place[1]].append((place[0], share))
    return {name: own for name, own in found.items() if own}


def _table(single: Shares, summed: Shares) -> Table:
    """Single batches beside all of them, a row for each projector."""
    return Table(
        "By layer",
        ["layer", "share", "chance", "concentration", "excess", "all batches", "excess"],
        [
            [
                f"{layer} {name}",
                f"{100 * share.share:.2f} %",
                f"{100 * share.chance:.2f} %",
                f"{share.concentration:.2f} ± {share.spread / share.chance:.2f}",
                f"{share.excess:.2f}",
                f"{all_of.concentration:.2f} ± {all_of.spread / all_of.chance:.2f}",
                f"{all_of.excess:.2f}",
            ]
            for name, own in single.items()
            for (layer, share), (_, all_of) in zip(own, summed[name], strict=True)
        ],
    )


def _finding(name: str, own: list[tuple[int, DiagonalShare]], count: int) -> str:
    concentrations = [share.concentration for _, share in own]
    return (
        f"{name}: the diagonal has {statistics.mean(concentrations):.2f} times its share by chance in the "
        f"squared gradient of T (from {min(concentrations):.2f} to {max(concentrations):.2f} in {len(own)} "
        f"layers, {counted(count, 'batches')}), {statistics.mean(share.excess for _, share in own):.2f} "
        "times what the sizes of rows and columns explain."
    )
