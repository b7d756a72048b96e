"""Reading checkpoints safely - official `.pth` files, plain `.pth` / `.pt`, `.safetensors` - and fitting them
to a model.

Shape letters: M patches, D width.
"""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vimtune.adapters import base_parameters

if TYPE_CHECKING:
    from vimtune.models.vim import VisionMamba

logger = logging.getLogger(__name__)

# Where training scripts keep the weights inside a checkpoint, the first one found wins. The official
# files carry `model` and `model_ema`; their published accuracy belongs to `model`.
_WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "module", "model_ema")


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit the model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running any code from it.

    Official files carry an `argparse.Namespace`, the only class besides tensors that is let through.

    Raises:
        CheckpointError: missing, truncated, of another kind, or with pickled objects inside.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {kind}; expected a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "contains objects that are not weights" if zipfile.is_zipfile(path) else "is no checkpoint"
        raise CheckpointError(f"{path} {reason}; refusing to unpickle it") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a PyTorch checkpoint ({_first_line(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of weights")
    return dict(content)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def extract_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the weights in a checkpoint's contents and strip a `module.` prefix of DataParallel.

    Raises:
        CheckpointError: no weights inside.
    """
    weights: Mapping[str, Any] = content
    for key in _WEIGHT_KEYS:
        if isinstance(content.get(key), Mapping):
            weights = content[key]
            break
    state = {
        name.removeprefix("module."): value for name, value in weights.items() if isinstance(value, Tensor)
    }
    if not state:
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(f"no weights in the checkpoint; it holds: {found}")
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


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: VisionMamba) -> dict[str, Tensor]:
    """Official or own checkpoint contents to a state dict for `model`; resizes the position embedding.

    The grid of the checkpoint is taken as square if its size allows, else in the aspect of the model's.
    """
    state = extract_state_dict(checkpoint)
    pos_embed = state.get("pos_embed")
    if pos_embed is not None:
        new_grid = model.patch_embed.grid_size
        old_grid = _guess_grid(pos_embed.shape[1] - 1, new_grid)
        if old_grid != new_grid and pos_embed.shape == model.pos_embed.shape:
            logger.warning(
                "position embedding of %d patches taken as a %d x %d grid", pos_embed.shape[1] - 1, *old_grid
            )
        state = {**state, "pos_embed": resize_pos_embed(pos_embed, old_grid, new_grid)}
    return state


def _guess_grid(num_patches: int, like: tuple[int, int]) -> tuple[int, int]:
    side = math.isqrt(num_patches)
    if side * side == num_patches:
        return side, side
    height = round(math.sqrt(num_patches * like[0] / like[1]))
    if height < 1 or num_patches % height:
        raise ValueError(
            f"the position embedding of the checkpoint has {num_patches} patch rows, neither a square grid "
            f"nor one with the aspect of the model's {like[0]} x {like[1]}; create the model with the "
            "img_size of the checkpoint"
        )
    return height, num_patches // height


def load_checkpoint(model: VisionMamba, path: str | Path) -> VisionMamba:
    """Load base weights from a file into `model`, adapters left as they are.

    The position embedding is resized when the image size differs. The head keeps its initial values,
    which is logged, when the file has none or one for another number of classes.

    Raises:
        CheckpointError: not a checkpoint, or any other mismatch; nothing is loaded then.
    """
    content = read_checkpoint(path)
    try:
        state = checkpoint_filter_fn(content, model)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    wanted = dict(base_parameters(model))
    head = [name for name in wanted if name.startswith("head.")]
    fits = [name for name in head if name in state and state[name].shape == wanted[name].shape]
    if fits != head or not head:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        wanted = {name: parameter for name, parameter in wanted.items() if name not in head}

    problems = _mismatches(state, wanted)
    if problems:
        raise CheckpointError(f"{path} does not fit the model: " + "; ".join(problems))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
    if fits != head:
        logger.warning(
            "%s has no head for %d classes: the classification head starts from scratch",
            path,
            model.num_classes,
        )
    return model


def _mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter]) -> list[str]:
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
    advice = (
        "use pretrained=False, or load a file with vimtune.load_checkpoint (--checkpoint on the command line)"
    )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"the pretrained weights of {variant} could not be downloaded ({_first_line(error)}); {advice}"
        ) from error
    except RuntimeError as error:
        if "No pretrained weights exist" not in str(error):
            raise
        raise CheckpointError(f"no pretrained weights are published for {variant}; {advice}") from error
