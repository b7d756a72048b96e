"""The operation `membrane`: membranes that leak and integrate in the place of gates.

It is what Memba (arXiv 2506.18184) does to some columns of the output of in_proj. The formula is that of
`vimtune.ops.reference.membrane`, which computes it where no backend has kernels for it. As one operation it
reads and writes everything once in either direction. Where a membrane has fired, its result holds -0.0, which
stands nowhere else among the membranes: so the backward pass needs nothing but the result, which the scan
that follows keeps anyway.

Shape letters: B batch, L tokens, W columns of which E are gates, T chunks of c tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.operation import as_list, as_optional, check_inputs, operation, run


class MembraneOptions(NamedTuple):
    """How membranes run through the gates; the arguments of `membrane` that are no tensors."""

    first: int
    """The first column of the gates."""
    width: int
    """E, the number of their columns."""
    chunks: int | None
    """T; None for chunks of `length` tokens."""
    length: int
    """Tokens of a chunk if there is no T."""
    tau: float
    """How much of a membrane the next one keeps."""
    threshold: float
    """Above it a membrane fires."""

    def cut(self, tokens: int) -> tuple[int, int]:
        """c, and how many of the tokens belong to chunks: all without T, else T c, the first ones."""
        if self.chunks is None:
            return min(self.length, tokens), tokens
        return tokens // self.chunks, tokens // self.chunks * self.chunks

    def start_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the membrane before the first chunk of `x`, (B, c, E)."""
        return x.shape[0], self.cut(x.shape[1])[0], self.width

    def mean_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the mean membrane of T chunks of `x`, (B, c, E); (0,) without T."""
        return (0,) if self.chunks is None else self.start_shape(x)


class MembraneInputs(NamedTuple):
    """Tensors of the operation, in the order of their gradients. Both are contiguous."""

    x: Tensor
    """(B, L, W)"""
    start: Tensor | None
    """The membrane before the first chunk, (B, c, E) in the dtype of `x`; None for 0."""


class MembraneKernels(Kernels[MembraneInputs]):
    """Kernels of the membranes. Results are contiguous and new tensors; inputs are never empty."""

    operation = "membrane"

    @abstractmethod
    def forward(self, inputs: MembraneInputs, options: MembraneOptions) -> tuple[Tensor, Tensor]:
        """`x` with membranes for its gates, -0.0 where they have fired and nowhere else, and their mean."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        grad_mean: Tensor | None,
        result: Tensor,
        options: MembraneOptions,
        need_start: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of `x` and, if it is needed, of `start`.

        Args:
            grad: that of the first result (B, L, W), contiguous.
            grad_mean: that of the mean (B, c, E), contiguous; None for 0.
            result: the first result of `forward`.
            options: those of `forward`.
            need_start: whether the gradient of `start` is wanted.
        """


def membrane(
    x: Tensor,
    start: Tensor | None,
    *,
    first: int,
    width: int,
    chunks: int | None,
    length: int,
    tau: float,
    threshold: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Membranes in the place of the columns `first` to `first + width` of `x` (B, L, W).

        u_(i+1) = fire(tau u_i + z_i),     fire(v) = 0 if v > threshold else v

    z_i are the gates of chunk i, u_0 is `start`. Of T chunks, tokens that are left over have no predecessors;
    without T the last chunk may be shorter, and a chunk has at most L tokens.

    Args:
        x: (B, L, W).
        start: (B, c, E), or None for 0; c is L // T, without T the smaller one of `length` and L.
        first: first column of the gates.
        width: E.
        chunks: T, or None for chunks of `length` tokens.
        length: tokens of a chunk if there is no T.
        tau: how much of a membrane the next one keeps.
        threshold: above it a membrane fires.
        backend: see `vimtune.ops`.

    Returns:
        The changed `x`, and the mean of u_1 .. u_T (B, L // T, E), without T an empty tensor; both in the
        dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or more chunks than tokens.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which the kernels of a
            backend lack and `backend="reference"` has.
    """
    options = MembraneOptions(first, width, chunks, length, tau, threshold)
    _check(x, start, options)
    start = None if start is None else start.to(x.dtype)
    name = find_backend(MembraneKernels, backend, x.device, MembraneInputs(x, start))
    if not name:
        return reference.membrane(x, start, *options)
    result, mean = run("membrane", x, start, *options, name)
    return result, mean


def _check(x: Tensor, start: Tensor | None, options: MembraneOptions) -> None:
    """Raise ValueError for tensors that do not fit together."""
    first, width = options.first, options.width
    if x.dim() != 3 or first < 0 or width < 1 or first + width > x.shape[2]:
        raise ValueError(f"x must be (B, L, W) with {width} columns from {first} on, got {tuple(x.shape)}")
    if options.chunks is not None and 0 < x.shape[1] < options.chunks:
        raise ValueError(
            f"chunks = {options.chunks} of {x.shape[1]} tokens: no chunk would have a token, expected at "
            "most one chunk for each token"
        )
    check_inputs(x.device, x=(x, tuple(x.shape)), start=(start, options.start_shape(x)))


# About the spelling of annotations see `scan.py`.


@operation("membrane")
def _membrane(
    x: Tensor,
    start: Optional[Tensor],  # noqa: UP045
    first: int,
    width: int,
    chunks: Optional[int],  # noqa: UP045
    length: int,
    tau: float,
    threshold: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The changed x and the mean."""
    options = MembraneOptions(first, width, chunks, length, tau, threshold)
    if x.numel() == 0:
        return x.new_empty(x.shape), x.new_zeros(options.mean_shape(x))
    inputs = MembraneInputs(x.contiguous(), None if start is None else start.contiguous())
    _, kernels = find_kernels(MembraneKernels, backend, x.device, inputs)
    return kernels.forward(inputs, options)


@_membrane.register_fake
def _(x: Tensor, start: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    options = MembraneOptions(*arguments[:-1])
    return x.new_empty(x.shape), x.new_empty(options.mean_shape(x))


@operation("membrane_backward")
def _membrane_backward(
    grad: Tensor,
    grad_mean: Optional[Tensor],  # noqa: UP045
    result: Tensor,
    first: int,
    width: int,
    chunks: Optional[int],  # noqa: UP045
    length: int,
    tau: float,
    threshold: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x and start."""
    options = MembraneOptions(first, width, chunks, length, tau, threshold)
    if result.numel() == 0:
        return [found.zero_() for found in _fake_gradients(result, options, needs)]
    inputs = MembraneInputs(result, None)
    _, kernels = find_kernels(MembraneKernels, backend, result.device, inputs)
    if grad_mean is not None:
        grad_mean = grad_mean.contiguous() if grad_mean.numel() > 0 else None
    grad_x, grad_start = kernels.backward(grad.contiguous(), grad_mean, result, options, needs[1])
    return as_list([grad_x if needs[0] else None, grad_start], result)


@_membrane_backward.register_fake
def _(grad: Tensor, grad_mean: Tensor | None, result: Tensor, *arguments: Any) -> list[Tensor]:
    *options, _backend, needs = arguments
    return _fake_gradients(result, MembraneOptions(*options), needs)


def _fake_gradients(result: Tensor, options: MembraneOptions, needs: list[bool]) -> list[Tensor]:
    """Tensors like the gradients of x and start, empty where they are not needed."""
    shapes = result.shape, options.start_shape(result)
    return [result.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the result."""
    _, _, *ctx.others = inputs
    ctx.save_for_backward(output[0])
    ctx.set_materialize_grads(False)  # The mean of the last layer is read by nobody.


def _autograd(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    (result,) = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grad = torch.zeros_like(result) if grad is None else grad
    found = run("membrane_backward", grad, grad_mean, result, *ctx.others, needs)
    return *as_optional(found, needs), *[None] * len(ctx.others)


_membrane.register_autograd(_autograd, setup_context=_setup)
