"""The notebooks run from top to bottom, with less data and fewer epochs than readers see (`SMALLER`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted(Path(__file__).parent.parent.joinpath("notebooks").glob("*.ipynb"))
SMALLER = {
    "quickstart": {
        '"train_per_species": 32': '"train_per_species": 4',
        '"val_per_species": 8': '"val_per_species": 2',
        '"test_per_species": 16': '"test_per_species": 2',
        '"epochs": 3': '"epochs": 1',
    },
    "language": {
        "range(1600)": "range(40)",
        "(800)": "(40)",
        "(400)": "(20)",
        "(40)\nright": "(4)\nright",
        "epochs=2": "epochs=1",
        "epochs=6": "epochs=1",
        '"epochs": 6': '"epochs": 1',
    },
}
"""What a test replaces in the code of a notebook."""


def cells_of(path: Path) -> list[dict]:
    """The cells of code of a notebook."""
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
    if path.stem == "language":
        pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is found anew
    namespace = {"__name__": "__main__"}
    missing = set(SMALLER[path.stem])
    for cell in cells_of(path):
        code = "".join(cell["source"])
        for shown, smaller in SMALLER[path.stem].items():
            if shown in code:
                code = code.replace(shown, smaller)
                missing.discard(shown)
        exec(compile(code, f"{path.name}:{cell['id']}", "exec"), namespace)
    assert not missing, "the notebook says it otherwise now"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_was_seen_in_one_run(path):
    """Without outputs a notebook was never run; with them, once and from top to bottom."""
    cells = cells_of(path)
    counts = [cell["execution_count"] for cell in cells]
    assert counts in ([None] * len(cells), list(range(1, len(cells) + 1)))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"} and "error" not in kinds
    assert counts[0] is not None or not kinds
