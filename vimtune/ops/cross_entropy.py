"""The operation `token_losses`, the cross entropy of every token with a large vocabulary.

Beside the logits of a language model everything else is small. PyTorch's cross entropy copies them to fp32,
keeps their log-softmax, and makes a gradient of the same size in fp32 as well. Here they are read as they
are, once for the losses and once for the gradient, which has their own dtype.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.operation import check_inputs, operation, run

IGNORED = -100
"""The label of a token that is not counted, as in PyTorch's cross entropy."""


class LossInputs(NamedTuple):
    """Tensors of the loss; contiguous in kernels."""

    logits: Tensor
    """(T, V)"""
    labels: Tensor
    """(T,), int64: a token each, or `IGNORED`."""


class LossKernels(Kernels[LossInputs]):
    """Kernels of the loss. Results are contiguous and new tensors; inputs are never empty."""

    operation = "token_losses"

    @abstractmethod
    def forward(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """The losses, 0 where the label is `IGNORED`, and the logarithm of the sum of exponentials of every
        row; both (T,) in fp32."""

    @abstractmethod
    def backward(self, grad: Tensor, inputs: LossInputs, log_sums: Tensor) -> Tensor:
        """Gradient of the logits (T, V), in their dtype.

        Args:
            grad: gradient of the losses (T,), contiguous.
            inputs: those of `forward`.
            log_sums: second result of `forward`.
        """


def token_losses(logits: Tensor, labels: Tensor, backend: str = "auto") -> Tensor:
    """Minus the log-likelihood of each label, (T,) in fp32 (fp64 for fp64 logits); 0 where it is -100.

    The formula is that of `vimtune.ops.reference.token_losses`. T may be 0.

    Args:
        logits: (T, V).
        labels: (T,), int64: a token each, or -100.
        backend: see `vimtune.ops`.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors of other types.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be (T, V), got {tuple(logits.shape)}")
    check_inputs(logits.device, logits=(logits, tuple(logits.shape)))
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or labels.device != logits.device:
        raise ValueError(
            f"labels must be {(len(logits),)}, int64 and on {logits.device}; got {tuple(labels.shape)}, "
            f"{labels.dtype} and {labels.device}"
        )
    name = find_backend(LossKernels, backend, logits.device, LossInputs(logits, labels))
    if not name:
        return reference.token_losses(logits, labels)
    losses: Tensor = run("token_losses", logits, labels, name)[0]
    return losses


@operation("token_losses")
def _losses(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The losses, and the logarithm of the sum of exponentials of every row."""
    if logits.numel() == 0:
        return _empty_results(logits)
    inputs = LossInputs(logits.contiguous(), labels.contiguous())
    return find_kernels(LossKernels, backend, logits.device, inputs)[1].forward(inputs)


@_losses.register_fake
def _(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_results(logits)


def _empty_results(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like those that the kernels return."""
    shape = logits.shape[:1]
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.float32)


@operation("token_losses_backward")
def _losses_backward(grad: Tensor, logits: Tensor, labels: Tensor, log_sums: Tensor, backend: str) -> Tensor:
    """Gradient of the logits."""
    if logits.numel() == 0:
        return torch.empty_like(logits)
    inputs = LossInputs(logits.contiguous(), labels.contiguous())
    _, kernels = find_kernels(LossKernels, backend, logits.device, inputs)
    return kernels.backward(grad.contiguous(), inputs, log_sums)


@_losses_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor, log_sums: Tensor, backend: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward pass needs."""
    logits, labels, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _grad_sums: None) -> tuple[Tensor | None, None, None]:
    """Gradients of all arguments; None for those that have none."""
    if grad is None:
        return None, None, None
    return run("token_losses_backward", grad, *ctx.saved_tensors, ctx.backend), None, None


_losses.register_autograd(_autograd, setup_context=_setup)
