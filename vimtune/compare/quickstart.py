"""The comparison that `python train_vim.py` makes without any flag: transfer, on data that are embedded."""

from __future__ import annotations

from pathlib import Path

from vimtune.compare.command import compare
from vimtune.compare.plan import load_plan
from vimtune.compare.results import Row
from vimtune.compare.tables import CURVES, best_of
from vimtune.console import build_console, print_line
from vimtune.run_folder import RunFolder, create_unused

PLAN = Path(__file__).with_name("quickstart.yaml")
"""The plan of the comparison."""


def run_quickstart() -> int:
    """Make the comparison in a new folder in `runs/`, and say where its pictures are; returns the exit code.

    Raises:
        ValueError: the folder cannot be made or written.
        Interrupted: Ctrl-C or SIGTERM; the comparison says how it is continued.
    """
    folder = create_unused(Path("runs") / "quickstart")
    rows, failed = compare(load_plan(PLAN, {}), folder)
    for line in _what_to_look_at(rows, folder):
        print_line(build_console(), line, wrap=False)
    return 1 if failed else 0


def _what_to_look_at(rows: list[Row], folder: Path) -> list[str]:
    """Lines about the pictures, the adapter of the best run, and what comes next."""
    lines = [f"scores in training: {folder / CURVES}"]
    for row in best_of(rows)[:1]:
        run = RunFolder(Path(row.results[0].report.run_dir))
        lines += [
            f"right and wrong answers of {row.method}: {run.path / 'examples.png'}",
            f"its adapter: {run.adapter}",
        ]
    return [*lines, "next, your own images: python train_vim.py --dataset folder --data-dir my/images"]
