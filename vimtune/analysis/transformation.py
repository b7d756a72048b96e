"""T = pinv(W) W' of the adapted projectors (Ham et al. 2025, arXiv 2411.15224): is it near to diagonal?

Shape letters: O rows (outputs) and I columns (inputs) of a weight W, r its rank.

What the pseudo-inverse means. T (I x I) is the transformation of the inputs by which W comes nearest to W':
it minimises ||W T - W'||, and is the smallest such T.

- W of full column rank (r = I, as in_proj, which has more rows than columns): T is unique, and W' = W gives
  exactly the identity. W has fewer directions of output than W': what of the change lies beside them (O > r)
  no T reaches. `explained` is the share of the change that T does reach; a random change has r / O of it.
- r < I (as out_proj): any change can be reached, by many T. The smallest of them is no identity even for
  W' = W: it is the projection on the row space of W, with r / I on average on the diagonal. The T that is
  *nearest to the identity* is I + pinv(W) (W' - W); where r = I the two are the same. Statements about
  "near the identity" are about this one.

Near the identity is not yet diagonal: any small change gives a T near the identity, a random one, too. So
each number stands beside that of random changes of the same size, and the change of T alone, pinv(W) (W' -
W), is asked how much of it lies on the diagonal (`vimtune.analysis.diagonal`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vimtune.analysis.diagonal import DiagonalShare, diagonal_share
from vimtune.analysis.drawing import draw_concentration, plain_numbers
from vimtune.analysis.parameters import PROJECTORS, changed_projectors
from vimtune.analysis.subject import NotApplicable, Subject
from vimtune.pages.section import Picture, Section, Table
from vimtune.pages.style import picture_style

CONTROLS = 4
"""Random changes with which a change is compared."""
SHOWN = 48
"""Rows and columns of T that the picture shows."""
PARTS = 3
"""Layers whose T the picture shows."""


@dataclass(frozen=True)
class DiagonalNumbers:
    """A transformation in numbers."""

    diagonal_mean: float
    """Mean of T_ii."""
    diagonal_std: float
    """Standard deviation of T_ii."""
    off_diagonal_mean: float
    """Mean of |T_ij| for i != j."""
    off_diagonal_energy: float

    @classmethod
    def of(cls, transformation: Tensor) -> DiagonalNumbers:
        """Those of a square matrix."""
        diagonal = transformation.diagonal()
        size = len(diagonal)
        total = transformation.square().sum()
        beside = transformation.abs().sum() - diagonal.abs().sum()
        return cls(
            float(diagonal.mean()),
            float(diagonal.std()),
            float(beside / max(size * (size - 1), 1)),
            float(1 - diagonal.square().sum() / total),
        )


@dataclass(frozen=True)
class Transformation:
    """What turns a weight into another one, by its inputs."""

    rank: int
    """r."""
    condition: float
    """Largest over smallest singular value that is not 0."""
    relative_change: float
    """||W' - W|| / ||W||."""
    plain: Tensor
    """pinv(W) W', (I, I)."""
    nearest: Tensor
    """I + pinv(W) (W' - W), (I, I)."""
    explained: float
    """Share of ||W' - W||^2 that a T reaches."""
    by_columns: float
    """Share of ||W' - W||^2 that a factor for each column reaches, which is a diagonal T; by chance 1 / O."""
    by_rows: float
    """Share of ||W' - W||^2 that a factor for each row reaches, the s of ProDiaL; by chance 1 / I."""


class PseudoInverse(NamedTuple):
    """The Moore-Penrose inverse of a weight W."""

    value: Tensor
    """pinv(W), (I, O), in double precision."""
    rank: int
    """r."""
    condition: float
    """Largest over smallest singular value that is not 0."""


def pseudo_inverse(weight: Tensor) -> PseudoInverse:
    """The inverse of W (O, I).

    Singular values below eps max(O, I) times the largest one, with the eps of fp32, in which weights are
    kept, count as 0.
    """
    left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = sizes > torch.finfo(torch.float32).eps * max(weight.shape) * sizes.max()
    rank = int(kept.sum())
    if rank == 0:
        return PseudoInverse(torch.zeros(weight.shape[::-1], dtype=torch.double), 0, float("nan"))
    left, sizes, right = left[:, kept], sizes[kept], right[kept]
    return PseudoInverse((right.T / sizes) @ left.T, rank, float(sizes[0] / sizes[-1]))


def transformation_of(
    weight: Tensor, changed: Tensor, inverse: PseudoInverse | None = None
) -> Transformation:
    """T of W (O, I) and W' (O, I), which differ; computed in double precision on the CPU.

    `inverse` is that of W, if it is at hand.
    """
    weight, changed = weight.double().cpu(), changed.double().cpu()
    change = changed - weight
    inverse = inverse or pseudo_inverse(weight)
    moved = inverse.value @ change
    energy = change.square().sum()
    return Transformation(
        rank=inverse.rank,
        condition=inverse.condition,
        relative_change=float(change.norm() / weight.norm()),
        plain=inverse.value @ changed,
        nearest=torch.eye(weight.shape[1], dtype=torch.double) + moved,
        explained=float((weight @ moved).square().sum() / energy),
        by_columns=_reached(weight, change, 0, energy),
        by_rows=_reached(weight, change, 1, energy),
    )


def _reached(weight: Tensor, change: Tensor, dim: int, energy: Tensor) -> float:
    """Share of a change that factors reach, one for each slice of W along `dim`, by least squares."""
    sizes = weight.square().sum(dim)
    products = (weight * change).sum(dim).square()
    return float(torch.where(sizes > 0, products / sizes, 0.0).sum() / energy)


def random_change(shape: Sequence[int], size: float, seed: int) -> Tensor:
    """Independent normal numbers in the place of W' - W, of the same size ||W' - W||."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return noise * (size / float(noise.norm()))


@dataclass(frozen=True)
class Measured:
    """A projector of a layer."""

    layer: int
    name: str
    shape: tuple[int, int]
    found: Transformation
    change: DiagonalShare
    """Of the squares of `found.nearest` - I."""
    control_energy: float
    """Off-diagonal energy of the nearest T of random changes of the same size, their mean."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.found
        return {
            "layer": self.layer,
            "projector": self.name,
            "shape": list(self.shape),
            "rank": found.rank,
            "condition": found.condition,
            "relative_change": found.relative_change,
            "T_det": asdict(DiagonalNumbers.of(found.plain)),
            "T_nearest": asdict(DiagonalNumbers.of(found.nearest)),
            "T_nearest_of_random_changes": {"off_diagonal_energy": self.control_energy},
            "change_of_T": self.change.to_dict(),
            "explained": found.explained,
            "explained_by_chance": found.rank / self.shape[0],
            "by_columns": found.by_columns,
            "by_columns_by_chance": 1 / self.shape[0],
            "by_rows": found.by_rows,
            "by_rows_by_chance": 1 / self.shape[1],
        }


def measure(layer: int, name: str, weight: Tensor, changed: Tensor) -> Measured | None:
    """One projector with its controls; None where the change lies beside all that a T reaches."""
    inverse = pseudo_inverse(weight.cpu())
    found = transformation_of(weight, changed, inverse)
    identity = torch.eye(weight.shape[1], dtype=torch.double)
    share = diagonal_share((found.nearest - identity).square(), seed=layer)
    if share is None:
        return None
    size = found.relative_change * float(weight.double().norm())
    controls = (random_change(weight.shape, size, seed) for seed in range(CONTROLS))
    energy = statistics.mean(
        DiagonalNumbers.of(identity + inverse.value @ change).off_diagonal_energy for change in controls
    )
    return Measured(layer, name, (weight.shape[0], weight.shape[1]), found, share, energy)


def analyze(subject: Subject) -> Section:
    """T of every projector that training has changed."""
    changed = changed_projectors(subject.weights_before, subject.weights_after)
    measured = [each for place in changed if (each := measure(*place)) is not None]
    if not measured:
        raise NotApplicable("no in_proj and no out_proj has changed")
    rows = [_row(each) for each in measured]
    findings = [
        _finding(name, own) for name in PROJECTORS if (own := [m for m in measured if m.name == name])
    ]
    return Section(
        title="T = pinv(W) W' of the projectors",
        explanation="T is the transformation of the inputs by which a projector's weight W comes nearest to "
        "its weight W' after training. Where W has fewer rows than columns, many T give the same W'; pinv "
        "takes the smallest, whose diagonal is r / I on average even without any training, and the columns "
        "`near` are about the one nearest to the identity, I + pinv(W) (W' - W). `random` is the same for "
        "random changes of the same size: any small change leaves T near the identity. What tells a diagonal "
        "change from any other is the concentration of the change of T on its diagonal: 1 by chance (columns "
        "in random order), I for a diagonal one; `excess` is the concentration beyond what the sizes of rows "
        "and columns explain. `columns` and `rows` are the shares of W' - W that a factor for each column (a "
        "diagonal T) or each row (the s of ProDiaL) reaches, as multiples of chance.",
        findings=findings,
        numbers={"projectors": [each.to_dict() for each in measured]},
        tables=[Table("By layer", _HEADING, rows)],
        pictures=[
            Picture(
                f"T nearest to the identity, minus the identity: the first {SHOWN} rows and columns, in the "
                "first, the middle and the last layer that has changed. Logarithmic colours on both sides of "
                "0.",
                _draw_parts(measured),
            ),
            Picture(
                "The change of T of all layers: its entries on the diagonal, and those beside it, as "
                "densities.",
                _draw_distribution(measured),
            ),
            Picture(
                "Concentration of the change of T on its diagonal, as a multiple of chance. The dotted line "
                "is chance, the pale bands two standard deviations around it; thin lines are what the sizes "
                "of rows and columns explain.",
                _draw_concentration(measured),
            ),
        ],
    )


_HEADING = (
    "layer", "change", "T diagonal", "off-diagonal", "near: off energy", "random", "concentration", "excess",
    "explained", "chance", "columns", "rows",
)  # fmt: skip
"""Columns of the table."""


def _row(each: Measured) -> list[str]:
    plain, near, found = (
        DiagonalNumbers.of(each.found.plain),
        DiagonalNumbers.of(each.found.nearest),
        each.found,
    )
    return [
        f"{each.layer} {each.name}",
        f"{100 * found.relative_change:.2f} %",
        f"{plain.diagonal_mean:.4f} ± {plain.diagonal_std:.4f}",
        f"{plain.off_diagonal_mean:.5f}",
        f"{near.off_diagonal_energy:.2e}",
        f"{each.control_energy:.2e}",
        f"{each.change.concentration:.2f} ± {each.change.spread / each.change.chance:.2f}",
        f"{each.change.excess:.2f}",
        f"{found.explained:.3f}",
        f"{found.rank / each.shape[0]:.3f}",
        f"{found.by_columns * each.shape[0]:.1f}",
        f"{found.by_rows * each.shape[1]:.1f}",
    ]


def _finding(name: str, own: Sequence[Measured]) -> str:
    mean = statistics.mean
    numbers = [DiagonalNumbers.of(each.found.nearest) for each in own]
    return (
        f"{name}: T nearest to the identity has {mean(n.diagonal_mean for n in numbers):.4f} on the "
        f"diagonal and {mean(n.off_diagonal_mean for n in numbers):.5f} beside it (mean of {len(own)} "
        f"layers); {100 * mean(n.off_diagonal_energy for n in numbers):.3f} % of its squares lie off the "
        "diagonal, of random changes of the same size "
        f"{100 * mean(each.control_energy for each in own):.3f} %. The change of T has "
        f"{mean(each.change.concentration for each in own):.2f} times the diagonal share of chance "
        f"({mean(each.change.excess for each in own):.2f} times what sizes of rows and columns explain). T "
        f"reaches {100 * mean(each.found.explained for each in own):.0f} % of the change (chance "
        f"{100 * mean(each.found.rank / each.shape[0] for each in own):.0f} %)."
    )


def _by_name(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    groups = {name: [each for each in measured if each.name == name] for name in PROJECTORS}
    return {name: own for name, own in groups.items() if own}


def _draw_parts(measured: Sequence[Measured]) -> Figure:
    groups = _by_name(measured)
    with picture_style():
        figure = Figure(figsize=(3.1 * PARTS + 0.8, 3.0 * len(groups)), layout="constrained")
        grid = figure.subplots(len(groups), PARTS, squeeze=False)
        for line, (name, own) in zip(grid, groups.items(), strict=True):
            chosen = [own[round(part * (len(own) - 1) / (PARTS - 1))] for part in range(PARTS)]
            changes = [each.found.nearest - torch.eye(each.shape[1], dtype=torch.double) for each in chosen]
            parts = [change[:SHOWN, :SHOWN] for change in changes]
            top = max(float(part.abs().max()) for part in parts) or 1.0
            norm = SymLogNorm(linthresh=top / 100, vmin=-top, vmax=top)
            for axes, each, part in zip(line, chosen, parts, strict=True):
                picture = axes.imshow(part.numpy(), cmap="RdBu_r", norm=norm)
                axes.set_title(f"{name}, layer {each.layer}", fontsize=10)
                axes.set_xticks([])
                axes.set_yticks([])
            bar = figure.colorbar(picture, ax=list(line), shrink=0.8, format=lambda value, _: f"{value:.1g}")
            bar.set_ticks([-top, -top / 10, 0, top / 10, top])
            bar.minorticks_off()
        return figure


def _draw_distribution(measured: Sequence[Measured]) -> Figure:
    groups = _by_name(measured)
    with picture_style():
        figure = Figure(figsize=(4.2 * len(groups), 3.2), layout="constrained")
        for axes, (name, own) in zip(
            figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
        ):
            diagonal = torch.cat([each.found.nearest.diagonal() - 1 for each in own])
            beside = torch.cat([_off_diagonal(each.found.nearest) for each in own])
            reach = max(float(diagonal.abs().quantile(0.995)), float(beside.abs().max()) / 4)
            bins = torch.linspace(-reach, reach, 81).tolist()
            for values, label in ((beside, "beside the diagonal"), (diagonal, "on the diagonal (T - 1)")):
                axes.hist(
                    values.clamp(-reach, reach).numpy(), bins=bins, density=True, alpha=0.6, label=label
                )
            axes.set(title=name, xlabel="entry of the change of T", ylabel="density", yscale="log")
            plain_numbers(axes.yaxis)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure


def _off_diagonal(matrix: Tensor) -> Tensor:
    """The entries beside the diagonal."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def _draw_concentration(measured: Sequence[Measured]) -> Figure:
    return draw_concentration(
        {name: [(each.layer, each.change) for each in own] for name, own in _by_name(measured).items()}
    )
