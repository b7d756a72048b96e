"""What a method is: a registered dataclass of options that says where its rules go and builds them.

Nothing here, nor in the files beside it, imports torch before a model is adapted: options are checked and
listed at once. The formulas are in `vimtune.adapters.rules`, or in the file of a user's own method.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vimtune.fields import Amount, Option, PositiveAmount, options_of
from vimtune.fields import option as option  # for the files of methods
from vimtune.parsers import excludes
from vimtune.registry import Registry, require_complete
from vimtune.text import quote, suggest

if TYPE_CHECKING:
    from vimtune.adapters.points import Points
    from vimtune.adapters.rule import Rule
    from vimtune.adapters.settling import TrainingBatches
    from vimtune.adapters.sites import Site

METHODS: Registry[type[Method]] = Registry("method")
"""All methods by name."""

AnyMethod = TypeVar("AnyMethod", bound="Method")
"""A method of any class, for functions that give one of the same class."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Options of one method. Its fields, stated with `option`, are what `peft_kwargs` takes.

    Every method has those that are stated here, which the optimizer follows; a derived class adds its own.
    Their annotations are the only statement of types and ranges. Recipes and flags parse values by them
    (`vimtune.fields.parser_of`); `resolve_options` compares with them what comes from Python and from files.

    A subclass states what it acts on in `default_targets` (or by overriding `select`) and builds its rules:
    one for each site in `build_rule`, or all together in `build`. The classification head is trained beside
    it in any case. Everything that needs torch is imported within these functions, or in another file.
    """

    name: ClassVar[str]
    """The name under which it is registered."""
    summary: ClassVar[str]
    """One line for `--list`."""
    default_targets: ClassVar[str | tuple[str, ...]] = "both"
    """Where it acts unless the user says otherwise; see `vimtune.adapters.targets`."""
    skips_absent_targets: ClassVar[bool] = False
    """Whether those of several `default_targets` are left out that a model does not have, as long as it has
    one of them: a parameter may have another name, or be missing, from one kind of model to the next."""
    changes_at_start: ClassVar[bool] = False
    """Whether injecting it changes what the model computes before anything is trained, as random prompts
    do."""
    adds_up: ClassVar[bool] = False
    """Whether it may act on rows of a parameter that it adapts as a whole, too, because its rules add to the
    weight. Of any other method that is refused as a mistake."""
    training_only: ClassVar[Mapping[str, Any]] = {}
    """Options that bring what only training has a use for, each with the value without it; see
    `Rule.simplify`."""
    trains_head_only: ClassVar[bool] = False
    """Whether it is meant to select nothing. Of any other method that is refused as a mistake."""
    sized_by: ClassVar[tuple[str, ...]] = ()
    """The options that decide how much it trains, such as ("rank", "block_size"). A budget chooses the value
    of the first one that the user has not given. Empty if nothing but the targets decides. How much is
    trained has to rise with the value of such an option, or to fall with it, among the values that fit."""

    peft_type: ClassVar[str | None] = None
    """The type under which HF peft has the method, such as "LORA"; `vimtune.exchange.peft` translates. None
    for a method that HF peft does not have. A class states it for itself: a derived method is another one."""

    lr_scale: PositiveAmount = option(1.0, "factor of the learning rate of what the method trains")
    decay_scale: Amount = option(1.0, "factor of the weight decay of what the method trains")

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        """Paths of the points where it acts.

        Args:
            points: those of the model.
            targets: as the user gave them; None if not.
            layers: indices of blocks, as the user gave them; None if not.

        Raises:
            ValueError: targets or layers that the model does not have, or that the method does not take.
        """
        if targets is not None:
            return points.resolve(targets, layers)
        default = self.default_targets
        present = [target for target in default if points.has(target)] if self.skips_absent_targets else []
        return points.resolve(present or default, layers)

    @classmethod
    def sized_with(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of `sized_by` that decide how much it trains where these options are given.

        Overridden by methods of which an option may leave the others nothing to decide.
        """
        return cls.sized_by

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        """Up to which value of an option of `sized_by` more parameters are worth something; a budget chooses
        none beyond it. None if nothing but the range of the option and the sites themselves limits it.

        Overridden by methods that accept larger values, as published settings have them.
        """
        return None

    def build(self, sites: Sequence[Site]) -> Mapping[str, Rule]:
        """The rules of the method by the path of their site: for each one what `build_rule` says.

        Overridden by methods whose rules depend on each other. A site may be left without a rule.

        Raises:
            ValueError: the options do not fit a site.
        """
        return {site.path: self.at(site).build_rule(site) for site in sites}

    def build_rule(self, site: Site) -> Rule:
        """The rule for one site, a `WeightRule` for a parameter or a `CallRule` for a call.

        Raises:
            ValueError: the options do not fit the site.
        """
        raise NotImplementedError(f"method {self.name!r} overrides neither build nor build_rule")

    def at(self: AnyMethod, site: Site) -> AnyMethod:
        """The method with the options that hold at a site."""
        return dataclasses.replace(self, **site.options) if site.options else self

    @property
    def settles(self) -> bool:
        """Whether the method wants to see data before training: whether it has a `settle` of its own.

        Overridden by methods that do so with some of their options only.
        """
        return type(self).settle is not Method.settle

    def settle(self, rules: Mapping[str, Rule], batches: TrainingBatches) -> None:  # noqa: B027
        """Choose or start from data, once, before the first step of a training run.

        Overridden by methods that select what to train by gradients, or start from what the model computes;
        the others draw no batch. What is chosen has to be the same in every process of a run, as it is where
        it depends on the gradients, which are summed over all of them. It begins without gradients.

        Args:
            rules: the method's rules by the path of their site.
            batches: functions, each of which runs the forward and backward pass of one training batch, adds
                to the gradients of the adapter's tensors, and gives the loss. As many are drawn as the method
                wants; one that is called again runs the same batch again. `batches.warmed_up` trains the
                adapter for a while, to look at what that changes.
        """

    def merged_options(self, options: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Any]:
        """The options with which the merged model would be created, where the method changes its shape.

        Args:
            options: those of the model without the adapter.
            sites: paths of the points where the method acts.
        """
        return dict(options)


MethodType = TypeVar("MethodType", bound=type[Method])
"""A class of methods, for the decorator that gives back the class it got."""


def register_method(name: str) -> Callable[[MethodType], MethodType]:
    """Class decorator: make a method known under `name`.

    Raises:
        ValueError: the name is taken, or the class has no summary of its own, a field without help or with
            an annotation that cannot be read, or names what is no option in `sized_by`.
    """

    def register(cls: MethodType) -> MethodType:
        require_complete(cls, f"method {name!r}")
        options = options_of(cls)
        if unknown := [option for option in cls.sized_by if option not in options]:
            raise ValueError(f"method {name!r}: sized_by names {quote(unknown[0])}, which is no option of it")
        if "peft_type" not in vars(cls):
            cls.peft_type = None
        METHODS.add(name, cls)
        cls.name = name
        return cls

    return register


def list_methods() -> list[str]:
    """Names of all methods."""
    return list(METHODS)


def get_method(name: str) -> type[Method]:
    """Class of a method.

    Raises:
        ValueError: unknown name.
    """
    return METHODS.get(name)


def method_names(spec: str) -> list[str]:
    """Names of the methods of a spec such as "lora" or "lora+bitfit".

    Raises:
        ValueError: not such a text, unknown method, or one method twice.
    """
    if isinstance(spec, os.PathLike) or (isinstance(spec, str) and re.search(r"[/\\]|\.safetensors$", spec)):
        raise ValueError(
            f"method = {quote(spec)}: expected the name of a method such as lora; an adapter that is there "
            "already is put on a model without one with vimtune.load_adapter(model, path)"
        )
    if not isinstance(spec, str):
        raise ValueError(f"method = {quote(spec)}: expected the name of a method: {', '.join(METHODS)}")
    names = [name.strip() for name in spec.split("+")]
    for name in names:
        get_method(name)
    if len(set(names)) < len(names):
        raise ValueError(f"method {spec!r} names one method twice")
    return names


def split_options(spec: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The given options of each method of a spec: method -> field -> value.

    With several methods an option goes to every one that has such a field; `{"lora": {...}}` sets
    those of one method alone.

    Raises:
        ValueError: unknown method, or unknown option (with a suggestion).
    """
    names = method_names(spec)
    known = {name: options_of(get_method(name)) for name in names}
    shared = {key: value for key, value in options.items() if key not in names}
    for key in shared:
        if not any(key in fields for fields in known.values()):
            anywhere = sorted(set().union(*known.values()))
            expected = f"its options are {', '.join(anywhere)}" if anywhere else "it has none"
            hint = suggest(str(key), anywhere)
            raise ValueError(f"method {spec!r} has no option {quote(key)}.{hint} ({expected})")
    split = {}
    for name, fields in known.items():
        own = options.get(name, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"options of method {name!r} are {quote(own)}: expected a mapping of its fields")
        for key in own:
            if key not in fields:
                raise ValueError(f"method {name!r} has no option {quote(key)}.{suggest(str(key), fields)}")
        split[name] = {key: value for key, value in shared.items() if key in fields} | {**own}
    return split


def resolve_options(spec: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every field of each method of a spec, defaults included: method -> field -> value.

    A field may have a value for each of several targets, {"rank": {"in_proj": 8, "x_proj[B]": 4}}; elsewhere
    its default holds. A key is one target or several, as in "in_proj,x_proj[B]" and "both", but no exclusion.

    A value is compared as it is, by the schema of the option's annotation, because it comes from Python or
    from a file, which both have types: the text "8" is no rank there. The parsers of recipes and flags, whose
    values may be text, follow from the same annotation, but they convert; that would let a file say in many
    ways what it has to say in one.

    Raises:
        ValueError: unknown method or option, or a value of another type than the option's annotation or out
            of its range.
    """
    resolved = {}
    for name, given in split_options(spec, options).items():
        known = options_of(get_method(name))
        own = {key: copy.deepcopy(item.default) for key, item in known.items()}
        for key, value in given.items():
            own[key] = _checked(value, known[key], f"option {key} of method {name!r}")
        resolved[name] = own
    return resolved


def differing_options(
    saved: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, Any, Any]]:
    """The options that are not those of a file: method, option, value of the file, value now.

    Args:
        saved: options as a file has them, method -> option -> value, beside which there may be more. What is
            not there counts as the same.
        options: all options now, as `resolve_options` returns them. Where a file has lists a method may have
            tuples, which count as the same.
    """
    as_in_a_file: dict[str, dict[str, Any]] = json.loads(json.dumps(options))
    return [
        (name, option, saved[name][option], now)
        for name, own in as_in_a_file.items()
        if isinstance(saved.get(name), Mapping)
        for option, now in own.items()
        if saved[name].get(option, now) != now
    ]


def _checked(value: Any, option: Option, what: str) -> Any:
    """A value that is given for an option, or its values by target; `what` names the option in messages.

    Raises:
        ValueError: a value of another type or out of its range, no target, or an exclusion.
    """
    from vimtune.schema import check  # takes longer to import than all that is here, and lists do without

    if not isinstance(value, Mapping):
        return check(option.annotation, value, what)
    if not value:
        raise ValueError(f"{what} is an empty mapping: expected a value, or values by target")
    found = {
        str(target): check(option.annotation, item, f"{what} for {quote(target)}")
        for target, item in value.items()
    }
    for target in filter(excludes, found):
        raise ValueError(
            f"{what} is given for {quote(target)}: expected targets for which the value holds, not exclusions"
        )
    return found


@dataclass(frozen=True)
class ChosenMethod:
    """A method with its options."""

    method: Method
    """With the options that hold wherever a target has none of its own."""
    by_target: Mapping[str, Mapping[str, Any]]
    """Options for single targets: field -> target -> value."""


def sizing_options(spec: str, options: Mapping[str, Any]) -> dict[str, str]:
    """The options that a budget decides, by their method: of each method the first of `Method.sized_with`
    that is not given. Methods without such an option are left out.

    Raises:
        ValueError: unknown method or option, or no method of the spec has an option left to decide.
    """
    chosen: dict[str, str] = {}
    reasons = []
    for name, given in split_options(spec, options).items():
        sized_by = get_method(name).sized_with(given)
        free = [option for option in sized_by if option not in given]
        if free:
            chosen[name] = free[0]
        elif sized_by:
            reasons.append(f"method {name!r} has its size already: leave out {' or '.join(sized_by)}")
        elif get_method(name).sized_by:
            reasons.append(f"method {name!r} has one size with the options that are given")
        else:
            reasons.append(f"method {name!r} has no option that decides how much it trains")
    if not chosen:
        raise ValueError(
            f"{'; '.join(reasons)}. Expected a method whose size is to be chosen, or no budget (none) "
            "for this one"
        )
    return chosen


def build_methods(spec: str, options: Mapping[str, Any]) -> list[ChosenMethod]:
    """The methods of a spec such as "lora" or "lora+bitfit", with the options of `split_options`.

    Raises:
        ValueError: unknown method, unknown option (with a suggestion), or a value of another type or
            out of range.
    """
    chosen = []
    for name, own in resolve_options(spec, options).items():
        cls = get_method(name)
        by_target = {key: value for key, value in own.items() if isinstance(value, dict)}
        everywhere = {key: value for key, value in own.items() if key not in by_target}
        for field_name, values in by_target.items():  # each value alone is checked by the class as well
            for value in values.values():
                cls(**everywhere, **{field_name: value})
        chosen.append(ChosenMethod(cls(**everywhere), by_target))
    return chosen


def check_matrix(method: str, site: Site, rank: int | None = None) -> tuple[int, int]:
    """(out, in) of a weight that takes a matrix update; of a convolution `in` is all that one output reads.

    Args:
        method: name of the method, for the message.
        site: where it is to act.
        rank: that of the update, for methods that have one.

    Raises:
        ValueError: not a matrix, or a rank that does not fit it.
    """
    weight = site.weight
    if weight.dim() < 2:
        raise ValueError(f"{method} needs a matrix; {site.path} has shape {tuple(weight.shape)}")
    rows, columns = weight.flatten(1).shape
    if rank is not None:
        check_rank(site, rows, columns, rank)
    return rows, columns


def check_rank(site: Site, rows: int, columns: int, rank: int) -> None:
    """Refuse a rank that does not fit a layer of so many outputs and inputs.

    A rank above the smaller side adds nothing but parameters, and yet it is published: MambaPEFT has rank 64
    for the 12 rows of a time step.

    Raises:
        ValueError: the rank is not between 1 and the larger side.
    """
    largest = max(rows, columns)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank {quote(rank)} does not fit {site.path} of shape {rows} x {columns}: "
            f"expected 1 to {largest}"
        )


def check_block_size(site: Site, block_size: int, *widths: int) -> None:
    """Compare the size of blocks with the sides of a weight that they are to divide.

    Raises:
        ValueError: it does not divide one of `widths`; the message has those up to 64 that would.
    """
    common = math.gcd(*widths)
    if common % block_size:
        divisors = [str(size) for size in range(1, min(common, 64) + 1) if common % size == 0]
        sides = f"the input width {widths[0]}" if len(widths) == 1 else " and ".join(map(str, widths))
        raise ValueError(
            f"block_size {quote(block_size)} does not divide {sides} of {site.path}; "
            f"possible: {', '.join(divisors)}"
        )


def fitting_block_size(method: str, site: Site, block_size: int | None) -> int:
    """The side of square blocks that fill a weight: `block_size`, or the largest possible one if that is
    None.

    Raises:
        ValueError: not a matrix, or a size that does not divide both sides.
    """
    rows, columns = check_matrix(method, site)
    if block_size is None:
        return math.gcd(rows, columns)
    check_block_size(site, block_size, rows, columns)
    return block_size
