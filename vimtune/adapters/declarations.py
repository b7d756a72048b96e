"""What a module declares to adapters beside its parameters: named rows, calls, weights that are only read,
parameters that do not decay, parameters that are copies for a second direction, from which ends it reads its
tokens, and whether its layers keep the examples of a batch apart.

A module of this package declares it itself, with `named_rows`, `adapter_calls`, `weight_is_read`,
`undecayed`, `reverse_copies`, `directions` and `batch_first`. For classes of other packages it stands in one
table here, to which `declare` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import nn

RowsByName = dict[str, slice]
"""Rows of a parameter by name, such as {"x": slice(0, 384), "z": slice(384, 768)}."""


def _no_rows(module: Any) -> dict[str, RowsByName]:
    return {}


@dataclass(frozen=True)
class Declaration:
    """What modules of one class offer to adapters."""

    rows: Callable[[Any], Mapping[str, RowsByName]] = _no_rows
    """The named rows of the parameters of a module, by their paths within the module ("in_proj.weight").
    They follow the present sizes, also where a rule has let a parameter grow."""
    calls: tuple[str, ...] = ()
    """Names of methods that rules may surround. The model calls them as methods, with the value to change as
    the first argument and, if it has one, the flow between layers as the second."""
    reads: tuple[str, ...] = ()
    """Linear layers within the module whose weights it reads, at least in some of its ways of computing."""
    has_fixed_sizes: bool = False
    """Whether the module computes with sizes of its configuration, so that no parameter in it may grow."""
    undecayed: tuple[str, ...] = ()
    """The module's own parameters that weight decay leaves alone: those for which 0 means nothing special."""
    reverse_copies: Mapping[str, str] = field(default_factory=dict)
    """What the reverse direction has for itself, by what it is a copy of, {"A_log": "A_b_log"}: parameters of
    the module, or modules within it. A target that names the one means the other, too."""
    directions: int = 0
    """In how many directions its calls go through the tokens: 1 from the first to the last, 2 for both; 0 if
    they do not."""
    batch_first: bool = False
    """Whether all that linear layers within the module are given has the examples of a batch as its first
    dimension, so that each of them may have an adapter of its own in a mixed batch."""


_FOREIGN: dict[str, Declaration] = {}
"""Declarations by the full name of the class, so that nobody has to import the packages that have them."""


def declare(class_name: str, declaration: Declaration) -> None:
    """State what the modules of a class offer to adapters; subclasses inherit it.

    A declaration of a subclass takes its place, but for `undecayed`, to which it can only add.

    Args:
        class_name: the module and the name of the class, "package.module.ClassName".
        declaration: what its modules offer.
    """
    _FOREIGN[class_name] = declaration


def declaration_of(module: nn.Module) -> Declaration:
    """What a module offers; nothing if neither its class nor a base of it declares anything."""
    calls = getattr(type(module), "adapter_calls", ())
    named_rows = getattr(type(module), "named_rows", None)
    copies = getattr(type(module), "reverse_copies", {})
    if calls or copies or named_rows is not None:
        return Declaration(
            _no_rows if named_rows is None else named_rows,
            calls,
            reverse_copies=copies,
            directions=getattr(type(module), "directions", 0),
            batch_first=getattr(type(module), "batch_first", False),
        )
    return next(_foreign_declarations(module), Declaration())


def is_undecayed(module: nn.Module, parameter: str) -> bool:
    """Whether the class of a module, or a base of it, declares that weight decay leaves a parameter alone."""
    return parameter in getattr(type(module), "undecayed", ()) or any(
        parameter in declared.undecayed for declared in _foreign_declarations(module)
    )


def _foreign_declarations(module: nn.Module) -> Iterator[Declaration]:
    """What the table says about the class of a module and about its bases, the nearest first."""
    for kind in type(module).__mro__:
        if (found := _FOREIGN.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            yield found


@dataclass(frozen=True)
class ScanInput:
    """The first argument of a mixer's call `scan`, which is the output (B, L, columns) of its in_proj."""

    columns: RowsByName
    """Its columns by name, x and z among them: the rows of in_proj."""
    directions: int
    """1 for a scan from the first token to the last, 2 for one in both directions."""

    @property
    def width(self) -> int:
        """E, the number of columns of x and of z."""
        first, end = self.columns["x"].start, self.columns["x"].stop
        return int(end - first)


def scan_input(module: nn.Module, path: str) -> ScanInput:
    """What the call at `path` takes, if it is the scan of a mixer.

    Args:
        module: the mixer.
        path: that of the call, which a method wants to surround.

    Raises:
        ValueError: another call, or a mixer that does not declare its columns and directions.
    """
    declared = declaration_of(module)
    columns = declared.rows(module).get("in_proj.weight", {})
    if path.rpartition(".")[2] != "scan()" or not {"x", "z"} <= columns.keys() or not declared.directions:
        raise ValueError(
            f"{path} is not the scan of a mixer that declares its parts x and z and its directions: choose "
            "scan() of such mixers as the target"
        )
    return ScanInput(columns, declared.directions)


def scan_states(mixer: nn.Module, suffix: str = "") -> int:
    """How many states each channel of a mixer's scan has at present, by the rows of x_proj that read them; 0
    for a mixer that declares no such rows.

    Args:
        mixer: the mixer.
        suffix: what the names of the direction's parameters end with: "", or "_b" for the reverse one.
    """
    rows = declaration_of(mixer).rows(mixer).get(f"x_proj{suffix}.weight", {})
    return int(rows["C"].stop - rows["C"].start) if "C" in rows else 0


def consecutive_rows(**sizes: int) -> RowsByName:
    """Rows that follow each other from the first one on, by name and number."""
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _rows_of_mamba(mixer: Any) -> dict[str, RowsByName]:
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.A_log.shape[1]
    return {
        "in_proj.weight": consecutive_rows(x=inner, z=inner),
        "x_proj.weight": consecutive_rows(dt=rank, B=states, C=states),
    }


def _rows_of_mamba2(mixer: Any) -> dict[str, RowsByName]:
    inner, states = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    convolved = consecutive_rows(x=inner, B=states, C=states)
    projected = consecutive_rows(z=inner, x=inner, B=states, C=states, dt=mixer.num_heads)
    return {"in_proj.weight": projected, "conv1d.weight": convolved, "conv1d.bias": convolved}


def _rows_of_attention(attention: Any) -> dict[str, RowsByName]:
    third = attention.qkv.out_features // 3
    rows = consecutive_rows(q=third, k=third, v=third)
    return {"qkv.weight": rows, "qkv.bias": rows}


declare(
    "transformers.models.mamba.modeling_mamba.MambaMixer",
    Declaration(
        _rows_of_mamba,
        reads=("x_proj", "dt_proj", "out_proj"),
        has_fixed_sizes=True,
        undecayed=("A_log", "D"),
    ),
)
declare(
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer",
    Declaration(
        _rows_of_mamba2, reads=("out_proj",), has_fixed_sizes=True, undecayed=("A_log", "D", "dt_bias")
    ),
)
# Ours call out_proj, and offer what lies between the projections as a call. That of Mamba follows A_log.
declare(
    "vimtune.language.mixers.FastMambaMixer",
    Declaration(_rows_of_mamba, calls=("scan",), reads=("x_proj", "dt_proj"), directions=1),
)
declare(
    "vimtune.language.mixers.FastMamba2Mixer",
    Declaration(_rows_of_mamba2, calls=("scan",), has_fixed_sizes=True, directions=1),
)
for _family in ("mamba", "mamba2"):
    _class = f"{_family.capitalize()}PreTrainedModel"
    declare(f"transformers.models.{_family}.modeling_{_family}.{_class}", Declaration(batch_first=True))
declare("timm.models.vision_transformer.VisionTransformer", Declaration(batch_first=True))
declare("timm.layers.attention.Attention", Declaration(_rows_of_attention, has_fixed_sizes=True))
