"""Registers the models with timm at the moment timm is imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS = "vimtune.models.vim"
"""The module whose import registers the models with timm."""


def register_with_timm() -> None:
    """Register now if timm is loaded, otherwise as soon as it is."""
    if "timm" in sys.modules:
        importlib.import_module(_MODELS)
    else:
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Steps in front of the import of `timm`, and leaves `sys.meta_path` once that is loaded.

    Until then it answers everybody who only asks whether there is a timm, as transformers does.
    """

    def __init__(self) -> None:
        self._asks_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm" or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = importlib.util.find_spec("timm")
        finally:
            self._asks_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """timm's own loader, followed by the registration."""

    def __init__(self, loader: importlib.abc.Loader, finder: _TimmFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        importlib.import_module(_MODELS)
