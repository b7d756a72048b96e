"""Thirty compositions of methods, taken through the checks that every method passes."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
from method_cases import COMPILED, COMPOSITIONS, options_for

import vimtune
from vimtune.adapters import CallRule, Method, register_method
from vimtune.methods import METHODS
from vimtune.testing import methods as checks
from vimtune.testing.methods import MethodCase, build_test_model

CHEAP = (
    checks.check_start,
    checks.check_disabling,
    checks.check_merging,
    checks.check_gradients,
    checks.check_every_entry,
    checks.check_files,
    checks.check_autocast,
    checks.check_backends,
    checks.check_several_adapters,
    checks.check_summary,
)


def case_of(composition: tuple[str, dict], depth: int = 1) -> MethodCase:
    method, extra = composition
    return MethodCase(method, options_for(method, extra), partial(build_test_model, depth))


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda item: item[0])
def test_a_composition_passes_the_checks_of_a_method(composition):
    for check in CHEAP:
        check(case_of(composition))


@pytest.mark.parametrize(
    "composition", [item for item in COMPOSITIONS if item[0] in COMPILED], ids=lambda item: item[0]
)
def test_the_compiler_takes_a_composition(composition):
    checks.check_compiling(case_of(composition))


def test_there_are_thirty_and_every_method_is_among_them():
    assert len({method for method, _ in COMPOSITIONS}) == len(COMPOSITIONS) == 30
    named = {part for method, _ in COMPOSITIONS for part in method.split("+")}
    assert {name for name, method in METHODS.items() if not method.trains_head_only} <= named
    assert {part for method in COMPILED for part in method.split("+")} <= named


REPLACES = "replaces .* as a whole, so the methods before it would have no effect: name it first"
INNERMOST = r"'state_offset' computes a part of .*scan\(\) once more, .*: name it before them"
CONFLICTS = [
    ("lora+full", {}, REPLACES),
    ("oft+ft", {}, REPLACES),
    ("sdt+ft", {"targets": {"ft": "A_log"}}, REPLACES),
    ("bitfit+full", {}, REPLACES),
    (
        "lora+oft",
        {"dropout": 0.1},
        "would follow one that acts on the input of .*in_proj.* leave dropout at 0 for",
    ),
    ("state_offset+additional_scan", {}, "offsets of 16 states, and the scan has 18: name the method that"),
    ("affix+state_offset", {}, INNERMOST),
    ("memba+state_offset", {}, INNERMOST),
    ("lora+lora", {}, "names one method twice"),
    ("lora+c3a", {"block_size": 3}, "block_size 3 does not divide 64 and 16 of layers.0.mixer.in_proj"),
    (
        "lora+ft",
        {"targets": {"ft": "head"}},
        "is the classification head, and the head is trained in any case",
    ),
]
"""What two methods cannot do at one place. Whatever one does after the other otherwise composes."""


@pytest.mark.parametrize(("method", "options", "reason"), CONFLICTS)
def test_what_cannot_be_composed_is_refused_with_the_reason(method, options, reason):
    model = build_test_model(1)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=reason):
        vimtune.inject(model, method, **options_for(method, options))
    assert [type(module) for module in model.modules()] == before


PAIRS = list(itertools.permutations(["lora", "dora", "oft", "c3a", "ia3"], 2))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_second_method_acts_on_what_the_first_has_made(first, second):
    """The weight of a composition is the second rule of the first rule's weight."""
    method = f"{first}+{second}"
    torch.manual_seed(1)
    model = vimtune.inject(build_test_model(1), method, **options_for(method, {"targets": "out_proj"}))
    layer = checks.disturb(model).layers[0].mixer.out_proj
    one, two = layer.adapters["weight"]["default"].rules
    plain = timm.create_model("test_vim", num_classes=5, depth=1)
    plain.load_state_dict(build_test_model(1).state_dict())
    weight = plain.layers[0].mixer.out_proj.weight
    checks.close(layer.weight, two.effective_weight(one.effective_weight(weight)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("first", METHODS)
def test_any_two_methods_compose_or_are_refused(first):
    """In both orders: what is accepted trains in all its tensors, and merges exactly or not at all."""
    for second in METHODS:
        if second == first:
            continue
        method = f"{first}+{second}"
        try:
            case_of((method, {})).adapted()
        except ValueError as error:
            known = "|".join((REPLACES, INNERMOST, "does not fit: "))
            assert re.search(known, str(error)), f"{method}: {error}"
            continue
        for check in (checks.check_gradients, checks.check_merging):
            check(case_of((method, {})))


class Outgrown(CallRule):
    """A rule that says that it does not fit."""

    def around(self, call, x, *flow):
        return call(x)

    def outgrown(self):
        return "it has 16 states and the scan 18: name the method that adds states first"


def test_a_rule_that_another_method_has_outgrown_is_refused(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Sized(Method):
        summary = "has the sizes of its mixer"
        default_targets = "scan()"

        def build_rule(self, site):
            return Outgrown()

    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    register_method("sized")(Sized)
    model = build_test_model(1)
    message = (
        r"the Outgrown at layers\.0\.mixer\.scan\(\) does not fit: it has 16 states and the scan 18: name"
    )
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, "sized+lora", rank=2)
    assert vimtune.adapters.list_adapters(model) == []
