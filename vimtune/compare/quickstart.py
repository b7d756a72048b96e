"""The comparison that `python train_vim.py` makes without any flag: transfer, on data that are embedded."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from vimtune.compare.command import compare
from vimtune.compare.plan import PLAN_FILE, Plan, load_plan
from vimtune.compare.results import Row, best_of
from vimtune.compare.tables.files import CURVES
from vimtune.console import build_console, print_line
from vimtune.run_folder import RunFolder, is_held, last_used, unused_folder

PLAN = Path(__file__).with_name("quickstart.yaml")
"""The plan of the comparison."""
FOLDER = Path("runs") / "quickstart"
"""Its folder, the first time."""


def run_quickstart() -> int:
    """Make the comparison in a new folder in `runs/`, or go on with the last one if that was stopped, and say
    where its pictures are; returns the exit code.

    Raises:
        ValueError: the folder cannot be made or written.
        Interrupted: Ctrl-C or SIGTERM; the comparison says how it is continued.
    """
    plan = load_plan(PLAN, {})
    stopped = _stopped(plan)
    if stopped is not None:
        print_line(build_console(), f"going on with what was stopped: {stopped}")
    with ExitStack() as stack:
        folder = stopped or stack.enter_context(unused_folder(FOLDER))
        rows, failed = compare(plan, folder)
    for line in _what_to_look_at(rows, folder):
        print_line(build_console(), line, wrap=False)
    return 1 if failed else 0


def _stopped(plan: Plan) -> Path | None:
    """The folder of the last comparison if that is of the same plan, unfinished, and nobody works there."""
    folder = last_used(FOLDER)
    if folder is None or not (folder / PLAN_FILE).is_file() or is_held(RunFolder(folder)):
        return None
    try:
        same = load_plan(folder / PLAN_FILE, {}) == plan
    except ValueError:  # It is of another version.
        return None
    finished = all(RunFolder(folder / cell.path).report.is_file() for cell in plan.all_cells())
    return folder if same and not finished else None


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
