"""The points of a model: where rules can act.

A point is a parameter ("layers.0.mixer.A_log"), named rows of one ("layers.0.mixer.x_proj.weight[B]"), or a
call ("layers.0.mixer.scan()", "layers.0.mixer.out_proj()", "encode()").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vimtune.adapters.declarations import RowsByName, declaration_of
from vimtune.adapters.slots import CALL, base_parameters, is_factor, join, own_modules
from vimtune.adapters.targets import Target, resolve_targets
from vimtune.text import quote

_PATH = re.compile(r"(?P<place>[^\[\]()]+)(?:\[(?P<rows>[^\[\]()|,]+)\]|(?P<call>\(\)))?")
"""The text of a point: a dotted path, then `[rows]` for named rows or `()` for a call."""


@dataclass(frozen=True)
class Point:
    """One point of a model, taken apart."""

    place: str
    """Path of the parameter, or of the module or method that is called."""
    rows: str | None = None
    """Name of the rows; None for the whole parameter and for calls."""
    is_call: bool = False
    """Whether it is a call."""

    @classmethod
    def parse(cls, path: str) -> Point:
        """The point that a path names.

        Raises:
            ValueError: not the form of such a path.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            raise ValueError(f"{quote(path)} is no path of a parameter, of rows of one, or of a call")
        return cls(match["place"], match["rows"], match["call"] is not None)

    def __str__(self) -> str:
        return self.place + (CALL if self.is_call else f"[{self.rows}]" if self.rows is not None else "")


class Points:
    """All points of one model, as targets choose from them.

    Attributes:
        parameters: paths of the base parameters, in the model's order.
        rows: named rows by the path of their parameter.
        calls: owner and method of each call, by its path with "()".
        read: paths of the linear layers whose weight the model reads, so that their call is no point.
        tied: further paths of parameters that modules share, each with the path that is in `parameters`; both
            are names of one point.
        shared_names: by the path of a parameter of the reverse direction, the name of the one that it is a
            copy of, within their module ("x_proj.weight"). A target that begins there means both.
    """

    def __init__(self, model: nn.Module) -> None:
        paths = {id(parameter): path for path, parameter in base_parameters(model)}
        self.parameters: list[str] = list(paths.values())
        self.tied = {
            path: paths[id(parameter)]
            for path, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in paths and paths[id(parameter)] != path
        }
        self.rows: dict[str, RowsByName] = {}
        self.calls: dict[str, tuple[nn.Module, str]] = {}
        self.read: set[str] = set()
        self.shared_names: dict[str, str] = {}
        for path, module in own_modules(model):
            declared = declaration_of(module)
            self.read.update(join(path, name) for name in declared.reads)
            for name, rows in declared.rows(module).items():
                self.rows[join(path, name)] = rows
            for method in declared.calls:
                self.calls[join(path, method) + CALL] = (module, method)
            for name in [name for name, _ in base_parameters(module)] if declared.reverse_copies else ():
                for first, copy in declared.reverse_copies.items():
                    if name == copy or name.startswith(f"{copy}."):
                        self.shared_names[join(path, name)] = first + name.removeprefix(copy)
            if getattr(type(module), "weight_is_read", False):
                self.read.add(path)
            if path not in self.read and is_factor(module, "weight"):
                self.calls[path + CALL] = (module, "forward")

    def is_multiplied(self, parameter: str) -> bool:
        """Whether the parameter at this path is the weight of a linear layer that the model calls, so that a
        rule for it may also add to the layer's output."""
        layer, _, name = parameter.rpartition(".")
        return name == "weight" and layer + CALL in self.calls

    def has(self, target: str) -> bool:
        """Whether a target names a parameter or a call of the model.

        Raises:
            ValueError: no target.
        """
        selects = Target.parse(target).selects
        return any(selects(path) for path in (*self.parameters, *self.calls))

    def resolve(self, targets: str | Sequence[str], layers: Sequence[int] | None = None) -> list[str]:
        """Paths of the points that targets stand for; see `vimtune.adapters.targets`.

        Raises:
            ValueError: a target or layer that the model does not have.
        """
        return resolve_targets(self, targets, layers)
