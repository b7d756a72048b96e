"""What training changes: the tensors of the adapter, their optimizer, their average and the loss scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimtune import adapters
from vimtune.adapters.tensors import check_tensors as check_adapter_tensors
from vimtune.adapters.tensors import check_values
from vimtune.recipe.components import OptimisationSettings
from vimtune.recipe.optimizers import OPTIMIZERS
from vimtune.runtime.precision import build_scaler
from vimtune.training.identity import ResumeError
from vimtune.training.layers import layer_rates
from vimtune.training.optim import Average, OptimizerAverage, WeightAverage, build_optimizer, is_matrix
from vimtune.training.sharding import Placement, piece
from vimtune.training.state import RunState, check_tensors, optimizer_tensors, restore_optimizer

TRAINED = "default"
"""Name of the adapter that is trained."""


@dataclass
class Trained:
    """All that a run changes step by step, and that its state therefore holds."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """The trained tensors by their names in adapter files."""
    optimizer: torch.optim.Optimizer
    layouts: dict[str, dict[str, bool]]
    """What the optimizer keeps for each parameter, see `OptimizerKind.layout`."""
    average: Average | None
    scaler: torch.amp.GradScaler
    placement: Placement
    """Where the model lies; of a sharded one all tensors here are pieces."""

    def set_training_mode(self) -> None:
        """Put the model into training mode, but for its batch normalisation.

        The running means and variances there are the base model's and in no adapter file. They stay what
        they are and are used in training as in evaluation, so that what is trained is what the file gives.
        """
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.eval()

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def scored(self) -> dict[str, Tensor]:
        """The tensors with which the model is evaluated and saved: the averages, if there are any."""
        return dict(self.average.tensors if self.average else self.parameters)

    def averaged(self) -> AbstractContextManager[None]:
        """The model with averaged weights, if the run averages them, for the length of a block."""
        return self.average.applied() if self.average else nullcontext()

    def adapter(self) -> dict[str, Tensor]:
        """The whole tensors of the adapter as the model has them now; all processes call this together, and
        the main process at least gets them."""
        return self.placement.gather(adapters.adapter_state_dict(self.model, TRAINED))

    def tensors(self) -> dict[str, Any]:
        """The fields `adapter`, `optimizer`, `ema` and `scaler` of a `RunState`; like `adapter`."""
        gather = self.placement.gather
        optimizer = optimizer_tensors(self.optimizer, self.parameters, self.layouts)
        return {
            "adapter": self.adapter(),
            "optimizer": {name: gather(slots) for name, slots in optimizer.items()},
            "ema": gather(self.average.saved()) if self.average else {},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: RunState) -> None:
        """Continue from a state.

        Raises:
            ResumeError: its tensors are not those of this run.
        """
        check_tensors(saved, adapters.adapter_state_dict(self.model, TRAINED), self.parameters, self.layouts)
        try:
            check_values(self.model, saved.adapter, TRAINED)
        except ValueError as error:
            raise ResumeError(f"the saved state does not fit the run: {error}") from error
        self._load(saved.adapter)
        optimizer = {
            name: {slot: self._share(name, tensor) for slot, tensor in slots.items()}
            for name, slots in saved.optimizer.items()
        }
        restore_optimizer(self.optimizer, self.parameters, self.layouts, optimizer)
        if self.average is not None:
            averages = saved.ema or saved.adapter
            self.average.restore({name: self._share(name, averages[name]) for name in self.parameters})
        if self.scaler.is_enabled() and saved.scaler:
            self.scaler.load_state_dict(saved.scaler)

    @contextmanager
    def exchanged(self, adapter: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with these whole tensors of a file, for the length of a block.

        Raises:
            ValueError: they are not those of this adapter.
        """
        own = adapters.adapter_state_dict(self.model, TRAINED)
        check_adapter_tensors(adapter, own)
        check_values(self.model, adapter, TRAINED)
        kept = {name: tensor.clone() for name, tensor in own.items()}
        self._load(adapter)
        try:
            yield
        finally:
            for name, tensor in own.items():
                tensor.copy_(kept[name])

    def _load(self, adapter: Mapping[str, Tensor]) -> None:
        for name, tensor in adapters.adapter_state_dict(self.model, TRAINED).items():
            tensor.copy_(self.placement.share(adapter[name], tensor))

    def scores_as(self, adapter: Mapping[str, Tensor]) -> bool:
        """Whether the model is evaluated with the very values of these whole tensors."""
        scored = self.scored
        same = adapter.keys() == scored.keys() and all(
            torch.equal(piece(self.placement.share(adapter[name], tensor)), piece(tensor))
            for name, tensor in scored.items()
        )
        return not self.placement.any(not same)

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        """What belongs to a parameter, as this process needs it; a count of steps is no matter of shares."""
        return tensor if tensor.dim() == 0 else self.placement.share(tensor, self.parameters[name])


def build_trained(settings: OptimisationSettings, model: nn.Module, placement: Placement) -> Trained:
    """The optimizer, average and loss scale that `settings` ask for, over what the adapter of `model` trains.

    The model lies where `placement` has put it.

    Raises:
        ValueError: the adapter trains nothing.
    """
    entries = list(adapters.adapter_parameters(model))
    parameters: dict[str, nn.Parameter] = {entry.key: entry.parameter for entry in entries}
    optimizer = build_optimizer(
        entries,
        name=settings.opt,
        lr=settings.lr,
        head_lr=settings.head_lr,
        weight_decay=settings.weight_decay,
        betas=None if settings.betas is None else (settings.betas[0], settings.betas[1]),
        momentum=settings.momentum,
        layer_rates=layer_rates(model, entries, settings.layer_decay) if settings.layer_decay < 1 else None,
    )
    kind = OPTIMIZERS[settings.opt]
    layouts = {entry.key: kind.layout(is_matrix(entry)) for entry in entries}
    average: Average | None = None
    if kind.averages:
        average = OptimizerAverage(parameters, optimizer)
    elif settings.ema > 0:
        average = WeightAverage(parameters, settings.ema)
    scaler = build_scaler(settings.amp, placement.processes.device)
    return Trained(model, parameters, optimizer, layouts, average, scaler, placement)
