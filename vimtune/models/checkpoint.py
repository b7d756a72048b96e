"""Reading checkpoints safely - official `.pth` files, plain `.pth` / `.pt`, `.safetensors` - and fitting them
to a model.

Shape letters: M patches, D width.
"""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from vimtune.adapters import ADAPTER_FORMAT, base_parameters, made_from, note_loading
from vimtune.hub_errors import HUB_ERRORS
from vimtune.models.options import ARCHITECTURE, MAX_PATCHES, ModelOptions
from vimtune.models.registry import VIM_MODELS, check_model_options
from vimtune.models.weights import OTHER_WEIGHTS
from vimtune.parsers import given_path
from vimtune.schema import parse_json
from vimtune.tensor_file import read_metadata, read_tensors
from vimtune.text import printable, quote
from vimtune.weight_files import PLAIN_WEIGHTS, SAFETENSORS

if TYPE_CHECKING:
    from vimtune.models.vim import VisionMamba

logger = logging.getLogger(__name__)

# Where training scripts keep the weights inside a checkpoint, the most likely place first. The official
# files carry `model` and `model_ema`; their published accuracy belongs to `model`.
_WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "module", "model_ema")
_MAX_DEPTH = 6
"""Levels of a checkpoint's dictionaries that are searched for weights."""

_PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
"""What `torch.compile`, DataParallel and modules around the model put before the names of weights."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights of a checkpoint may have; others belong to quantised weights."""

# What `torch.load` raises for damaged files, depending on the place of the damage.
_DAMAGE = (
    RuntimeError, EOFError, zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, ArithmeticError, struct.error,
)  # fmt: skip

# What else of ours is a safetensors file, by its format, and what to do with it.
_OTHER_FILES = {
    ADAPTER_FORMAT: "is an adapter, not base weights: load it with vimtune.load_adapter "
    "(predict --adapter and merge on the command line)",
    "vimtune run state": "is the state of a run, not base weights: continue the run with --resume, or merge "
    "its adapter.safetensors into base weights",
}


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit the model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running any code from it.

    Official files carry an `argparse.Namespace`, the only class besides tensors that is let through.

    Raises:
        CheckpointError: missing, truncated, of another kind, or with pickled objects inside.
    """
    return _read(given_path("path", path, "a checkpoint", CheckpointError))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Contents and metadata of a checkpoint file; only safetensors files have metadata."""
    shown = printable(str(path))
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"checkpoint {shown} {kind}; expected a file with a name ending in {' or '.join(PLAIN_WEIGHTS)}"
        )
    if path.suffix.lower() == SAFETENSORS:
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "contains objects that are not weights" if zipfile.is_zipfile(path) else "is no checkpoint"
        raise CheckpointError(f"{shown} {reason}; refusing to unpickle it") from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{shown} is truncated or not a PyTorch checkpoint ({_first_line(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{shown} holds {quote(content)}, expected a dictionary of weights")
    return dict(content), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    shown = printable(str(path))
    try:
        metadata = read_metadata(path)
        for kind, meaning in _OTHER_FILES.items():
            if metadata.get("format", "").startswith(kind):
                raise CheckpointError(f"{shown} {meaning}")
        return read_tensors(path), metadata
    except SafetensorError as error:
        raise CheckpointError(f"{shown} is truncated or not a safetensors file ({error})") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def extract_state_dict(content: Mapping[str, Any], expected: Iterable[str]) -> dict[str, Tensor]:
    """Find the weights in a checkpoint's contents, however deep, under the names that the model gives them.

    Args:
        content: what the file holds.
        expected: names of the model's weights. Of several sets of tensors the one with most of them is
            taken, the most usual place first.

    Raises:
        CheckpointError: no tensors inside.
    """
    names = set(expected)
    states = [_without_prefixes(found) for found in _find_tensors(content)]
    if not states:
        found = ", ".join(quote(key, 40) for key in list(content)[:8]) or "nothing"
        raise CheckpointError(f"no weights in the checkpoint; it holds: {found}")
    return max(states, key=lambda state: len(names & state.keys()))


def _find_tensors(content: Mapping[Any, Any]) -> list[dict[str, Tensor]]:
    """The named tensors of each dictionary in `content`, itself included; the likeliest ones first."""
    found = []
    level, seen = [content], {id(content)}
    for _ in range(_MAX_DEPTH):
        below = []
        for mapping in level:
            tensors = {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if tensors:
                found.append(tensors)
            usual = [key for key in _WEIGHT_KEYS if key in mapping]
            for key in [*usual, *(key for key in mapping if key not in usual)]:
                inner = mapping[key]
                if isinstance(inner, Mapping) and id(inner) not in seen:
                    seen.add(id(inner))
                    below.append(inner)
        level = below
    return found


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without prefixes that all of their names have."""
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, M + 1, D) whose class row is in the middle to another grid.

    The class row is lifted out, the grid of patch rows is resized (bicubic, antialiased when it
    shrinks) and the class row put back into the new middle. The official script resizes as if the
    class row came first, which shifts half of the patches and turns the class row into a patch.
    """
    if old_grid == new_grid:
        return pos_embed
    old_middle, new_middle = (grid[0] * grid[1] // 2 for grid in (old_grid, new_grid))
    cls_row = pos_embed[:, old_middle : old_middle + 1]
    rows = torch.cat([pos_embed[:, :old_middle], pos_embed[:, old_middle + 1 :]], dim=1)
    grid = rows.transpose(1, 2).unflatten(2, old_grid).float()
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    rows = grid.to(pos_embed.dtype).flatten(2).transpose(1, 2)
    return torch.cat([rows[:, :new_middle], cls_row, rows[:, new_middle:]], dim=1)


def checkpoint_filter_fn(
    checkpoint: Mapping[str, Any], model: VisionMamba, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Official or own checkpoint contents to a state dict for `model`; resizes the position embedding.

    Args:
        checkpoint: what a checkpoint file holds.
        model: the model that the weights are for.
        grid: patches in a column and in a row of the checkpoint's images, where it says so. Without it,
            a position embedding of the model's own shape stays as it is.

    Raises:
        CheckpointError: no weights inside, or a position embedding of no grid.
    """
    state = extract_state_dict(checkpoint, (name for name, _ in base_parameters(model)))
    pos_embed, own = state.get("pos_embed"), model.pos_embed
    if pos_embed is None or pos_embed.dim() != 3 or pos_embed.shape[::2] != own.shape[::2]:
        return state
    if 1 < pos_embed.shape[1] <= MAX_PATCHES + 1:
        if problems := unusable({"pos_embed": pos_embed}, {"pos_embed": own}):
            raise CheckpointError(problems[0])
        new_grid = model.patch_embed.grid_size
        old_grid = _source_grid(pos_embed.shape[1] - 1, model, grid)
        resized = resize_pos_embed(pos_embed, old_grid, new_grid)
        state = {**state, "pos_embed": made_from(resized, pos_embed)}
    return state


def _source_grid(num_patches: int, model: VisionMamba, stated: tuple[int, int] | None) -> tuple[int, int]:
    """The grid of a position embedding of `num_patches` patches."""
    own = model.patch_embed.grid_size
    if stated is not None:
        if math.prod(stated) != num_patches:
            raise CheckpointError(
                f"the checkpoint says that its images have {stated[0]} x {stated[1]} patches, "
                f"and its position embedding has {num_patches}"
            )
        return stated
    published = getattr(model, "pretrained_cfg", {}).get("input_size")
    # This is the size of the weights while timm loads them, and later on that of the model's images.
    if published is not None:
        at_home = ModelOptions(**{**model.options, "img_size": tuple(published[1:])}).grid
        if math.prod(at_home) == num_patches:
            return at_home
    if math.prod(own) == num_patches:
        return own
    guessed = _guess_grid(num_patches, own)
    logger.warning(
        "the checkpoint does not say how its %d patches lie: taken as a %d x %d grid and resized to %d x %d",
        num_patches,
        *guessed,
        *own,
    )
    return guessed


def _guess_grid(num_patches: int, like: tuple[int, int]) -> tuple[int, int]:
    """A square if the number allows, else the aspect of the model's grid `like`."""
    side = math.isqrt(num_patches)
    if side * side == num_patches:
        return side, side
    height = round(math.sqrt(num_patches * like[0] / like[1]))
    if height < 1 or num_patches % height:
        raise CheckpointError(
            f"the position embedding of the checkpoint has {num_patches} patch rows, neither a square grid "
            f"nor one with the aspect of the model's {like[0]} x {like[1]}; create the model with the "
            "img_size of the checkpoint"
        )
    return height, num_patches // height


def load_checkpoint(model: VisionMamba, path: str | Path, *, head: bool = True) -> VisionMamba:
    """Load base weights from a file into `model`, adapters left as they are.

    Takes official files, files of other training scripts, and what `vimtune merge` writes. The position
    embedding is resized when the image size differs. The head keeps its initial values, which is logged,
    when the file has none or one for another number of classes.

    Args:
        model: the model, changed in place.
        path: a .pth, .pt, .bin or .safetensors file.
        head: load the classification head, too. False where an adapter brings its own.

    Raises:
        CheckpointError: not a checkpoint, values that are no finite floating point numbers, or any other
            mismatch; nothing is loaded then.
    """
    path = given_path("path", path, "a checkpoint", CheckpointError)
    state, stated = _weights_for(model, path)
    _load(model, state, stated, printable(str(path)), head)
    return model


def load_with_its_head(model: VisionMamba, path: str | Path) -> VisionMamba:
    """`load_checkpoint` with the head of the file, whose number of classes becomes that of the model.

    Raises:
        CheckpointError: as there, or the file has no head.
    """
    path = given_path("path", path, "a checkpoint", CheckpointError)
    shown = printable(str(path))
    state, stated = _weights_for(model, path)
    if state.get("head.weight", torch.empty(0)).dim() != 2:
        raise CheckpointError(
            f"{shown} has no classification head, and the adapter brings none: expected the weights with the "
            "head to which the adapter belongs"
        )
    model.reset_classifier(len(state["head.weight"]))
    _load(model, state, stated, shown, head=True)
    return model


def _weights_for(model: VisionMamba, path: Path) -> tuple[dict[str, Tensor], ModelOptions | None]:
    """The weights in a file by the names of the model, and the options that the file states."""
    content, metadata = _read(path)
    try:
        stated = _stated_options(metadata)
        return checkpoint_filter_fn(content, model, None if stated is None else stated.grid), stated
    except ValueError as error:
        raise CheckpointError(f"{printable(str(path))}: {error}") from error


def _load(
    model: VisionMamba, state: dict[str, Tensor], stated: ModelOptions | None, shown: str, head: bool
) -> None:
    """Copy what `_weights_for` has found in the file `shown`; see `load_checkpoint`."""
    wanted = dict(base_parameters(model))
    own_head = [name for name in wanted if name.startswith("head.")]
    fits = all(name in state and state[name].shape == wanted[name].shape for name in own_head)
    if not (head and own_head and fits):
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        wanted = {name: parameter for name, parameter in wanted.items() if name not in own_head}

    problems = mismatches(state, wanted) or unusable(state, wanted)
    if problems:
        advice = "" if stated is None else _advice(stated, model)
        raise CheckpointError(f"{shown} does not fit the model: " + "; ".join(problems) + advice)
    note_loading(model, state)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
    if head and own_head and not fits:
        logger.warning(
            "%s has no head for %d classes: the classification head starts from scratch",
            shown,
            model.num_classes,
        )


def _stated_options(metadata: Mapping[str, str]) -> ModelOptions | None:
    """The options of the model that a file is for, if it is one of ours that says so."""
    ours = [entry.name for entry in VIM_MODELS]
    name = metadata.get("model", ours[0])
    if "options" not in metadata or name not in ours:
        return None
    return ModelOptions(**check_model_options(name, parse_json(metadata["options"], "options")))


def _advice(stated: ModelOptions, model: VisionMamba) -> str:
    """With which options a model takes a file that was written for one with the stated options."""
    others = [
        f"{option}={getattr(stated, option)!r}"
        for option in ARCHITECTURE
        if getattr(stated, option) != model.options[option]
    ]
    options = ",".join(others)
    return f". The file is for a model with {options} (--model-kwargs {options})" if others else ""


def unusable(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being the weights `wanted`, whose names they have."""
    for name, value in state.items():
        if value.dtype not in _DTYPES or value.layout != torch.strided or value.device.type == "meta":
            kind = "no values" if value.device.type == "meta" else f"{value.dtype} ({value.layout})"
            return [f"{name} holds {kind}, expected floating point numbers; quantised weights cannot be used"]
        if not torch.isfinite(value).all():
            return [f"{name} holds values that are not finite (NaN or infinity): the file is damaged"]
        if not torch.isfinite(value.to(wanted[name].dtype)).all():
            return [f"{name} holds values that are too large for the model's {wanted[name].dtype}"]
    return []


def mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter]) -> list[str]:
    """In what the names and shapes of tensors differ from those of the weights `wanted`."""

    def listing(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in state and state[name].shape != parameter.shape
    ]
    problems = []
    if missing:
        problems.append(f"missing {listing(missing)}")
    if unexpected:
        problems.append(f"unexpected {listing(unexpected)}")
    if shapes:
        problems.append(f"shapes {listing(shapes)}")
    return problems


@contextmanager
def pretrained_loading(variant: str, pretrained: bool) -> Iterator[None]:
    """Let timm read official files (Namespace inside) and turn its failures into one clear message."""
    if not pretrained:
        yield
        return
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"the pretrained weights of {variant} could not be downloaded ({_first_line(error)}); "
            f"{OTHER_WEIGHTS}"
        ) from error
    except (RuntimeError, SafetensorError, EOFError) as error:
        if "No pretrained weights exist" in str(error):
            raise CheckpointError(
                f"no pretrained weights are published for {variant}; {OTHER_WEIGHTS}"
            ) from error
        if not _is_about_a_file(error):
            raise
        raise CheckpointError(
            f"the file of the pretrained weights of {variant} is damaged, or no checkpoint "
            f"({_first_line(error)}): delete it where it is kept, and it is downloaded again; or "
            f"{OTHER_WEIGHTS}"
        ) from error


def _is_about_a_file(error: Exception) -> bool:
    """Whether an error is that of a reader of files. For .pth files timm and torch raise RuntimeError."""
    unreadable = isinstance(error.__cause__, pickle.UnpicklingError) or "PytorchStreamReader" in str(error)
    return unreadable or not isinstance(error, RuntimeError)
