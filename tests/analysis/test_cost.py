"""Operations: products of matrices as torch counts them, the scan by numbers that count their operations."""

from __future__ import annotations

import pytest
import timm
import torch
from changed_models import changed_vim
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vimtune
from vimtune.analysis.cost import (
    Sizes,
    analyze,
    bytes_per_image,
    kept_bytes,
    layer_operations,
    model_operations,
    scan_operations,
)
from vimtune.analysis.subject import Subject


@pytest.mark.parametrize("options", [{}, {"img_size": 48, "patch_size": 16, "stride": 8, "d_state": 5}])
def test_products_are_those_that_torch_counts(options):
    # Convolution and scan are operations of our own there, which torch does not count.
    model = timm.create_model("test_vim", num_classes=7, backend="torch", **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, *model.patch_embed.img_size))
    # An overlapping patch embedding is a convolution, whose products torch counts likewise.
    assert model_operations(Sizes.of(model)).products == counter.get_total_flops()


class Counted:
    """A number that counts every operation it takes part in; its value is of no interest."""

    done = 0

    def _operate(self, _other: object = None) -> Counted:
        Counted.done += 1
        return Counted()

    __add__ = __mul__ = __radd__ = __rmul__ = __neg__ = exp = log = _operate


def test_the_operations_of_a_scan_are_those_of_its_definition():
    tokens, channels, states = 3, 2, 4
    Counted.done = 0
    number = Counted()
    for _ in range(channels):
        A = [-number.exp() for _ in range(states)]
        state = [number] * states
        for _ in range(tokens):
            dt = (1 + (number + number).exp()).log()  # softplus(delta + bias)
            v = dt * number  # dt u
            state = [(dt * A[n]).exp() * state[n] + v * number for n in range(states)]
            products = [s * number for s in state]  # C s
            y = products[0]
            for product in products[1:]:
                y = y + product
            _ = y + number * number  # D u
    assert Counted.done == scan_operations(tokens, channels, states) == tokens * channels * (7 * 4 + 6) + 16


def test_all_blocks_and_what_is_around_them():
    sizes = Sizes.of(timm.create_model("test_vim", num_classes=7))
    layer, whole = layer_operations(sizes), model_operations(sizes)
    assert (sizes.tokens, sizes.inner, sizes.depth) == (17, 32, 3)
    assert whole.scan == 3 * layer.scan == 3 * 2 * scan_operations(17, 32, 16)
    assert whole.total == whole.products + whole.scan + whole.rest
    assert whole.products - 3 * layer.products == 2 * 16 * 192 * 16 + 2 * 16 * 7


def test_what_autograd_keeps_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images = torch.randn(3, 4)
    assert kept_bytes(model, images) == 4 * 3 * 8  # the result of relu, for relu and for the layer behind it
    assert kept_bytes(model.requires_grad_(False), images) == 0


def test_of_a_merged_file_is_not_said_what_was_trained():
    before, after = changed_vim("lora", rank=2)
    section = analyze(Subject(before, after))
    assert section.numbers["parameters"]["trainable"] == vimtune.summary(after).trainable
    section = analyze(Subject(before, vimtune.merge(after)))
    assert section.numbers["parameters"]["trainable"] is None
    assert list(section.numbers["activation_bytes_per_image"]) == ["full fine-tuning"]
    assert "of which a merged file does not say which were trained" in section.findings[1]


def test_an_adapter_keeps_less_than_full_training():
    before, after = changed_vim("lora", rank=2)
    image = torch.randn(3, 32, 32)
    part, whole = bytes_per_image(after, image), bytes_per_image(before.requires_grad_(True), image)
    assert 0 < part <= whole
    assert bytes_per_image(changed_vim("linear")[1], image) < part / 10
