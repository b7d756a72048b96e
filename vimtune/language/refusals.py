"""What models on our operations refuse, because they would compute something else without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vimtune.adapters.slots import plain_class

PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seqlens")
"""Arguments that tell of sequences which lie behind each other in one row."""


class StatesRefused(ValueError):
    """A rule needs all tokens of a text at once, so that kept states and padding are not for it."""


_GUARD = "_vimtune_guard"
"""Attribute of a model that refuses packed sequences; it holds the handle of the hook. The handle is copied
and pickled with the model, which keeps torch from giving the number of the hook to another one."""


def refuse_packing(arguments: Mapping[str, Any]) -> None:
    """Refuse sequences that lie behind each other in one row: the state of one would enter the next.

    Raises:
        ValueError: `arguments` tell of such.
    """
    for name in PACKED:
        if arguments.get(name) is not None:
            raise ValueError(f"packed sequences ({name}) are not supported: give each a row of its own")


def _refuse_packing_before(module: nn.Module, positional: tuple[Any, ...], arguments: dict[str, Any]) -> None:
    """`refuse_packing` as a hook before the forward pass of a model."""
    refuse_packing(arguments)


def guard_against_packing(model: nn.Module) -> None:
    """Let a model of transformers, or all of those in a module, refuse packed sequences.

    Its mixers cannot do so: transformers' models accept such arguments and do not hand them on.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _GUARD not in module.__dict__:
            handle = module.register_forward_pre_hook(_refuse_packing_before, with_kwargs=True)
            module.__dict__[_GUARD] = handle


def may_be_read(part: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether the weights of a module say all of what a call of it does.

    That is so of the classes that a model is made of, with our rules or without. It is not of what somebody
    else has put in their place, such as the layers of other adapters and quantised ones, and not where hooks
    wait for a call.

    Args:
        part: the module.
        forward: what its class should compute, such as `nn.Linear.forward`.
    """
    return plain_class(part).forward is forward and not (part._forward_pre_hooks or part._forward_hooks)


def require_plain(owner: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    """Refuse a module of another class where weights are read that nobody calls, in transformers neither.

    Hooks are no reason: they do not run there either, and those that watch all modules of a model do no harm.

    Raises:
        ValueError: the module of `owner` by this name has another forward pass.
    """
    part = owner._modules[name]
    assert part is not None
    if plain_class(part).forward is not forward:
        raise ValueError(
            f"{name} of {type(owner).__name__} is a {type(part).__module__}.{type(part).__name__}, and its "
            "weights are read there without a call, so that what this class adds to them would do nothing: "
            "take it off, and adapt the place with vimtune.inject"
        )
