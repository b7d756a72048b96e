"""What all custom operations share beside their kernels: the tensors they take, the derivatives they have.

An operation of `torch.library` drops the tangents of forward-mode AD without a word, and says of other
transformations only that it does not support them. Ours compute what can be computed, and say of everything
else what to do instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])
"""A function of any signature, for decorators that give back what they got."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What tensors of an operation may consist of."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""By the name of an operation the function that computes it."""
_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
"""Classes of tensors that are what they seem."""
_PLAIN_VALUES = frozenset({bool, int, float, str, torch.dtype, type(None)})
"""Classes of the other arguments of an operation."""


def operation(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator like `torch.library.custom_op` under the name vimtune::`name`, which does two things more.

    - Derivatives that the operation does not have raise an error instead of being 0: tangents of forward-mode
      AD, gradients under `torch.func`, and gradients of an operation without `register_autograd`.
    - Under `torch.func.vmap` it is called for one member after the other, where `register_vmap` does not
      say otherwise.
    """

    def define(function: Callable[..., Any]) -> CustomOpDef:
        """Register `function`, which computes the operation."""
        op = torch.library.custom_op(f"vimtune::{name}", function, mutates_args=())
        _FUNCTIONS[name] = function
        op.register_autograd(lambda ctx, *grads: _refuse(name, "no gradients (create_graph=True)"))
        op.register_vmap(lambda info, in_dims, *inputs: one_by_one(op, info.batch_size, in_dims, inputs))
        # Of all other results torch makes a batch itself.
        if get_origin(get_type_hints(function)["return"]) is list:
            refusal = "no batches of gradients (is_grads_batched=True, vectorize=True); use torch.func.vmap"
            op._lib.impl(name, lambda *inputs: _refuse(name, refusal), "Batched")
        _check_transformations(op, name)
        return op

    return define


def run(name: str, *inputs: Any) -> Any:
    """What `torch.ops.vimtune.<name>(*inputs)` returns, on the shortest way.

    torch's dispatcher takes a custom operation through several layers of Python, which cost the host some 60
    microseconds: as much as a whole kernel of a small model takes. They have something to do where the
    result is differentiated, transformed, traced or looked at by a mode. Everywhere else the function of the
    operation is called at once.
    """
    if torch.compiler.is_compiling() or not _concerns_nobody(inputs):
        return getattr(torch.ops.vimtune, name)(*inputs)
    return _FUNCTIONS[name](*inputs)


def constant_for_compiler(function: F) -> F:
    """Decorator: torch.compile calls the function while it traces, and takes the result for a constant."""
    return cast(F, torch.compiler.assume_constant_result(function))


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
        if tensor is None or (tensor.shape == shape and tensor.dtype in DTYPES and tensor.device == device):
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
    """The rule for vmap that fits every operation: compute each member and stack the results in front.

    Args:
        op: the operation.
        size: number of members.
        in_dims: for every input the dimension of the batch, or None.
        inputs: arguments of the operation.

    Raises:
        ValueError: there are no members, so that nothing says what a result looks like.
    """
    if size == 0:
        raise ValueError(f"{op} cannot be mapped over a dimension of size 0")
    results = [
        op(*(_member(value, dim, k) for value, dim in zip(inputs, in_dims, strict=True))) for k in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = type(results[0])(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, type(results[0])(0 for _ in stacked)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with adjacent numbers in its last dimension; views of a wider row pass as they are."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


# A custom operation returns a list of tensors, never None: gradients that were not asked for travel as empty
# tensors and become None again on the autograd side. All results are contiguous, whatever a backend makes of
# them: torch.compile relies on the strides of the fake ones.


def as_list(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Gradients as an operation returns them: contiguous, and for None an empty tensor like `like`."""
    return [like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients]


def as_optional(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients as autograd takes them: None where `needs` is False."""
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def wanted(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients in the dtypes of the tensors that they belong to, None where they are not needed."""
    return [
        gradient.to(tensor.dtype) if needed and gradient is not None and tensor is not None else None
        for gradient, tensor, needed in zip(gradients, inputs, needs, strict=True)
    ]


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Tensors of the shapes and dtypes that `as_list` returns for gradients of `inputs`."""
    return [
        tensor.new_empty(tensor.shape) if needed and tensor is not None else like.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]


def zero_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """The gradients where a tensor is empty and there is nothing to compute: zeros."""
    return [gradient.zero_() for gradient in fake_gradients(inputs, needs, like)]


def _refuse(name: str, what: str) -> NoReturn:
    """Raise NotImplementedError: the kernels lack this derivative, and the formula has it."""
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
        """Refuse what the kernels cannot differentiate, and else leave it to autograd."""
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            tensors = list(_tensors(inputs))
            if any(_has_tangent(tensor) for tensor in tensors):
                _refuse(name, "no forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors)")
            # What torch.library makes of a formula cannot be called while such a transformation is active.
            differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            if differentiated and torch._C._are_functorch_transforms_active():
                _refuse(name, "no gradients under torch.func (grad, vjp, jacrev), only under autograd")
        return differentiate(keyset, *inputs, **options)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        op._lib.impl(op._name, call, "Autograd", with_keyset=True, allow_override=True)


def _concerns_nobody(inputs: Sequence[Any]) -> bool:
    """Whether no part of torch wants to see an operation with these arguments."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    differentiates = torch.is_grad_enabled()
    return all(_is_plain(value, differentiates) for value in inputs)


def _is_plain(value: Any, differentiates: bool) -> bool:
    """Whether an argument of an operation is nothing but numbers, on a device that computes with them, and
    autograd, where it `differentiates`, has nothing to do with it."""
    kind = type(value)
    if kind in _PLAIN_VALUES:
        return True
    if kind in _PLAIN_TENSORS:
        if differentiates and value.requires_grad:
            return False
        # A batch of gradients (is_grads_batched) is of an ordinary class and says that it is on a CPU or GPU.
        keys = torch._C._dispatch_keys(value)
        return keys.has(torch._C.DispatchKey.CPU) or keys.has(torch._C.DispatchKey.CUDA)
    return isinstance(value, (list, tuple)) and all(_is_plain(part, differentiates) for part in value)


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode AD differentiates with respect to a tensor."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def _tensors(inputs: Sequence[Any]) -> Iterator[Tensor]:
    """All tensors among arguments of an operation, also those in lists."""
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _member(value: Any, dim: Any, index: int) -> Any:
    """An argument of vmap for one member of the batch; `dim` says where the batch is, None if nowhere."""
    if isinstance(dim, (list, tuple)):
        return [_member(part, where, index) for part, where in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, index)
