"""What all custom operations have in common, beside their kernels: which tensors and which derivatives.

An operation of `torch.library` drops the tangents of forward-mode AD without a word, and says of other
transformations only that it does not support them. Ours compute what can be computed, and say of everything
else what to do instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import CustomOpDef

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def operation(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: `torch.library.custom_op` by the name of vimtune::`name`, and beyond that

    - derivatives that it has not raise an error instead of being 0: tangents of forward-mode AD, gradients
      under `torch.func`, and gradients of an operation without `register_autograd`,
    - under `torch.func.vmap` it is called for one member after the other, where `register_vmap` does not
      say otherwise.
    """

    def define(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(f"vimtune::{name}", function, mutates_args=())
        op.register_autograd(lambda ctx, *grads: _refuse(name, "no gradients (create_graph=True)"))
        op.register_vmap(lambda info, in_dims, *inputs: one_by_one(op, info.batch_size, in_dims, inputs))
        if get_origin(get_type_hints(function)["return"]) is list:  # of all others torch makes a batch itself
            refusal = "no batches of gradients (is_grads_batched=True, vectorize=True); use torch.func.vmap"
            op._lib.impl(name, lambda *inputs: _refuse(name, refusal), "Batched")
        _check_transformations(op, name)
        return op

    return define


def check_inputs(
    device: torch.device, label: str = "", /, **inputs: tuple[Tensor | None, tuple[int, ...]]
) -> None:
    """Check tensors, given by name with the shape that each should have. None stands for no tensor.

    `label` stands before the names in messages.

    Raises:
        ValueError: another shape, another device than `device`, or a dtype that no kernel has.
    """
    wrong = []
    for name, (tensor, shape) in inputs.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            wrong.append(f"{label}{name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.dtype not in DTYPES:
            wrong.append(f"{label}{name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")
        if tensor.device != device:
            wrong.append(f"{label}{name} is on {tensor.device}, expected {device}")
    if wrong:
        raise ValueError("inputs do not fit together: " + "; ".join(wrong))


def one_by_one(op: CustomOpDef, size: int, in_dims: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, Any]:
    """The rule for vmap that fits every operation: results of all members, stacked in front."""
    if size == 0:
        raise ValueError(f"{op} cannot be mapped over a dimension of size 0")
    results = [
        op(*(_member(value, dim, k) for value, dim in zip(inputs, in_dims, strict=True))) for k in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = type(results[0])(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, type(results[0])(0 for _ in stacked)


def _refuse(name: str, what: str) -> NoReturn:
    raise NotImplementedError(
        f"the kernels of vimtune::{name} have {what}; compute the forward pass within "
        f'`with vimtune.ops.use_backend("reference"):`, where torch differentiates the formula in every way'
    )


def _check_transformations(op: CustomOpDef, name: str) -> None:
    """Let `op` look for transformations before it is differentiated by its formula.

    Here every one of nested transformations is seen by itself, and a tensor that it leaves alone is no
    reason to refuse. Graphs made by torch.fx, TorchScript and torch.compile come by, too.
    """
    differentiate = make_autograd_impl(op._opoverload, op)

    def call(keyset: Any, *inputs: Any, **options: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            tensors = list(_tensors(inputs))
            if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
                _refuse(name, "no forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors)")
            # What torch.library makes of a formula cannot be called while such a transformation is active.
            differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            if differentiated and torch._C._are_functorch_transforms_active():
                _refuse(name, "no gradients under torch.func (grad, vjp, jacrev), only under autograd")
        return differentiate(keyset, *inputs, **options)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        op._lib.impl(op._name, call, "Autograd", with_keyset=True, allow_override=True)


def _tensors(inputs: Sequence[Any]) -> Iterator[Tensor]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _member(value: Any, dim: Any, index: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_member(part, where, index) for part, where in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, index)
