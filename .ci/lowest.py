"""Print the lowest supported version of every dependency, one pip constraint a line.

    python .ci/lowest.py [EXTRA ...]

The installed package's own metadata says which they are, so that pyproject.toml stays the only list. What an
extra asks for takes the place of what vimtune asks for without it.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

bounds: dict[str, str] = {}
for requirement in importlib.metadata.requires("vimtune") or []:
    extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
    if extra is None or extra[1] in sys.argv[1:]:
        bound = re.match(r"([\w.-]+).*?>=([\w.]+)", requirement)
        assert bound is not None, f"{requirement!r} in pyproject.toml has no lower bound"
        bounds[bound[1]] = bound[2]
for name, version in bounds.items():
    print(f"{name}=={version}")
