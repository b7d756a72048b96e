"""The state of a run in one safetensors file, from which it continues exactly.

Tensors: `adapter/<name>` (what is trained), `ema/<name>` (its moving average) and
`optimizer/<name>/<key>`. Metadata, as JSON: the recipe, the facts the state depends on (meaning of the
outputs, fingerprints of the data, identity of the base weights, versions) and the progress. The format holds
no code, and everything read is compared with a schema and with the run's own tensors, so a checkpoint
from elsewhere can be read without trusting it.

A run folder has two files that belong together: the state and the best adapter. They change as one:

1. a better adapter is written beside the present one, under a name of its own (`next_adapter`);
2. the state is written, which names the epoch of the best adapter; the rename that ends this step decides;
3. the new adapter takes the place of the present one.

After a crash before the decision the folder still holds the former state and its adapter; after it,
`settle_best_adapter` does step 3 when the run is resumed. A state that is not sane (not finite) is never
written, so the last good one stays.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from vimtune.adapters import AdapterFileError, read_adapter_info
from vimtune.files import atomic_write_bytes
from vimtune.recipe import Recipe, RecipeError, complete_stored
from vimtune.recipe.components import OptimisationSettings
from vimtune.recipe.optimizers import NEVER_NEGATIVE, OPTIMIZERS
from vimtune.run_folder import RunFolder, writing
from vimtune.schema import STRICT, Count, check, load_json, parse_json
from vimtune.tensor_file import read_metadata, read_tensors
from vimtune.text import printable, quote, shorten
from vimtune.training.earlier import FORMAT_1, convert
from vimtune.training.guard import NonFiniteError, describe, is_finite
from vimtune.training.identity import Facts, ResumeError

FORMAT = "vimtune run state 2"
"""What the metadata of a state call its format."""
Layout = Mapping[str, bool]
"""What belongs to the optimizer's state of one parameter: name -> whether it has the parameter's shape, or is
a number (`OptimizerKind.layout`)."""

_OF_GROUPS = {number for kind in OPTIMIZERS.values() for number in kind.group_numbers}
"""The numbers that optimizers keep for a group of parameters."""
_NUMBERS = {"step": torch.zeros(())} | {name: torch.zeros((), dtype=torch.float64) for name in _OF_GROUPS}
"""What a number in the optimizer's state looks like, by its name."""

NotNegative = Annotated[float, Ge(0)]
"""A number that is not negative."""


@dataclass
class EpochRecord:
    """What is known of an epoch that is over."""

    __pydantic_config__ = STRICT

    epoch: Count
    """Its number, from 1 on."""
    step: Count
    """Number of optimizer steps of the run at its end."""
    lr: NotNegative
    """Learning rate of its last step."""
    train_loss: float
    """Mean loss over the epoch, per unit of the task."""
    rate: NotNegative
    """Units per second in training, over all epochs so far."""
    loss: float | None = None
    """Loss on the selection split; None for an epoch that was not evaluated."""
    scores: dict[str, float | None] | None = None
    """The task's scores on the selection split; None for an epoch that was not evaluated."""

    def flat(self, unit: str) -> dict[str, Any]:
        """The record as it stands in metrics.jsonl and report.json; `unit` is what the task counts."""
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "train_loss": self.train_loss,
            f"{unit}_per_second": self.rate,
        }
        return values if self.scores is None else {**values, "loss": self.loss, **self.scores}


@dataclass
class Progress:
    """Where a run stands. Written as JSON, so plain values only.

    `batch` counts the batches of `epoch` already used, `step` the optimizer steps of the whole run. `count`
    is what the run has trained on so far, in the task's unit. `loss_sum` and `loss_count` belong to the epoch
    in progress; `metrics_bytes` is the length of metrics.jsonl when the state was saved. `best_epoch` is 0 as
    long as there is none. `history` has one record for each epoch done.
    """

    __pydantic_config__ = STRICT

    epoch: Count = 0
    batch: Count = 0
    step: Count = 0
    loss_sum: float = 0.0
    loss_count: Count = 0
    count: Count = 0
    seconds: NotNegative = 0.0
    train_seconds: NotNegative = 0.0
    best_epoch: Count = 0
    stale_evaluations: Count = 0
    metrics_bytes: Count = 0
    history: list[EpochRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stopped: str | None = None
    """Why a callback has ended the training, perhaps empty; None as long as none has."""

    @property
    def evaluated(self) -> list[EpochRecord]:
        """The records of the epochs that were evaluated."""
        return [record for record in self.history if record.scores is not None]

    @property
    def best(self) -> EpochRecord | None:
        """The record of the best epoch; None as long as there is none."""
        return next((record for record in self.history if record.epoch == self.best_epoch), None)


@dataclass
class ScalerState:
    """State of torch's GradScaler, which amp = fp16 uses; torch writes a `_` before `growth_tracker`."""

    __pydantic_config__ = STRICT

    scale: Annotated[float, Gt(0)]
    growth_factor: Annotated[float, Gt(1)]
    backoff_factor: Annotated[float, Gt(0), Le(1)]
    growth_interval: Annotated[int, Ge(1)]
    growth_tracker: Count


@dataclass
class RunState:
    """Contents of a checkpoint; `optimizer` maps tensor name to the optimizer's tensors for it."""

    recipe: Recipe
    facts: Facts
    progress: Progress
    adapter: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    ema: dict[str, Tensor]
    scaler: dict[str, Any]


def save_run_state(path: Path, state: RunState) -> None:
    """Write `state` to `path` in one step: a crash or a full disk leaves the former file.

    Raises:
        NonFiniteError: the state is not sane; the former file stays.
        OutputError: it cannot be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _flat(state).items()}
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise NonFiniteError(
                f"after step {state.progress.step}, {key} is not finite ({describe(tensor)}). This state is "
                f"not kept; {path.name} is as it was saved before. Lower --lr or set --clip-grad"
            )
    described = {
        "recipe": state.recipe.to_dict(),
        "facts": dataclasses.asdict(state.facts),
        "progress": dataclasses.asdict(state.progress),
        "scaler": state.scaler,
    }
    check(Facts, described["facts"], "the facts of the run")
    check(Progress, described["progress"], "the progress of the run")
    _check_progress(state, "the progress of the run")
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in described.items()}
    data = save(tensors, metadata)
    with writing(path):
        atomic_write_bytes(path, data)


def _flat(state: RunState) -> dict[str, Tensor]:
    tensors = {f"adapter/{name}": tensor for name, tensor in state.adapter.items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in state.ema.items()}
    for name, slots in state.optimizer.items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in slots.items()}
    return tensors


def load_run_state(path: Path) -> RunState:
    """Read a checkpoint, and check all that can be checked without the run it belongs to.

    Raises:
        ResumeError: truncated, not one of ours, damaged, or unreadable.
    """
    shown = printable(str(path))
    try:
        metadata, tensors = read_metadata(path), read_tensors(path)
    except SafetensorError as error:
        reason = shorten(printable(str(error)))
        raise ResumeError(f"{shown} is truncated or not a checkpoint of vimtune ({reason})") from error
    except OSError as error:
        raise ResumeError(f"cannot read {shown}: {error.strerror or error}") from error
    if metadata.get("format") not in (FORMAT, FORMAT_1):
        found = quote(metadata["format"]) if "format" in metadata else "a safetensors file of another kind"
        raise ResumeError(f"{shown} is not a checkpoint to resume: expected {FORMAT!r}, found {found}")
    if metadata["format"] == FORMAT_1:
        metadata = convert(metadata, shown)

    def read(schema: Any, key: str) -> Any:
        return load_json(schema, metadata.get(key), f"{shown}: its {key}", ResumeError)

    try:
        recipe = Recipe.from_values(complete_stored(read(dict[str, Any], "recipe")))
    except RecipeError as error:
        raise ResumeError(f"{shown}: its recipe: {'; '.join(error.problems)}") from error
    facts, progress, scaler = read(Facts, "facts"), read(Progress, "progress"), _read_scaler(metadata, shown)
    state = RunState(recipe, facts, progress, adapter={}, optimizer={}, ema={}, scaler=scaler)
    _check_progress(state, shown, ResumeError)
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            name, _, slot = name.rpartition("/")
            state.optimizer.setdefault(name, {})[slot] = tensor
        elif kind in ("adapter", "ema"):
            getattr(state, kind)[name] = tensor
        else:
            raise ResumeError(f"{shown} holds an unexpected tensor {quote(key)}")
    return state


def _read_scaler(metadata: Mapping[str, str], shown: str) -> dict[str, Any]:
    what = f"{shown}: its scaler"
    values = check(dict[str, Any], parse_json(metadata.get("scaler"), what, ResumeError), what, ResumeError)
    if values:  # empty where no scaler was in use
        check(ScalerState, {key.removeprefix("_"): value for key, value in values.items()}, what, ResumeError)
    return values


def _check_progress(state: RunState, what: str, error: type[ValueError] = ValueError) -> None:
    """Check what a schema of single values cannot say: that the parts of the progress fit together."""
    progress, task = state.progress, state.recipe.task
    if [record.epoch for record in progress.history] != list(range(1, progress.epoch + 1)):
        raise error(f"{what}: its history is not that of the {progress.epoch} epochs it has trained")
    names = [score.name for score in task.scores]
    for record in progress.history:
        whole = record.scores is None or sorted(record.scores) == sorted(names)
        if not whole or (record.loss is None) != (record.scores is None):
            expected = ", ".join(["loss", *names])
            raise error(f"{what}: its history has not all of {expected} in epoch {record.epoch}")
        for score in task.scores if record.scores is not None else ():
            value = (record.scores or {})[score.name]
            if score.percent and value is not None and not 0 <= value <= 100:
                raise error(f"{what}: its history has {score.name} = {value:g} in epoch {record.epoch}")
    best = progress.best
    if progress.best_epoch > 0 and (best is None or best.scores is None):
        raise error(f"{what}: its history does not have epoch {progress.best_epoch} as an evaluated one")


def check_place(progress: Progress, batches: int) -> None:
    """Raise ResumeError where `progress` stands beyond an epoch of so many `batches`."""
    if progress.batch > batches:
        raise ResumeError(
            f"the checkpoint stands after {progress.batch} batches of an epoch, which now has {batches}"
        )


def check_tensors(
    state: RunState,
    adapter: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    layouts: Mapping[str, Layout],
) -> None:
    """Compare the tensors of `state` with those of the run that is about to continue it.

    Nothing is converted to fit, and nothing that is missing starts afresh.

    Args:
        state: what was read.
        adapter: all tensors of the run's adapter.
        parameters: those of them that are trained.
        layouts: what the optimizer keeps for each of these.

    Raises:
        ResumeError: a tensor is missing, surplus, of another shape or type, or not finite.
    """
    expected = {f"adapter/{name}": tensor for name, tensor in adapter.items()}
    if state.ema or state.recipe.optimisation.ema > 0:
        expected |= {f"ema/{name}": parameter for name, parameter in parameters.items()}
    # Steps that fp16's scaler skips leave the optimizer without tensors.
    if state.optimizer or (state.progress.step > 0 and not state.scaler):
        for name, parameter in parameters.items():
            for slot, shaped in layouts[name].items():
                expected[f"optimizer/{name}/{slot}"] = parameter if shaped else _NUMBERS[slot]
    found = _flat(state)
    problems = [f"{quote(key)} is missing" for key in expected if key not in found]
    problems += [f"{quote(key)} is not expected" for key in found if key not in expected]
    for key in (key for key in expected if key in found):
        tensor, shape, dtype = found[key], tuple(expected[key].shape), expected[key].dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            problems.append(
                f"{quote(key)} has shape {tuple(tensor.shape)} and type {tensor.dtype}, "
                f"expected {shape} and {dtype}"
            )
        elif not is_finite(tensor):
            problems.append(f"{quote(key)} is not finite ({describe(tensor)})")
        elif (
            key.startswith("optimizer/")
            and key.rpartition("/")[2] in NEVER_NEGATIVE
            and bool((tensor < 0).any())
        ):
            problems.append(f"{quote(key)} is negative")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ResumeError("the checkpoint does not fit this run: " + "; ".join(problems[:3]) + more)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by parameter name; empty before the first step.

    A number that belongs to a group of parameters is there for each of them, because groups have no names.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    return {
        name: {
            slot: optimizer.state[p][slot] if slot in optimizer.state[p] else _number(groups[p][slot])
            for slot in layouts[name]
        }
        for name, p in parameters.items()
        if optimizer.state.get(p)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    layouts: Mapping[str, Layout],
    saved: Mapping[str, dict[str, Tensor]],
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ResumeError: the parameters of a group have different numbers where these are the group's.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for number, p in enumerate(ordered):
        if slots := saved.get(names[p]):
            state[number] = {slot: tensor for slot, tensor in slots.items() if slot not in _OF_GROUPS}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for group in optimizer.param_groups:
        members = [saved[names[p]] for p in group["params"] if names[p] in saved]
        for slot in _OF_GROUPS & set(group) if members else ():
            first, *others = [float(slots[slot]) for slots in members]
            if any(other != first for other in others):
                raise ResumeError(f"the saved state has several values of {slot} for one group of parameters")
            group[slot] = type(group[slot])(first)


def _number(value: float) -> Tensor:
    """A number of a group of parameters as a state holds it, exactly."""
    return torch.tensor(float(value), dtype=torch.float64)


def settle_best_adapter(folder: RunFolder, best_epoch: int) -> bool:
    """Finish or undo a change that a crash cut short, for a state whose best adapter is of `best_epoch`.

    Returns:
        Whether the folder holds that adapter, or none is wanted yet (`best_epoch` = 0).

    Raises:
        OutputError: the system does not let it be found out; nothing has changed.
    """
    with writing(folder.adapter):
        if best_epoch > 0 and _epoch_of(folder.next_adapter) == best_epoch:
            os.replace(folder.next_adapter, folder.adapter)
        folder.next_adapter.unlink(missing_ok=True)
        return best_epoch == 0 or _epoch_of(folder.adapter) == best_epoch


def _epoch_of(adapter: Path) -> int | None:
    """The epoch that an adapter file was saved in; None for no file, and for one that is damaged.

    Raises:
        OSError: there is one, and the system cannot read it.
    """
    try:
        return read_adapter_info(adapter).extra.get("epoch")
    except AdapterFileError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        return None


def ended(settings: OptimisationSettings, progress: Progress) -> bool:
    """Whether a run that stands at `progress` has trained all it should."""
    exhausted = 0 < settings.early_stop <= progress.stale_evaluations
    between_epochs = progress.batch == 0  # the epoch of the last step is over when its end was seen to
    cut_short = steps_used_up(settings, progress) or progress.stopped is not None
    return progress.epoch >= settings.epochs or (between_epochs and cut_short) or exhausted


def steps_used_up(settings: OptimisationSettings, progress: Progress) -> bool:
    """Whether a run has taken as many optimizer steps as it may."""
    return steps_left(settings, progress) == 0


def steps_left(settings: OptimisationSettings, progress: Progress) -> float:
    """How many optimizer steps a run may still take; infinity where its epochs alone end it."""
    return math.inf if settings.max_steps is None else max(0, settings.max_steps - progress.step)
