"""A subclass may surround the calls of a model, and states may be added, in every way through the model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn

from vimtune.models import BiMambaMixer, VisionMamba

PROMPTS = 3


class HandingOn(BiMambaMixer):
    """Adds to its scan what the layer before it has written into the flow."""

    def scan(self, xz, *flow):
        y = super().scan(xz, *flow)
        flow[0][f"layer {self.index}"] = self.gate * y.mean(1, keepdim=True)
        before = flow[0].get(f"layer {self.index - 1}")
        return y if before is None else y + before


class Prompted(VisionMamba):
    """Puts tokens before those of the image, and takes them away from every output."""

    def encode(self, tokens, flow=None, *rest):
        prompts = self.prompts[None].expand(tokens.shape[0], -1, -1)
        outputs = super().encode(torch.cat([prompts, tokens], 1), {} if flow is None else flow, *rest)
        return [output[:, PROMPTS:] for output in outputs]


def surrounded() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vim", depth=2)
    for index, block in enumerate(model.layers):
        block.mixer.__class__, block.mixer.index = HandingOn, index
        block.mixer.gate = nn.Parameter(torch.randn(1, 1, 32))
    model.__class__, model.prompts = Prompted, nn.Parameter(torch.randn(PROMPTS, 16))
    return model


def grown() -> nn.Module:
    """18 states instead of 16, by assigning parameters."""
    torch.manual_seed(0)
    model = timm.create_model("test_vim", depth=2)
    for block in model.layers:
        mixer = block.mixer
        for logarithms, name in (("A_log", "x_proj"), ("A_b_log", "x_proj_b")):
            A, projection = getattr(mixer, logarithms).detach(), getattr(mixer, name)
            dt, B, C = projection.weight.detach().split([mixer.dt_rank, 16, 16])
            more = torch.randn(2, 2, A.shape[0]) * 0.3
            setattr(mixer, logarithms, nn.Parameter(torch.cat([A, A[:, -2:] + 0.1], 1)))
            projection.weight = nn.Parameter(torch.cat([dt, B, more[0], C, more[1]]))
    return model


def logits_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("build", "unused"), [(surrounded, ["layers.1.mixer.gate"]), (grown, [])])
def test_every_way_through_the_model_is_one(build, unused):
    model, images = build().eval(), torch.randn(2, 3, 32, 32)
    expected = logits_and_gradients(model, images)
    # The last layer hands on what nobody reads; everything else takes part.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == unused
    assert not torch.allclose(expected[0], timm.create_model("test_vim", depth=2).eval()(images), atol=1e-3)
    for checkpointing in (True, False):
        model.set_grad_checkpointing(checkpointing)
        torch.testing.assert_close(logits_and_gradients(model, images), expected)
        last, (tokens,) = model.forward_intermediates(images, indices=[1], output_fmt="NLC")
        torch.testing.assert_close(model.forward_head(last), expected[0])
        assert tokens.shape == (2, 16, 16)
    others = [
        copy.deepcopy(model),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (images,)).module(),
        lambda images: create_feature_extractor(model, {"head": "logits"})(images)["logits"],
    ]
    for other in others:
        with torch.no_grad():  # The compiler would trace the gradients, too, which `test_vim.py` has it do.
            torch.testing.assert_close(other(images), expected[0], rtol=1e-4, atol=1e-5)
    for backend in ("reference", "torch", "cpu"):
        for block in model.layers:
            block.mixer.backend = backend
        found = logits_and_gradients(model, images)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_named_rows_follow_the_number_of_states():
    model = grown()
    rows = model.layers[0].mixer.named_rows()
    assert rows["x_proj.weight"] == {"dt": slice(0, 1), "B": slice(1, 19), "C": slice(19, 37)}
    twin = timm.create_model("test_vim", depth=2, d_state=18)
    twin.load_state_dict(model.state_dict())
    assert twin.layers[0].mixer.named_rows() == rows
