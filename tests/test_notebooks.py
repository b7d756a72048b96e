"""The notebooks run from top to bottom, with fewer images and epochs than their readers see (`SMALLER`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted(Path(__file__).parent.parent.joinpath("notebooks").glob("*.ipynb"))
SMALLER = {
    '"train_per_species": 32': '"train_per_species": 4',
    '"val_per_species": 8': '"val_per_species": 2',
    '"test_per_species": 16': '"test_per_species": 2',
    '"epochs": 3': '"epochs": 1',
}
"""What a test replaces in the code of a notebook."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    replaced = set()
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit notebooks without outputs"
            code = "".join(cell["source"])
            for shown, smaller in SMALLER.items():
                if shown in code:
                    code = code.replace(shown, smaller)
                    replaced.add(shown)
            exec(compile(code, f"{path.name}:{cell['id']}", "exec"), namespace)
    assert replaced == set(SMALLER), "the notebook says it otherwise now"
