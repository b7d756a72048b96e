"""Finding where a non-finite value arises, by replaying the batch with hooks on every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vimtune.training.sharding import piece


class NonFiniteError(ValueError):
    """The run met inf or NaN; the message names the place where it first appears."""


def describe(tensor: Tensor) -> str:
    """How much of a tensor is non-finite, and how large the rest is."""
    tensor = tensor.detach().float()
    finite = torch.isfinite(tensor)
    largest = f"{tensor[finite].abs().max().item():.3g}" if bool(finite.any()) else "none"
    return f"{int((~finite).sum())} of {tensor.numel()} values, largest finite magnitude {largest}"


def find_nonfinite(
    model: nn.Module,
    inputs: Mapping[str, Any],
    run: Callable[[], Any],
    *,
    backward: bool,
    anywhere: Callable[[bool], bool] = bool,
) -> str | None:
    """Name the first place where a non-finite value arises in `run()`, which calls `model` with `inputs`.

    It looks in this order: at the inputs, the weights, the activations (the first module to finish that
        returns a non-finite value) and, with `backward`, at the loss, the gradients of activations and those
        of weights.

    Args:
        model: the model, on whose modules hooks are put for the time of the call.
        inputs: tensors by the names that the message gives them.
        run: returns the model's outputs, or, with `backward`, the loss.
        backward: whether to look at the loss and the gradients. The model's gradients are then overwritten.
        anywhere: whether something is true in this process or in another one that looks along with it
            (`Placement.any`). None of them then goes on to a pass that the others do not run.

    Returns:
        The place in words; None when everything is finite in this process.
    """
    place = _find_at_rest(model, inputs)
    if anywhere(place is not None):
        return place
    with torch.no_grad(), _watch_activations(model) as found:
        result = run()
    if found:
        place = found[0]
    elif not is_finite(result):
        place = "the loss; the outputs of all modules are finite: look at the labels"
    if anywhere(place is not None):
        return place
    return _find_in_backward(model, run) if backward else None


def _find_at_rest(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Name the first of the inputs and weights that is not finite."""
    for name, value in inputs.items():
        if not is_finite(value):
            bad = next(tensor for tensor in _tensors(value) if not is_finite(tensor))
            return f"the input {name} ({describe(bad)}): look at the data and their normalisation"
    weights = {name: piece(parameter) for name, parameter in model.named_parameters()}
    if broken := {name: weight for name, weight in weights.items() if not is_finite(weight)}:
        name, tensor = next(iter(broken.items()))
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f"the weight {name}{more} ({describe(tensor)}): it was so before this step"
    return None


def is_finite(value: Any) -> bool:
    """Whether every floating-point tensor in `value` (tensor, tuple, list, dict) is finite."""
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value))


def finite_flag(value: Any, device: torch.device) -> Tensor:
    """`is_finite` as a scalar on the device, for which nobody waits."""
    flags = [torch.isfinite(tensor).all() for tensor in _tensors(value)]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _title(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


@contextmanager
def _watch_activations(model: nn.Module) -> Iterator[list[str]]:
    """Collect the modules that return non-finite values, the first to finish first."""
    found: list[str] = []

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not is_finite(output):
                bad = next(t for t in _tensors(output) if not is_finite(t))
                seen = [describe(t) for t in _tensors(inputs)]
                given = f"; its input: {seen[0]}" if seen else ""
                found.append(f"the output of {_title(name, module)}: {describe(bad)}{given}")

        return hook

    handles = [m.register_forward_hook(hook_for(name)) for name, m in model.named_modules()]
    try:
        yield found
    finally:
        _remove(handles)


def _find_in_backward(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    finite: list[str] = []
    found: list[str] = []

    def watch(title: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if found:
                return
            if is_finite(gradient):
                finite.append(title)
            else:
                origin = f"the backward of {finite[-1]}" if finite else "the gradient of the loss"
                found.append(f"{origin}: the gradient it passes to {title} has {describe(gradient)}")

        return hook

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(watch(_title(name, module)))

        return hook

    handles: list[RemovableHandle] = [
        m.register_forward_hook(hook_for(name)) for name, m in model.named_modules()
    ]
    model.zero_grad(set_to_none=True)
    try:
        loss().backward()
    finally:
        _remove(handles)
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(gradient := piece(parameter.grad)):
            return f"the gradient of {name} ({describe(gradient)})"
    return None


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
