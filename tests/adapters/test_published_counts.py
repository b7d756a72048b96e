"""How much each published variant trains, exactly, on Vim-tiny and Vim-small without the head.

The numbers are those of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855): of its table for Vim-small, and
by the same formulas for Vim-tiny.
"""

from __future__ import annotations

import pytest
import timm

import vimtune

# (method, targets, options, count at Vim-small, count at Vim-tiny)
COUNTS = [
    ("lora", "patch_embed.proj", {"rank": 32}, 36_864, 30_720),
    ("lora", "in_proj", {"rank": 32}, 1_474_560, 737_280),
    ("lora", "in_proj[x]", {"rank": 64}, 1_769_472, 884_736),
    ("lora", "in_proj[z]", {"rank": 64}, 1_769_472, 884_736),
    ("lora", "x_proj", {"rank": 64}, 2_531_328, 1_314_816),
    ("lora", "x_proj[dt]", {"rank": 64}, 2_433_024, 1_216_512),
    ("lora", "x_proj[B]", {"rank": 64}, 2_408_448, 1_228_800),
    ("lora", "x_proj[C]", {"rank": 64}, 2_408_448, 1_228_800),
    ("lora", "dt_proj", {"rank": 64}, 2_433_024, 1_216_512),
    ("lora", "out_proj", {"rank": 96}, 2_654_208, 1_327_104),
    ("parallel_adapter", None, {"rank": 32}, 884_736, 442_368),
    ("a_tuning", None, {}, 589_824, 294_912),
    ("d_tuning", None, {}, 36_864, 18_432),
    ("bias_tuning", None, {}, 36_864, 18_432),
    ("conv1d_tuning", None, {}, 147_456, 73_728),
    ("cls_token_tuning", None, {}, 384, 192),
    ("pos_embed_tuning", None, {}, 75_648, 37_824),
    ("ssm", None, {}, 589_824 + 2 * 36_864, 294_912 + 2 * 18_432),
]


def label(row):
    method, targets, options = row[:3]
    return "-".join([method, *filter(None, [targets]), *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture(scope="module")
def models():
    """Both models without values, which is enough to count."""
    return [
        timm.create_model(f"vim_{size}_patch16_224", num_classes=0, device="meta")
        for size in ("small", "tiny")
    ]


@pytest.mark.parametrize("row", COUNTS, ids=label)
def test_trained_without_the_head(row, models):
    method, targets, options, *counts = row
    for model, count in zip(models, counts, strict=True):
        vimtune.inject(model, method, name="counted", targets=targets, **options)
        try:
            assert vimtune.summary(model).trainable == count
        finally:
            vimtune.delete_adapter(model, "counted")
