"""What the site has beside the pages of this folder: documents of the repository, and what the package says.

The documents of `DOCUMENTS` are pages under the names that they have in the repository, so that their links
lead to the same places. So are the notebooks, with what they have shown. In any page a line

    <!-- generated: NAME ARGUMENT ... -->

is replaced by what the function NAME of `GENERATORS` returns. Nothing that the package or a file of results
says is therefore written a second time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evidence
import method_pages
import notebook_pages
import rankings
import reference
import verdicts
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
"""The repository."""
DOCUMENTS = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/LOG.md",
    "benchmarks/RESULTS.md",
    "benchmarks/results/*",
    "configs/README.md",
)
"""Files of the repository, as patterns, which are part of the site."""
GENERATORS: dict[str, Callable[..., str]] = {
    "commands": reference.commands,
    "data_sets": reference.data_sets,
    "evidence": evidence.all_scores,
    "loggers": reference.loggers,
    "methods": method_pages.sections,
    "method_table": method_pages.table,
    "models": reference.models,
    "names": reference.names,
    "rankings": rankings.rankings,
    "targets": reference.targets,
    "tasks": reference.tasks,
    "verdicts": verdicts.verdicts,
}
"""What may stand in a mark."""
MARK = re.compile(r"^<!-- generated: (\w+)((?: [\w.]+)*) -->$", re.M)
"""A line that is replaced."""


def on_files(files: Files, config: Any) -> Files:
    """Add the documents of the repository."""
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_pages.page(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page."""
    return MARK.sub(_generated, markdown)


def _generated(mark: re.Match[str]) -> str:
    name, arguments = mark[1], mark[2].split()
    if name not in GENERATORS:
        raise PluginError(f"nothing is called {name!r}; expected one of {', '.join(GENERATORS)}")
    return GENERATORS[name](*arguments)
