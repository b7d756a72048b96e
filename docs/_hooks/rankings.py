"""The order of the methods here beside that of their papers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import evidence
from markdown_tables import Table, read_tables, write_table

CONFIGS = evidence.BENCHMARKS.parent / "configs" / "README.md"
"""The document with the published scores."""


@dataclass(frozen=True)
class Published:
    """A table of a paper."""

    paper: str
    """What is said about it."""
    title: str
    """How the heading in `CONFIGS` begins below which it stands."""
    columns: Mapping[str, str]
    """Its columns by our data sets; "" is one with means already, to which those over all of ours belong."""
    names: Mapping[str, str]
    """Its rows by our methods, where they are called otherwise."""


TABLES = (
    Published(
        "ProDiaL (arXiv 2411.15224): Vim-tiny with ImageNet weights, images of 224 pixels",
        "paper.yaml",
        {"cars": "cars/, %", "caltech": "caltech/, %", "flowers": "flowers/, %"},
        {"ft": "ft_both", "lora": "lora_both", "dora": "dora_both", "prodial_paper": "prodial_both"},
    ),
    Published(
        "MambaPEFT (arXiv 2411.03855): Vim-small with ImageNet weights, the 19 tasks of VTAB-1k",
        "mambapeft.yaml",
        {"": "average, %"},
        {"lora+memba": "lora_memba"},
    ),
)
NATIVE = "native"
"""The file of results with every method at its own size."""


def rankings() -> str:
    """A section with a table for each paper; empty where there are no scores of ours."""
    scores = evidence.scores_of(NATIVE)
    if scores is None:
        return ""
    parts = [part for published in TABLES for part in _compared(scores, published)]
    return "\n\n".join(["## Beside the papers' order", EXPLANATION, *parts]) if parts else ""


EXPLANATION = (
    "Methods that both have, by their mean scores. Models, images and data sets are others, so that the "
    "scores do not compare; their order may."
)


def _compared(scores: evidence.Scores, published: Published) -> Iterator[str]:
    theirs = _means(published, scores)
    ours = {
        method: mean
        for method in scores.by_method
        if method in theirs and (mean := scores.mean(method, _data(published, scores))) is not None
    }
    if len(ours) < 3:
        return
    ours = dict(sorted(ours.items(), key=lambda item: -item[1]))
    order = sorted(ours, key=lambda method: -theirs[method])
    rows = [
        [
            f"`{method}`",
            f"{ours[method]:.1f}",
            str(rank),
            f"{theirs[method]:.1f}",
            str(order.index(method) + 1),
        ]
        for rank, method in enumerate(ours, 1)
    ]
    over = ", ".join(_data(published, scores))
    yield f"{published.paper}. Here: means over {over}."
    yield write_table(["method", "here, %", "rank", "published, %", "rank there"], rows)
    correlation = statistics.correlation(range(len(order)), [order.index(method) for method in ours])
    yield f"Rank correlation (Spearman): {correlation:.2f}."


def _data(published: Published, scores: evidence.Scores) -> list[str]:
    """Our data sets whose mean is compared."""
    return [name for name in scores.data if "" in published.columns or name in published.columns]


def _means(published: Published, scores: evidence.Scores) -> dict[str, float]:
    """The published means by our names of the methods."""
    table = _table(published)
    data = _data(published, scores)
    columns = [
        table.header.index(title) for name, title in published.columns.items() if not name or name in data
    ]
    rows = {row[0]: [row[column] for column in columns] for row in table.rows}
    ours = {published.names.get(method, method): method for method in scores.by_method}
    return {
        ours[name]: statistics.mean(map(float, cells))
        for name, cells in rows.items()
        if name in ours and cells and evidence.NONE not in cells
    }


def _table(published: Published) -> Table:
    tables = read_tables(CONFIGS.read_text(encoding="utf-8"))
    return next(table for table in tables if table.title.startswith(published.title))
