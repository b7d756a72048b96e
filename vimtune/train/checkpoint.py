"""The state of a run in one safetensors file, from which it continues exactly.

Tensors: `adapter/<name>` (what is trained), `ema/<name>` (its moving average) and
`optimizer/<name>/<key>`. Metadata, as JSON: the recipe, the facts the state depends on (classes,
number of training images, identity of the base weights, versions) and the progress. The format holds
no code, so a checkpoint from elsewhere can be read without trusting it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vimtune.recipe import Recipe, complete_stored
from vimtune.train.folder import RunFolder, writing
from vimtune.utils import atomic_write

FORMAT = "vimtune run state 1"

IDENTITY = (
    "dataset",
    "dataset_kwargs",
    "data_seed",
    "train_split",
    "model",
    "model_kwargs",
    "img_size",
    "peft",
    "targets",
    "layers",
    "method_kwargs",
    "batch_size",
    "grad_accum",
    "seed",
)
"""What a state belongs to: with another value it could not be loaded, or would mean something else."""

HARMLESS = (
    "data_dir",
    "download",
    "num_workers",
    "cache",
    "checkpoint",
    "pretrained",
    "output_dir",
    "resume",
    "log_interval",
    "cuda_graph",
)
"""May change without a word: no influence on the weights (another base is found by its identity)."""


class ResumeError(ValueError):
    """A checkpoint that cannot be continued, and why."""


@dataclass
class Progress:
    """Where a run stands. Written as JSON, so plain values only.

    `batch` counts the batches of `epoch` already used, `step` the optimizer steps of the whole run.
    `loss_sum` and `loss_images` belong to the epoch in progress; `metrics_bytes` is the length of
    metrics.jsonl when the state was saved.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_images: int = 0
    images: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    best_epoch: int = 0
    best_top1: float = -1.0
    stale_evaluations: int = 0
    metrics_bytes: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class RunState:
    """Contents of a checkpoint; `optimizer` maps tensor name to AdamW's tensors for it."""

    recipe: dict[str, Any]
    facts: dict[str, Any]
    progress: Progress
    adapter: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    ema: dict[str, Tensor]
    scaler: dict[str, Any]


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that `--resume path` means: `path` itself, or the one in that run folder."""
    path = Path(path)
    file = RunFolder(path).checkpoint if path.is_dir() else path
    if not file.is_file():
        raise ResumeError(f"resume = {os.fspath(path)!r}: there is no checkpoint {file}")
    return file


def save_run_state(path: Path, state: RunState) -> None:
    """Write `state` to `path` in one step: a crash or a full disk leaves the former file."""
    tensors = {f"adapter/{name}": tensor for name, tensor in state.adapter.items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in state.ema.items()}
    for name, slots in state.optimizer.items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in slots.items()}
    described = {
        "recipe": state.recipe,
        "facts": state.facts,
        "progress": vars(state.progress),
        "scaler": state.scaler,
    }
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in described.items()}
    data = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    with writing(path):
        atomic_write(path, write)


def load_run_state(path: Path) -> RunState:
    """Read a checkpoint.

    Raises:
        ResumeError: truncated, not one of ours, or unreadable.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ResumeError(f"{path} is truncated or not a checkpoint of vimtune ({error})") from error
    except OSError as error:
        raise ResumeError(f"cannot read {path}: {error.strerror or error}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "a safetensors file of another kind")
        raise ResumeError(f"{path} is not a checkpoint to resume: expected {FORMAT!r}, found {found!r}")
    adapter: dict[str, Tensor] = {}
    ema: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            name, _, slot = name.rpartition("/")
            optimizer.setdefault(name, {})[slot] = tensor
        else:
            {"adapter": adapter, "ema": ema}[kind][name] = tensor
    described = {key: json.loads(metadata[key]) for key in ("recipe", "facts", "progress", "scaler")}
    return RunState(
        recipe=described["recipe"],
        facts=described["facts"],
        progress=Progress(**described["progress"]),
        adapter=adapter,
        optimizer=optimizer,
        ema=ema,
        scaler=described["scaler"],
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter name; empty before the first step."""
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    saved: Mapping[str, dict[str, Tensor]],
) -> None:
    """Put the tensors of `optimizer_tensors` back."""
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: saved[names[p]] for i, p in enumerate(ordered) if names[p] in saved}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def ended(recipe: Recipe, progress: Progress) -> bool:
    """Whether a run that stands at `progress` has trained all it should."""
    exhausted = 0 < recipe.early_stop <= progress.stale_evaluations
    return progress.epoch >= recipe.epochs or exhausted


def refuse_finished(recipe: Recipe, progress: Progress, folder: RunFolder) -> None:
    """Raise ResumeError when nothing is left to do.

    Without a report of this length the run was stopped between its last epoch and its end: let it end.
    """
    if ended(recipe, progress) and folder.reported_epochs() == progress.epoch:
        more = "raise --epochs to train longer" if progress.epoch >= recipe.epochs else "it stopped early"
        raise ResumeError(f"{folder.path} is finished after {progress.epoch} epochs: {more}")


def check_resumable(state: RunState, recipe: Recipe, facts: Mapping[str, Any], same_base: bool) -> list[str]:
    """Compare a checkpoint with the run about to continue it.

    Returns:
        One line per changed setting that makes the rest differ from an uninterrupted run.

    Raises:
        ResumeError: naming everything that makes the state unusable here.
    """
    saved = Recipe.from_values({**complete_stored(state.recipe), "resume": None})
    problems = [
        f"{name} was {getattr(saved, name)!r} and is now {getattr(recipe, name)!r}"
        for name in IDENTITY
        if getattr(saved, name) != getattr(recipe, name)
    ]
    problems += _changed_facts(state.facts, facts)
    if not same_base:
        problems.append("the base weights are others")
    if problems:
        raise ResumeError(
            "this checkpoint belongs to another run: "
            + "; ".join(problems)
            + ". Resume with the run's own settings, or start a new run in another folder"
        )
    notes = []
    for name, value in recipe.to_dict().items():
        if name not in (*IDENTITY, *HARMLESS) and value != getattr(saved, name):
            effect = "; the learning rate jumps to the new run's curve" if name == "epochs" else ""
            notes.append(f"resumed with {name} = {value!r} (was {getattr(saved, name)!r}){effect}")
    return notes


def _changed_facts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    problems = []
    if len(saved["classes"]) != len(now["classes"]):
        problems.append(f"it has {len(saved['classes'])} classes and the data now {len(now['classes'])}")
    elif saved["classes"] != now["classes"]:
        changed = next(a for a, b in zip(saved["classes"], now["classes"], strict=True) if a != b)
        problems.append(f"the class names differ (such as {changed!r})")
    if saved["train_images"] != now["train_images"]:
        problems.append(f"training images were {saved['train_images']} and are now {now['train_images']}")
    return problems
