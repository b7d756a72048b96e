"""Runs timm's own model tests on our models.

timm does not install its tests; take `tests/test_models.py` from its repository and run

    python tests/models/timm_suite.py path/to/timm/tests/test_models.py [pytest options]

The file runs unchanged. Only the model lists it asks timm for are replaced by ours, filed with the
sequence models (ViT and its kin), whose unpooled features are tokens rather than maps. Tests that
download weights get no model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import timm
import timm.models

import vimtune  # noqa: F401  (registers the models)


def our_models(filter="", module="", pretrained=False, exclude_filters="", include_tags=None, **_):
    """`timm.list_models` as the test file sees it."""
    excludes_sequence_models = isinstance(exclude_filters, list) and "vit_*" in exclude_filters
    wants_maps = excludes_sequence_models and include_tags is not None
    if pretrained or wants_maps:
        return []
    return [*timm.models._registry.list_models("vim_*"), "test_vim"]


def main(arguments: list[str]) -> int:
    if not arguments or not Path(arguments[0]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    timm.list_models = timm.models.list_models = our_models
    timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kwargs: []
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "test_timm_models.py"
        suite.write_text(Path(arguments[0]).read_text())
        selection = "not regnet and not naflexvit and not gemma4"
        options = [
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "-c",
            "/dev/null",
            "--rootdir",
            folder,
            "-k",
            selection,
        ]
        return pytest.main([*options, "-k", selection, str(suite), *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
