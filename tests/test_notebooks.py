"""The notebooks: what is stored was seen in one run, they keep to public names, and they run.

Running them is slow, although it is done with less data and fewer epochs (`SMALLER`):

    pytest -m slow tests/test_notebooks.py
"""

from __future__ import annotations

import ast
import base64
import importlib
import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEW = {"species": 3, "train_per_species": 6, "val_per_species": 2, "test_per_species": 2}
SMALLER: dict[str, dict[str, Any]] = {
    "analysis": {"SIZES": FEW, "EPOCHS": 1, "RATES": [1e-3]},
    "equal_budget": {"SIZES": FEW, "EPOCHS": 1, "RATES": [1e-3], "SEEDS": [0]},
    "folder_to_onnx": {"SPECIES": 3, "IMAGES": 8, "EPOCHS": 1, "RATES": [1e-3]},
    "language": {"STORIES": 40, "TEXTS": 40, "EPOCHS": 1, "RATES": [5e-3]},
    "photos": {"SPECIES": 3, "TRAIN_IMAGES": 6, "EPOCHS": 1, "RATES": [1e-3]},
    "several_adapters": {"SIZES": FEW, "EPOCHS": 1, "RATES": [1e-3]},
}
"""The parameters with which a test runs a notebook."""
MOST, MOST_OF_ALL = 700_000, 2_500_000
"""Bytes of a stored notebook, and of all of them."""


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of code of a notebook."""
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def render() -> ModuleType:
    """The script that runs and stores them."""
    for package in ("nbclient", "ipykernel", "nbformat"):
        pytest.importorskip(package, reason=f"no {package}")
    spec = importlib.util.spec_from_file_location("render", ROOT / "notebooks" / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == "language":
        pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    if path.stem == "folder_to_onnx":
        pytest.importorskip("onnxscript", reason="no onnxscript")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = render.run(path, tmp_path, SMALLER[path.stem])
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_was_seen_in_one_run(path: Path) -> None:
    cells = cells_of(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    warnings = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert all(warning.startswith("left out corrupt image") for warning in warnings), "no warnings of others"
    texts = [
        "".join(text)
        for output in outputs
        for kind, text in {**output.get("data", {}), "stream": output.get("text", "")}.items()
        if not kind.startswith("image/")
    ]
    assert not [text for text in texts if re.search(r"/tmp/(?!work\b)|/home/|/root/|\x1b", text)]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert sum(kind.startswith("image/") for kind in kinds) >= 2, "there is something to look at"


def test_what_is_stored_is_small() -> None:
    sizes = {path.stem: path.stat().st_size for path in NOTEBOOKS}
    assert max(sizes.values()) < MOST and sum(sizes.values()) < MOST_OF_ALL, sizes


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_public_names_are_used(path: Path) -> None:
    import vimtune

    for cell in cells_of(path):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vimtune."):
                module = importlib.import_module(node.module or "")
                public = getattr(
                    module, "__all__", [name for name in vars(module) if not name.startswith("_")]
                )
                assert {alias.name for alias in node.names} <= set(public), node.module
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "vimtune" or node.attr in vimtune.__all__, node.attr
                assert not node.attr.startswith("_"), node.attr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_where_a_reader_looks_for_them(path: Path) -> None:
    first, *others = cells_of(path)
    assert first["metadata"]["tags"] == ["parameters"] and not any(cell["metadata"] for cell in others)
    names = {line.split(" = ")[0] for line in "".join(first["source"]).splitlines()}
    assert set(SMALLER[path.stem]) <= names and all(name.isupper() for name in names)


def test_every_notebook_is_listed() -> None:
    lists = [(ROOT / name).read_text("utf-8") for name in ("docs/notebooks.md", "mkdocs.yml")]
    for path in NOTEBOOKS:
        assert all(path.stem in text for text in lists), path.stem


def test_an_unknown_parameter_is_refused(render: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"photos.ipynb has no parameter EPOCH; expected one of EPOCHS, MODEL"
    ):
        render.run(ROOT / "notebooks" / "photos.ipynb", tmp_path, {"EPOCH": 1})


def test_parameters_on_the_command_line(
    render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["PHOTOS=photos", "RATES=[1.0e-3, 2]", "MODEL=vim_tiny_patch16_224", "PHOTOS=null"]
    found = [
        ("PHOTOS", str(tmp_path / "photos")),
        ("RATES", [1e-3, 2]),
        ("MODEL", "vim_tiny_patch16_224"),
        ("PHOTOS", None),
    ]
    assert [render.parse_parameter(text) for text in given] == found


@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_elsewhere_is_a_notebook_stored_with_other_parameters(
    render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    photos, own, target = tmp_path / "of" / "mine", tmp_path / "notebooks", tmp_path / "stored"
    photos.mkdir(parents=True)
    own.mkdir()
    new, code = render.nbformat.v4, "PHOTOS = None  # a folder\nEPOCHS = 3"
    first = new.new_code_cell(code, metadata={"tags": [render.PARAMETERS]})
    notebook = new.new_notebook(cells=[first, new.new_code_cell("print(PHOTOS, EPOCHS)")])
    render.nbformat.write(notebook, own / "short.ipynb")
    monkeypatch.setattr(render, "FOLDER", own)
    given = ["render.py", "short", "-p", f"PHOTOS={photos}", "-p", "EPOCHS=2"]
    monkeypatch.setattr("sys.argv", [*given, "-o", str(target)] if elsewhere else given)
    render.main()
    first, second = cells_of((target if elsewhere else own) / "short.ipynb")
    assert "".join(second["outputs"][0]["text"]) == "my/mine 2\n"
    expected = f"PHOTOS = {str(photos)!r}  # a folder\nEPOCHS = 2" if elsewhere else code
    assert "".join(first["source"]) == expected


@pytest.mark.parametrize("name", ["folder_to_onnx", "photos"])
def test_photographs_are_stored_where_the_text_says_so(name: str) -> None:
    path = ROOT / "notebooks" / f"{name}.ipynb"
    about = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
    assert "GroceryStoreDataset" in about and "MIT licence" in about
    printed = [out["text"] for cell in cells_of(path) for out in cell["outputs"] if "text" in out]
    texts = "".join(line for lines in printed for line in lines)
    assert "model: vim_nano_patch8_64.tiny_in200" in texts and "generated flowers" not in texts


def test_outputs_are_stored_small_and_without_folders(render: ModuleType, tmp_path: Path) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((200, 200), 80) for _ in range(3)])
    drawn = Image.new("RGB", (200, 200), "red")
    pictures = []
    for image in (noise, drawn):
        file = io.BytesIO()
        image.save(file, "PNG")
        pictures.append(base64.b64encode(file.getvalue()).decode("ascii"))
    new = render.nbformat.v4
    outputs = [
        new.new_output("stream", name="stdout", text=f"in {tmp_path}/tmpab12/run\n│ {tmp_path} │\n"),
        new.new_output("stream", name="stdout", text=f"and {tmp_path}\n"),
        *(new.new_output("display_data", {"image/png": png, "text/plain": "?"}) for png in pictures),
        new.new_output("execute_result", {"text/html": f"<p>{tmp_path}</p>", "text/plain": "?"}),
    ]
    cell = new.new_code_cell("1", outputs=outputs, metadata={"execution": {"began": "now"}})
    notebook = new.new_notebook(cells=[new.new_markdown_cell("text"), cell], metadata={"machine": "mine"})
    render.tidy(notebook, tmp_path)
    printed, *shown = cell.outputs
    first, second, *others = printed.text.splitlines()
    assert [first, *others] == ["in my/folder/run", "and my/folder"]
    assert second.split() == ["│", "my/folder", "│"] and len(second) == len(f"│ {tmp_path} │")
    assert [list(output.data) for output in shown] == [["image/jpeg"], ["image/png"], ["text/html"]]
    assert len(shown[0].data["image/jpeg"]) < len(pictures[0]) / 2
    assert Image.open(io.BytesIO(base64.b64decode(shown[1].data["image/png"]))).mode == "P"
    assert shown[2].data["text/html"] == "<p>my/folder</p>"
    assert cell.metadata == {} and "machine" not in notebook.metadata
    render.nbformat.validate(notebook)
