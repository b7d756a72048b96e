"""Trainable parameters of the language models in the ProDiaL paper, from configurations alone."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from tiny_language import transformers

import vimtune
from vimtune.adapters import adapter_parameters
from vimtune.language import create_language_model

assert transformers

# What the table of the paper (arXiv 2411.15224, tables of the language models) says in millions, or None, and
# the exact number. With ProDiaL the paper leaves out the factors s of the rows in some of its counts.
COUNTS = [
    ("mamba-130m", "lora", "both", {"rank": 16}, 2_359_296, "2.36"),
    ("mamba-130m", "lora", "in_proj", {"rank": 16}, 1_474_560, None),
    ("mamba-130m", "lora", "out_proj", {"rank": 16}, 884_736, None),
    ("mamba-130m", "dora", "both", {"rank": 16}, 2_451_456, "2.45"),
    ("mamba-130m", "strong", None, {"rank": 16}, 3_796_608, "3.80"),
    ("mamba-130m", "bitfit", None, {}, 73_728, None),
    ("mamba-130m", "ft", "both", {}, 84_934_656, None),
    ("mamba-130m", "full", None, {}, 129_135_360, None),
    ("mamba-130m", "prodial", "both", {"rank": 16, "block_size": 1}, 2_506_752, None),
    ("mamba-130m", "prodial", "out_proj", {"rank": 16, "block_size": 1}, 940_032, None),
    # SDT and SDLoRA as their paper counts them, arXiv 2410.09016.
    ("mamba-130m", "sdt", None, {"frozen_states": 0.75}, 12_960, None),
    ("mamba-130m", "sdt", None, {"frozen_states": 0.9}, 12_240, None),
    ("mamba-130m", "sdt", None, {"frozen_states": 0.95}, 11_880, None),
    ("mamba-130m", "lora+sdt", {"lora": "out_proj"}, {"rank": 8, "alpha": 8.0}, 442_368 + 12_960, None),
    ("mamba2-130m", "lora", "both", {"rank": 16}, 2_466_816, "2.47"),
    ("mamba2-130m", "prodial", "in_proj", {"rank": 8, "block_size": 12}, 1_092_672, None),
    ("mamba-370m", "lora", "both", {"rank": 16}, 6_291_456, None),
    ("mamba-370m", "prodial", "both", {"rank": 8, "block_size": 16}, 5_750_784, "5.75"),
    ("mamba-1.4b", "lora", "both", {"rank": 16}, 12_582_912, None),
]


@cache
def plain(name):
    return create_language_model(name, pretrained=False, device="meta")


def adapted(name, method, targets, options):
    return vimtune.inject(copy.deepcopy(plain(name)), method, targets=targets, **options)


@pytest.mark.parametrize(("name", "method", "targets", "options", "count", "stated"), COUNTS)
def test_trainable_parameters(name, method, targets, options, count, stated):
    model = adapted(name, method, targets, options)
    assert vimtune.summary(model).trainable == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    if stated is not None:
        assert f"{count / 1e6:.2f}" == stated


def without_factors(targets, rank, block_size):
    """How many parameters ProDiaL on Mamba-130M trains without the factors s of the rows."""
    model = adapted("mamba-130m", "prodial", targets, {"rank": rank, "block_size": block_size})
    factors = sum(item.parameter.numel() for item in adapter_parameters(model) if "row_scale" in item.name)
    rows = {"both": 2 * 1536 + 768, "out_proj": 768}[targets]
    assert factors == 24 * rows
    return vimtune.summary(model).trainable - factors


def test_prodial_as_the_paper_counts_it():
    """.92 M for out_proj of Mamba-130M has no s; 2.44 M for Mamba-2 130M (both, 64 blocks, rank 8) has it."""
    assert f"{without_factors('out_proj', 16, 1) / 1e6:.2f}" == "0.92"
    sizes = {"in_proj": 768 // 64, "out_proj": 1536 // 64}
    model = adapted("mamba2-130m", "prodial", "both", {"rank": 8, "block_size": sizes})
    assert vimtune.summary(model).trainable == 2_438_208


def test_the_paper_rounds_prodial_on_mamba_130m_up():
    """It says 2.42 M for both projectors. That is 2,414,592, without s, rounded up: with one rank and one
    block size for both all counts, with s and without, are multiples of 18,432, none of which rounds to 2.42.
    """
    step, published = 18_432, 2_414_592
    assert without_factors("both", 16, 1) == published
    assert without_factors("both", 17, 1) - published == 8 * step
    assert without_factors("both", 16, 2) - published == 3 * step
    assert 5 * step == 24 * (2 * 1536 + 768), "the factors s"
    assert published % step == 0 and published < 2_415_000 and published + step > 2_425_000
