"""Where the rules of an adapter go: from targets to sites, and from sites to attached rules.

A rule that would be silently without effect, or act on another tensor than the model computes with, is
refused with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vimtune import parsers
from vimtune.adapters.composition import Composition, Nesting, Rows, overlap, single_rules
from vimtune.adapters.memory import Memory
from vimtune.adapters.points import Point, Points
from vimtune.adapters.rule import CallRule, Rule, WeightRule
from vimtune.adapters.slots import (
    CALL,
    WeightSlot,
    attach,
    base_parameters,
    base_value,
    has_rules,
    join,
    share,
    slots_of,
)
from vimtune.adapters.targets import Target, refuse_overlaps, short_name, split_option_targets, split_targets
from vimtune.adapters.wrappers import refuse_container, refuse_opaque, unwrap
from vimtune.methods import Method
from vimtune.text import quote

Targets = str | list[str] | dict[str, str | list[str]] | None
"""Targets as `inject` takes them: those of the method, or of each method by its name; None is its default."""
Layers = list[int] | dict[str, list[int]] | None
"""Indices of the blocks to adapt, for all methods or for each by its name; None stands for all blocks."""
Sites = dict[str, list[str]]
"""Paths of the points where each method of an adapter acts; those of the head are not among them."""


@dataclass(frozen=True, eq=False)
class Site:
    """One point where a method acts, as the method sees it."""

    path: str
    """Path of the point: "layers.3.mixer.x_proj.weight[B]", "layers.3.mixer.scan()"."""
    owner: nn.Module
    """The module that has the parameter or is called."""
    value: Tensor | None
    """The value so far, with the rules of the methods before this one, of these rows alone; detached. None
    for a call."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method that were given for this target alone."""
    model: nn.Module | None = None
    """The model that it is a point of, for what the owner does not know, such as the place of the class
    token."""

    @property
    def weight(self) -> Tensor:
        """`value` of a parameter.

        Raises:
            ValueError: the site is a call.
        """
        if self.value is None:
            raise ValueError(
                f"{self.path} is a call, and this method changes parameters: choose other targets"
            )
        return self.value

    @property
    def is_call(self) -> bool:
        """Whether the site is a call."""
        return self.value is None

    def new_empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor with the dtype and device of the value or, for a call, of its module."""
        like = self.value
        if like is None:
            like = next((parameter for _, parameter in base_parameters(self.owner)), torch.empty(0))
        return torch.empty(shape, dtype=like.dtype, device=like.device)


# --- arguments of `inject`


def parse_targets(value: Any) -> Targets:
    """`targets` of `inject` as plain values.

    Raises:
        ValueError: neither text, nor a list of texts, nor a mapping from methods to these.
    """
    return cast(Targets, _parse("targets", value, parsers.per_method(parsers.targets)))


def parse_layers(value: Any) -> Layers:
    """`layers` of `inject` as plain values; text as on the command line ("0-11") is understood.

    Raises:
        ValueError: no block indices, nor a mapping from methods to these.
    """
    if isinstance(value, range):
        value = list(value)
    return cast(Layers, _parse("layers", value, parsers.per_method(parsers.layers)))


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


# --- from targets to sites


def select_sites(
    points: Points, methods: Sequence[Method], targets: Targets, layers: Layers, head: Sequence[str]
) -> Sites:
    """Let each method choose its points; those of the head, which are trained anyway, are left out.

    Raises:
        ValueError: a target or layer that the model does not have, one that means the head alone, rows beside
            the whole of a parameter for a method that does not add up, or a method that nothing is left for.
    """
    names = [method.name for method in methods]
    for what, value in (("targets", targets), ("layers", layers)):
        for name in value if isinstance(value, dict) else ():
            if name not in names:
                expected = ", ".join(names)
                raise ValueError(f"{what}: {quote(name)} is no method of this adapter ({expected})")
    sites = {}
    for method in methods:
        own = _of(method, targets)
        for target in () if own is None else split_targets(own):
            _refuse_head(points, target, head)
        sites[method.name] = [path for path in selected(method, points, targets, layers) if path not in head]
        if not method.adds_up:
            refuse_overlaps(frozenset(sites[method.name]))
        if not sites[method.name] and not method.trains_head_only:
            where = "its own choice of targets" if own is None else f"targets {quote(own)}"
            raise ValueError(
                f"method {method.name!r} would train nothing with {where}: the head is trained in any case. "
                "Choose other targets, or method 'linear' for the head alone"
            )
    return sites


def _refuse_head(points: Points, target: Target, head: Sequence[str]) -> None:
    places = [path for path in points.parameters if target.selects(path)]
    if not target.excludes and places and set(places) <= set(head):
        raise ValueError(
            f"target {quote(target.text)} is the classification head, and the head is trained in any case: "
            "leave it out; method 'linear' trains the head alone"
        )


def selected(method: Method, points: Points, targets: Targets, layers: Layers) -> list[str]:
    """What one of several methods chooses; paths of the head may be among it."""
    return method.select(points, _of(method, targets), _of(method, layers))


def _of(method: Method, value: Any) -> Any:
    """The part of targets or layers that is for this method."""
    return value.get(method.name) if isinstance(value, dict) else value


def options_by_site(
    method: Method,
    by_target: Mapping[str, Mapping[str, Any]],
    paths: Sequence[str],
    shared_names: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """The options that a method has for single targets, by the path of each of its sites.

    Args:
        method: the method, for messages.
        by_target: field -> targets -> value. Of several keys that stand for a site the last one holds.
        paths: the sites of the method.
        shared_names: as in `Points`.

    Raises:
        ValueError: a target that stands for none of the sites.
    """
    options: dict[str, dict[str, Any]] = {path: {} for path in paths}
    for field, values in by_target.items():
        for text, value in values.items():
            meant: dict[str, list[str]] = {}
            for target in split_option_targets(text):  # The parts of an alias have one text.
                chosen = [path for path in paths if target.stands_for(path, shared_names)]
                meant[target.text] = meant.get(target.text, []) + chosen
            for part, chosen in meant.items():
                if not chosen:
                    known = ", ".join(dict.fromkeys(map(short_name, paths)))
                    raise ValueError(
                        f"option {field} of method {method.name!r} is given for {quote(part)}, where the "
                        f"method does not act; it acts on {known}"
                    )
                for path in chosen:
                    options[path][field] = value
    return options


def one_or_by_site(values: Mapping[str, Any]) -> Any:
    """An option as `inject` takes it, from its values by the paths of sites: one value if all are equal."""
    first = next(iter(values.values()))
    return first if all(value == first for value in values.values()) else dict(values)


# --- from sites to rules


def attach_rules(
    model: nn.Module,
    adapter: str,
    method: Method,
    by_target: Mapping[str, Mapping[str, Any]],
    paths: Sequence[str],
    accept_idle: bool,
) -> list[str]:
    """Build the rules of one method and attach them, active, to those that the adapter has already.

    Args:
        model: the backbone, on which no other adapter is active.
        adapter: the name under which the rules are attached.
        method: the method with the options that hold where no target has its own.
        by_target: options for single targets, as in `options_by_site`.
        paths: the sites of the method.
        accept_idle: let rules pass that are without effect in part.

    Returns:
        Paths of the sites that have got a rule, in the order in which these were attached.

    Raises:
        ValueError: a point that the model does not have, a rule that it cannot take, or one that would be
            without effect. Some of the rules may be attached then.
    """
    points = Points(model)
    sites = build_sites(points, model, method, by_target, paths)
    by_path = {site.path: site for site in sites}
    rules = method.build(sites)
    if paths and not rules:
        raise ValueError(f"method {method.name!r} built no rule for any of its {len(paths)} sites")
    for path, rule in rules.items():
        if path not in by_path:
            raise ValueError(
                f"method {method.name!r} built a rule for {quote(path)}, which is not one of its sites"
            )
        kind: type[Rule] = CallRule if by_path[path].is_call else WeightRule
        if not isinstance(rule, kind):
            raise ValueError(
                f"method {method.name!r} built a {type(rule).__name__} for {path}, expected a {kind.__name__}"
            )
        own = method.at(by_path[path])
        rule.lr_scale, rule.decay_scale = own.lr_scale, own.decay_scale
        _attach_rule(points, model, adapter, method, path, rule, accept_idle)
    _refuse_idle_scales(method, rules)
    return list(rules)


def _refuse_idle_scales(method: Method, rules: Mapping[str, Rule]) -> None:
    """Refuse factors of learning rate and weight decay that no tensor would follow, or only one of several
    that are given for a tensor."""
    trained: dict[nn.Parameter, Rule] = {}
    for path, rule in rules.items():
        for name, parameter in rule.named_parameters():
            first = trained.setdefault(parameter, rule)
            for option in ("lr_scale", "decay_scale"):
                if getattr(first, option) != getattr(rule, option):
                    raise ValueError(
                        f"option {option} of method {method.name!r} is {getattr(first, option):g} and "
                        f"{getattr(rule, option):g} for {name} of {path}, which several places have in "
                        "common: give one value"
                    )
    for option in () if trained else ("lr_scale", "decay_scale"):
        given = [getattr(owner, option) for owner in (method, *rules.values())]
        if value := next((value for value in given if value != 1), None):
            raise ValueError(
                f"{option} = {value:g} would have no effect: method {method.name!r} trains nothing beside "
                "the head, whose learning rate is head_lr. Give it to a method that trains, as in "
                f"{{lora: {{{option}: {value:g}}}}}, or leave it out"
            )


def build_sites(
    points: Points,
    model: nn.Module,
    method: Method,
    by_target: Mapping[str, Mapping[str, Any]],
    paths: Sequence[str],
) -> list[Site]:
    """What a method is given to build its rules: its sites, with the options that hold there.

    Args:
        points: those of the model.
        model: the backbone, on which no other adapter is active.
        method, by_target, paths: as for `attach_rules`.

    Raises:
        ValueError: a point that the model does not have, or options for a target where the method does not
            act.
    """
    options = options_by_site(method, by_target, paths, points.shared_names)
    return [_build_site(points, model, path, options[path]) for path in paths]


def _build_site(points: Points, model: nn.Module, path: str, options: Mapping[str, Any]) -> Site:
    point = Point.parse(path)
    if point.is_call:
        if path not in points.calls:
            raise ValueError(
                f"{quote(path)} is no call that rules may surround: it is neither declared by the model nor "
                f"a linear layer that is called. Calls of this model: {', '.join(points.calls) or 'none'}"
            )
        return Site(path, points.calls[path][0], None, options, model)
    owner, name = find_owner(model, point.place)
    value: Tensor = base_value(owner, name)
    if has_rules(owner) and name in slots_of(owner):
        value = cast(WeightSlot, slots_of(owner)[name]).evaluated(value)
    rows = rows_of(points, point)
    return Site(path, owner, (value if rows is None else value[slice(*rows)]).detach(), options, model)


def rows_of(points: Points, point: Point) -> Rows:
    """First and last row of a point in the present value of its parameter; None for the whole parameter.

    Raises:
        ValueError: the model does not name such rows.
    """
    if point.rows is None:
        return None
    rows = points.rows.get(point.place, {})
    if point.rows not in rows:
        raise ValueError(
            f"{point} does not exist: {point.place} has the rows {', '.join(rows) or 'of no name'}"
        )
    return rows[point.rows].start, rows[point.rows].stop


def _attach_rule(
    points: Points, model: nn.Module, adapter: str, method: Method, path: str, rule: Rule, accept_idle: bool
) -> None:
    """Attach a rule behind (or, for a call, around) those that the adapter has at this point."""
    point = Point.parse(path)
    if isinstance(rule, WeightRule):
        owner, name = find_owner(model, point.place)
        before = _weight_rules(owner, name, adapter)
        if not accept_idle:
            _refuse_idle(points, point, method.name, rule, before)
        rules, rows = zip(*before, (rule, rows_of(points, point)), strict=True)
        combined: Rule = rule if rows == (None,) else Composition(rules, rows)
    else:
        owner, method_name = points.calls[path]
        name = method_name + CALL
        inner = [] if (nested := _active_rule(owner, name, adapter)) is None else [*single_rules(nested)]
        if inner and cast(CallRule, rule).innermost:
            raise ValueError(
                f"method {method.name!r} computes a part of {path} once more, and the methods before it "
                "change what that is made from: name it before them"
            )
        combined = Nesting([*inner, rule]) if inner else rule  # type: ignore[list-item]
    attach(owner, name, adapter, combined)
    slots_of(owner)[name].active = adapter
    for path, first in points.tied.items():
        if first == point.place:
            share(*find_owner(model, path), slots_of(owner)[name])


def _active_rule(owner: nn.Module, name: str, adapter: str) -> Rule | None:
    """What the adapter has at a point already."""
    if not has_rules(owner) or name not in slots_of(owner) or adapter not in slots_of(owner)[name]:
        return None
    return cast(Rule, slots_of(owner)[name][adapter])


def _weight_rules(owner: nn.Module, name: str, adapter: str) -> list[tuple[WeightRule, Rows]]:
    """The rules that the adapter has for a parameter already, with their rows."""
    rule = _active_rule(owner, name, adapter)
    if isinstance(rule, Composition):
        return [*rule.steps()]
    return [] if rule is None else [(cast(WeightRule, rule), None)]


def _refuse_idle(
    points: Points,
    point: Point,
    method: str,
    rule: WeightRule,
    before: Sequence[tuple[WeightRule, Rows]],
) -> None:
    if rule.perturbs and not points.is_multiplied(point.place):
        raise ValueError(
            f"method {method!r} with these options acts on the input of a layer (as dropout "
            f"does), but the model only reads {point} and calls no layer there: leave dropout at 0 "
            "or choose other targets"
        )
    rows = rows_of(points, point)
    met = [earlier for earlier, rows_before in before if overlap(rows, rows_before)]
    if met and rule.replaces:
        raise ValueError(
            f"method {method!r} replaces {point} as a whole, so the methods before it would have no effect: "
            "name it first, or give the methods different targets"
        )
    if any(earlier.perturbs for earlier in met):
        raise ValueError(
            f"method {method!r} would follow one that acts on the input of {point.place} (as dropout does) "
            "and leaves it no weight to build on: leave dropout at 0 for all but the last method there"
        )


def check_sites(model: nn.Module, paths: Sequence[str], head: Sequence[str]) -> None:
    """Refuse parameters that no rule can be attached to.

    Args:
        model: the backbone.
        paths: of points.
        head: paths of the head's parameters, which get values of their own and so cannot be those of another
            module, too.

    Raises:
        ValueError: naming the parameter and the reason.
    """
    places, memory = _places(model), Memory(model)
    for path in [*head, *paths]:
        point = Point.parse(path)
        if point.is_call:
            continue
        parameter = base_value(*find_owner(model, point.place))
        if path in head and len(places[id(parameter)]) > 1:
            raise ValueError(
                f"{' and '.join(places[id(parameter)])} are one tensor: with a head for each adapter they "
                "would come apart. Untie them (give each a copy)"
            )
        if reason := _unfit(parameter):
            raise ValueError(f"{path} cannot take a rule: {reason}")
        if (other := memory.other_in(parameter)) is not None:
            raise ValueError(
                f"{point.place} and {other} are two parameters in the same memory: what changes one changes "
                "the other. Give each a copy of its own (parameter.data = parameter.data.clone()), or make "
                "them one parameter"
            )


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
