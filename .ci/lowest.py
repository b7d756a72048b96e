"""Print the lowest supported version of every dependency, one pip constraint a line.

The installed package's own metadata says which they are, so that pyproject.toml stays the only list.
"""

from __future__ import annotations

import importlib.metadata
import re

for requirement in importlib.metadata.requires("vimtune") or []:
    if "extra ==" not in requirement:
        bound = re.match(r"([\w.-]+).*?>=([\w.]+)", requirement)
        assert bound is not None, f"{requirement!r} in pyproject.toml has no lower bound"
        print(f"{bound[1]}=={bound[2]}")
