"""Where the rules of an adapter go, and what is refused there before anything of the model has changed.

A site is a parameter that gets a rule, named by its path. A rule that would be silently without effect,
or act on another tensor than the model computes with, is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vimtune import parsers
from vimtune.adapters.base import Method
from vimtune.adapters.rule import Chain, WeightRule, base_value, can_act_on_input, ever_acts_on_input, join
from vimtune.adapters.wrappers import refuse_container, refuse_opaque, unwrap
from vimtune.text import quote

Targets = str | list[str] | dict[str, str | list[str]] | None
Layers = list[int] | dict[str, list[int]] | None
Sites = dict[str, list[str]]
"""Paths of the parameters that each method of an adapter acts on; the head's are not among them."""


def parse_targets(value: Any) -> Targets:
    """`targets` of `inject` as plain values.

    Raises:
        ValueError: neither text, nor a list of texts, nor a mapping from methods to these.
    """
    return _parse("targets", value, parsers.per_method(parsers.targets))


def parse_layers(value: Any) -> Layers:
    """`layers` of `inject` as plain values; text as on the command line ("0-11") is understood.

    Raises:
        ValueError: no block indices, nor a mapping from methods to these.
    """
    if isinstance(value, range):
        value = list(value)
    return _parse("layers", value, parsers.per_method(parsers.layers))


def _parse(what: str, value: Any, parse: parsers.Parser) -> Any:
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise ValueError(f"{what} = {quote(value)}: {error}") from None


def find_backbone(model: nn.Module) -> nn.Module:
    """The model inside known wrappers, if an adapter can be added to it.

    Raises:
        ValueError: a container of the model that is meant, or a model whose parameters are not its own.
    """
    backbone = unwrap(model, retrains=True)
    refuse_container(backbone)
    for path, module in backbone.named_modules():
        refuse_opaque(module)
        for name, kind in _recomputed(module):
            raise ValueError(
                f"{join(path, name)} is computed from other tensors ({kind}): make it a plain parameter "
                "first (remove_parametrizations, prune.remove, remove_weight_norm, remove_spectral_norm)"
            )
    return backbone


def select_sites(
    model: nn.Module, methods: Sequence[Method], targets: Targets, layers: Layers, head: Sequence[str]
) -> Sites:
    """Let each method choose its parameters; those of the head, which are trained anyway, are left out.

    Raises:
        ValueError: a target or layer that the model does not have, or a method that nothing is left for.
    """
    names = [method.name for method in methods]
    for what, value in (("targets", targets), ("layers", layers)):
        for name in value if isinstance(value, dict) else ():
            if name not in names:
                expected = ", ".join(names)
                raise ValueError(f"{what}: {quote(name)} is no method of this adapter ({expected})")
    sites = {}
    for method in methods:
        sites[method.name] = [path for path in selected(method, model, targets, layers) if path not in head]
        if not sites[method.name] and not method.trains_head_only:
            own = _of(method, targets)
            where = "its own choice of targets" if own is None else f"targets {quote(own)}"
            raise ValueError(
                f"method {method.name!r} would train nothing with {where}: the head is trained in any case. "
                "Choose other targets, or method 'linear' for the head alone"
            )
    return sites


def selected(method: Method, model: nn.Module, targets: Targets, layers: Layers) -> list[str]:
    """What one of several methods chooses; paths of the head may be among it."""
    return method.select(model, _of(method, targets), _of(method, layers))


def _of(method: Method, value: Any) -> Any:
    """The part of targets or layers that is for this method."""
    return value.get(method.name) if isinstance(value, dict) else value


def build_rules(
    model: nn.Module, methods: Sequence[Method], sites: Sites, accept_idle: bool
) -> dict[str, WeightRule]:
    """The rules of an adapter by path; several methods at one site make a `Chain`.

    Args:
        model: the backbone.
        methods: the methods, in the order in which they are applied.
        sites: where they act.
        accept_idle: let rules pass that are without effect in part.

    Raises:
        ValueError: a rule that the parameter cannot take, or that would be without effect.
    """
    rules: dict[str, WeightRule] = {}
    for method in methods:
        for path in sites[method.name]:
            owner, parameter = find_owner(model, path)
            rule = method.build_rule(path, base_value(owner, parameter))
            if not accept_idle and ever_acts_on_input(rule) and not can_act_on_input(owner, parameter):
                raise ValueError(
                    f"method {method.name!r} with these options acts on the input of a layer (as dropout "
                    f"does), but the model only reads {path} and calls no layer there: leave dropout at 0 "
                    "or choose other targets"
                )
            if path not in rules:
                rules[path] = rule
                continue
            if not accept_idle:
                _refuse_idle_pair(path, rules[path], method.name, rule)
            rules[path] = Chain(rules[path], rule)
    return rules


def _refuse_idle_pair(path: str, first: WeightRule, method: str, second: WeightRule) -> None:
    if second.replaces:
        raise ValueError(
            f"method {method!r} replaces {path} as a whole, so the methods before it would have no effect: "
            "name it first, or give the methods different targets"
        )
    if ever_acts_on_input(first):
        raise ValueError(
            f"method {method!r} would follow one that acts on the input of {path} (as dropout does) and "
            "leaves it no weight to build on: leave dropout at 0 for all but the last method there"
        )


def check_sites(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse parameters that no rule can be attached to.

    Raises:
        ValueError: naming the parameter and the reason.
    """
    places = _places(model)
    for path in paths:
        parameter = base_value(*find_owner(model, path))
        if len(places[id(parameter)]) > 1:
            raise ValueError(
                f"{' and '.join(places[id(parameter)])} are one tensor: with a rule for one of them they "
                "would come apart. Untie them (give each a copy) or choose other targets"
            )
        if reason := _unfit(parameter):
            raise ValueError(f"{path} cannot take a rule: {reason}")


def _recomputed(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, how) of the tensors of `module` that are no parameters because they are made from others."""
    if parametrize.is_parametrized(module):
        yield from ((name, "parametrization") for name in module.parametrizations)  # type: ignore[union-attr]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, "pruning"
        elif isinstance(hook, WeightNorm | SpectralNorm):
            yield hook.name, type(hook).__name__


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Paths of each parameter by its id; more than one where modules share a tensor. A module that is
    used in several places is one place."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(join(path, name))
    return places


def _unfit(parameter: nn.Parameter) -> str | None:
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}, and rules are for plain tensors on one device"
    if not parameter.is_floating_point():
        return f"it is of {parameter.dtype}, and rules are for floating-point weights"
    return None


def find_owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """(module, parameter name) of the parameter at `path`."""
    module_path, _, parameter = path.rpartition(".")
    return model.get_submodule(module_path), parameter
