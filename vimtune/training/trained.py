"""What training changes: the tensors of the adapter, their optimizer, their average and the loss scale."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimtune import adapters
from vimtune.recipe.components import OptimisationSettings
from vimtune.training.optim import WeightAverage, build_optimizer
from vimtune.training.precision import build_scaler
from vimtune.training.state import RunState, check_tensors, optimizer_tensors, restore_optimizer

TRAINED = "default"
"""Name of the adapter that is trained; at the end another one, read from the file, is scored beside it."""


@dataclass
class Trained:
    """All that a run changes step by step, and that its state therefore holds."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """The trained tensors by their names in adapter files."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    scaler: torch.amp.GradScaler

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

    def tensors(self) -> dict[str, Any]:
        """The fields `adapter`, `optimizer`, `ema` and `scaler` of a `RunState`."""
        return {
            "adapter": adapters.adapter_state_dict(self.model, TRAINED),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            "ema": self.average.tensors if self.average else {},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: RunState) -> None:
        """Continue from a state.

        Raises:
            ResumeError: its tensors are not those of this run.
        """
        check_tensors(saved, adapters.adapter_state_dict(self.model, TRAINED), self.parameters)
        adapters.load_adapter_state_dict(self.model, saved.adapter, TRAINED)
        restore_optimizer(self.optimizer, self.parameters, saved.optimizer)
        if self.average is not None:
            self.average.restore(saved.ema or saved.adapter)
        if self.scaler.is_enabled() and saved.scaler:
            self.scaler.load_state_dict(saved.scaler)


def build_trained(settings: OptimisationSettings, model: nn.Module, device: torch.device) -> Trained:
    """The optimizer, average and loss scale that `settings` ask for, over what the adapter of `model` trains.

    Raises:
        ValueError: the adapter trains nothing.
    """
    entries = list(adapters.adapter_parameters(model))
    parameters: dict[str, nn.Parameter] = {entry.key: entry.parameter for entry in entries}
    optimizer = build_optimizer(
        entries,
        lr=settings.lr,
        head_lr=settings.head_lr,
        weight_decay=settings.weight_decay,
        betas=(settings.betas[0], settings.betas[1]),
    )
    average = WeightAverage(parameters, settings.ema) if settings.ema > 0 else None
    return Trained(model, parameters, optimizer, average, build_scaler(settings.amp, device))
