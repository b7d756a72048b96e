"""Thirty compositions of methods, taken through the checks that every method passes.

They are a written list, which covers every method, each kind of place twice over (weights that are called
and weights that are read, rows, calls of the mixer and of the encoder, parameters that grow), and both orders
where order matters. One whose methods are not all registered is left out.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import timm
import torch
from method_cases import options_for

import vimtune
from vimtune.methods import METHODS
from vimtune.testing import methods as checks
from vimtune.testing.methods import MethodCase, build_test_model

COMPOSITIONS: list[tuple[str, dict]] = [
    # Weights of the projectors, added to and multiplied in both orders.
    ("lora+bitfit", {}),
    ("oft+lora", {}),
    ("lora+oft", {}),
    ("ia3+c3a", {}),
    ("cdvft+dora", {}),
    ("prodial+ia3", {}),
    ("full+lora", {}),
    ("strong+bitfit+ia3", {"targets": {"ia3": "dt_proj"}}),
    ("c3a+cdvft+oft", {}),
    ("lora+ft", {"targets": {"lora": "in_proj[x],x_proj[B]", "ft": "conv1d,D"}}),
    # The parameters of the SSM beside the projectors.
    ("lora+sdt", {"targets": {"lora": "out_proj"}}),
    ("sdt+lora", {"targets": {"lora": "x_proj[B],x_proj[C]"}}),
    ("lora+ssm", {}),
    ("lora+a_tuning+d_tuning", {}),
    ("bias_tuning+conv1d_tuning+prodial", {}),
    ("lora+additional_scan", {"targets": {"lora": "out_proj"}}),
    ("additional_scan+sdt", {}),
    ("additional_scan+lora+a_tuning", {"targets": {"lora": "x_proj[B]"}}),
    # Tokens and branches in calls of the mixer, of its layers and of the encoder.
    ("lora+prompt", {}),
    ("prompt+affix", {}),
    ("affix+lora+cls_token_tuning", {}),
    ("prompt+pos_embed_tuning+cls_token_tuning", {}),
    ("parallel_adapter+lora", {}),
    ("parallel_adapter+affix+oft", {}),
    ("lora+memba", {}),
    ("memba+affix", {}),
    ("lora+state_offset", {}),
    ("state_offset+additional_scan", {}),
    ("svp+lora", {}),
    ("svp+prompt+ia3", {}),
]
PRESENT = [
    (method, extra) for method, extra in COMPOSITIONS if all(part in METHODS for part in method.split("+"))
]
CHEAP = (
    checks.check_start,
    checks.check_disabling,
    checks.check_merging,
    checks.check_gradients,
    checks.check_files,
    checks.check_autocast,
    checks.check_several_adapters,
    checks.check_summary,
)
COMPILED = ("ia3+c3a", "lora+sdt", "additional_scan+sdt", "prompt+affix", "lora+memba", "svp+prompt+ia3")
"""The compiler takes a second for each layer, so a few stand for all."""


def case_of(composition: tuple[str, dict], depth: int = 1) -> MethodCase:
    method, extra = composition
    return MethodCase(method, options_for(method, extra), partial(build_test_model, depth))


@pytest.mark.parametrize("composition", PRESENT, ids=[method for method, _ in PRESENT])
def test_a_composition_passes_the_checks_of_a_method(composition):
    for check in CHEAP:
        check(case_of(composition))


@pytest.mark.parametrize(
    "composition", [item for item in PRESENT if item[0] in COMPILED], ids=lambda item: item[0]
)
def test_the_compiler_takes_a_composition(composition):
    checks.check_compiling(case_of(composition))


def test_there_are_thirty_and_every_method_is_among_them():
    assert len({method for method, _ in COMPOSITIONS}) == len(COMPOSITIONS) == 30
    named = {part for method, _ in COMPOSITIONS for part in method.split("+")}
    assert {name for name, method in METHODS.items() if not method.trains_head_only} <= named
    assert {part for method in COMPILED for part in method.split("+")} <= named


REPLACES = "replaces .* as a whole, so the methods before it would have no effect: name it first"
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
