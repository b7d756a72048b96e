"""The notebooks of the repository as pages, with what they have shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGES = ("image/png", "image/jpeg")
"""Kinds of outputs that are pictures."""


def page(path: Path) -> str:
    """A notebook as Markdown. Pictures are inside it, so that the page needs nothing else."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"````python\n{source}\n````"
    for output in cell["outputs"]:
        yield _output(output)


def _output(output: dict[str, Any]) -> str:
    if "text" in output:
        return f"````text\n{''.join(output['text']).rstrip()}\n````"
    (kind, content), *_ = output["data"].items()
    text = "".join(content)
    if kind in IMAGES:
        return f'<img alt="" src="data:{kind};base64,{text}">'
    # A blank line would end the block of HTML.
    return "".join(text.splitlines()) if kind == "text/html" else f"````text\n{text}\n````"
