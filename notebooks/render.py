"""Run the notebooks beside this file and store what they show.

    python notebooks/render.py analysis language                           # these
    python notebooks/render.py photos -p PHOTOS=my/photos -o my-notebooks  # one, with a parameter of your own

A notebook is run from top to bottom in an empty folder by a new kernel. Pictures are stored with at most 256
colours, or as JPEG where photographs are among them. Its outputs name no folders of this machine: the one in
which it works is called `my/folder`, one that a parameter names `my/` with the last part of its name.

Without -o a notebook keeps its own values of the parameters, with which it runs everywhere, and its text says
with which others its outputs were seen. docs/notebooks.md has the commands that made the stored ones.
It needs `pip install -e ".[notebooks,export,text]"`.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
"""Where the notebooks are."""
PARAMETERS = "parameters"
"""Tag of the cell with what a reader may change, as papermill has it."""
TIMEOUT = 600
"""Seconds that a cell may take."""
KEPT = ("image/png", "text/html", "text/markdown", "text/plain")
"""Kinds of outputs that are stored: of each output the first of them that it has."""
QUALITY = 75
"""Quality of pictures, as JPEG counts it."""
MANY_COLORS = 2**13
"""A picture with more colours than this is stored as JPEG: it has photographs in it."""
SILENT = "ignore:IProgress not found"
"""A warning of others that a notebook without widgets would have in its first output."""


def run(path: Path, folder: Path, parameters: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """Run a notebook and return it with its outputs; the file is left as it is.

    Args:
        path: the notebook.
        folder: an empty one, in which it works and keeps its temporary files.
        parameters: values for names of its cell of parameters.

    Raises:
        ValueError: it has no parameter of such a name.
        CellExecutionError: a cell has failed; the message has its code and the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    _set_parameters(notebook, path.name, parameters or {})
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONWARNINGS": SILENT}
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=environment)
    return notebook


def _cell_of_parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell with what a reader may change."""
    return next(cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", []))


def _set_parameters(notebook: nbformat.NotebookNode, name: str, parameters: Mapping[str, Any]) -> None:
    """Give the cell of parameters other values, and leave its comments."""
    cell = _cell_of_parameters(notebook)
    lines = dict(line.split(" = ", 1) for line in cell.source.splitlines() if " = " in line)
    for key, value in parameters.items():
        if key not in lines:
            raise ValueError(f"{name} has no parameter {key}; expected one of {', '.join(sorted(lines))}")
        _, *comment = lines[key].split("  # ", 1)
        lines[key] = "  # ".join([repr(value), *comment])
    cell.source = "\n".join(f"{key} = {value}" for key, value in lines.items())


def tidy(notebook: nbformat.NotebookNode, folder: Path, parameters: Mapping[str, Any] | None = None) -> None:
    """Leave out what differs from run to run and what takes room for nothing.

    Args:
        notebook: with its outputs, which are changed.
        folder: the one in which it ran.
        parameters: what `run` was given; paths among them get other names in the outputs.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    names = {rf"{re.escape(str(folder))}(?:/tmp\w+)?": "my/folder"}
    for value in (parameters or {}).values():
        if isinstance(value, str) and os.path.isabs(value):
            names[re.escape(value)] = f"my/{Path(value).name}"
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = _renamed(names, output.text)
            elif "data" in output:
                kind = next(kind for kind in KEPT if kind in output.data)
                content, output.metadata = output.data[kind], {}
                if kind == "image/png":
                    output.data = _smaller(content)
                else:
                    output.data = {kind: _renamed(names, content)}


def _renamed(names: Mapping[str, str], text: str) -> str:
    """A text with other names for folders, by patterns; the right border of a table stays where it is."""
    lines = []
    for line in text.split("\n"):
        renamed = line
        for pattern, name in names.items():
            renamed = re.sub(pattern, name, renamed)
        lines.append(f"{renamed[:-1]:<{len(line) - 1}}│" if line.endswith("│") else renamed)
    return "\n".join(lines)


def _joined(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs of which those that are printed one after the other are one."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and "text" in output and output.get("name") == found[-1].get("name"):
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _smaller(encoded: str) -> dict[str, str]:
    """A PNG file in base64 as an output: with a palette, or as JPEG where photographs are in it."""
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    file = io.BytesIO()
    if picture.getcolors(MANY_COLORS) is None:
        kind = "image/jpeg"
        picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    else:
        kind = "image/png"
        picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return {kind: base64.b64encode(file.getvalue()).decode("ascii")}


def parse_parameter(text: str) -> tuple[str, Any]:
    """Name and value of "NAME=VALUE". A notebook works in another folder, so a path becomes absolute."""
    name, _, value = text.partition("=")
    return name, str(Path(value).resolve()) if os.path.exists(value) else yaml.safe_load(value)


def main() -> None:
    """The command."""
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help=f"of {', '.join(names)} [all]")
    parser.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter, in YAML",
    )
    parser.add_argument(
        "-o", dest="output", type=Path, default=FOLDER, metavar="DIR", help="where they are stored [here]"
    )
    given = parser.parse_args()
    if unknown := set(given.notebooks) - set(names):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    parameters = dict(map(parse_parameter, given.parameters))
    for name in given.notebooks or names:
        started = time.monotonic()
        source, path = FOLDER / f"{name}.ipynb", given.output / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(source, Path(folder), parameters)
            tidy(notebook, Path(folder), parameters)
        if path.resolve() == source.resolve():
            own = _cell_of_parameters(nbformat.read(source, as_version=4))
            _cell_of_parameters(notebook).source = own.source
        given.output.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        print(f"{path}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
