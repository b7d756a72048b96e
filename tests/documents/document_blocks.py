"""The blocks of code in the documents, and the commands among them.

A block stands between two fences, lines that begin with three backticks or more. The first one names the
language; a block without one has commands, one a line. A block that no test may run has a line

    <!-- not run: REASON -->

right above it. Browsers do not show it, those who edit the page see it.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "configs/README.md", "weights/*.md", "docs/**/*.md")
"""Patterns of the documents. What benchmarks/ reports has been run once, with what it reports."""
NOT_RUN = re.compile(r"\s*<!--\s*not run:\s*(.*?)\s*-->\s*")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    """The document, from the root of the repository."""
    line: int
    """Number of the line with the first fence."""
    language: str
    """What that line says, "" for commands."""
    body: str
    """The lines between the fences."""
    not_run: str | None
    """The reason why no test runs it, as the page states it."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str, text: str) -> list[Block]:
    """The blocks of a document.

    Raises:
        ValueError: a fence without a second one, or a reason for which nothing is left out.
    """
    blocks: list[Block] = []
    fence, first, reason, body = "", 0, None, []
    language = ""
    for number, line in enumerate(text.splitlines(), 1):
        if fence:
            if line.strip() == fence:
                content = textwrap.dedent("".join(f"{each}\n" for each in body))
                blocks.append(Block(page, first, language, content, reason))
                fence, reason, body = "", None, []
            else:
                body.append(line)
        elif opening := re.match(r"\s*(`{3,}|~{3,})\s*([^`]*)$", line):
            fence, language, first = opening[1], opening[2].strip(), number
        elif reason is not None:
            raise ValueError(f"{page}:{number - 1}: 'not run: {reason}' does not stand right above a block")
        elif mark := NOT_RUN.fullmatch(line):
            reason = mark[1]
    if fence or reason is not None:
        raise ValueError(f"{page}:{first}: a block does not end, or a reason stands above none")
    return blocks


def without_comment(line: str) -> str:
    """A command without what `#` says about it, as one that `vimtune` begins where it may."""
    line = re.sub(r"\s{2,}#.*", "", line).strip()
    line = re.sub(r"^torchrun .*?(?=train_vim)", "python ", line)
    return re.sub(r"^python train_vim\.py", "vimtune train", line)


DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in PAGES
    for path in sorted(ROOT.glob(pattern))
}
"""Texts of the documents."""
BLOCKS = [block for page, text in DOCUMENTS.items() for block in read_blocks(page, text)]


def blocks_of(language: str, *pages: str) -> list[Block]:
    """The blocks of a language that are to be run, of some pages, or of all."""
    return [
        block
        for block in BLOCKS
        if block.language == language and block.not_run is None and (not pages or block.page in pages)
    ]


def commands_of(*pages: str) -> list[str]:
    """The different commands in the blocks of some pages, or of all, in their order."""
    lines = "".join(block.body for block in blocks_of("", *pages)).replace("\\\n", "").splitlines()
    return list(dict.fromkeys(without_comment(line) for line in lines if line.strip()))
