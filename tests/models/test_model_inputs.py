"""What models take as images, and where and in which form they are created and copied."""

from __future__ import annotations

import copy
import io
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch._subclasses.fake_tensor import FakeTensorMode

import vimtune
from vimtune import ops

BACKENDS = [row.name for row in ops.backend_report("cpu") if row.available]


def create(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vim", **{"num_classes": 4, **options})


# --- images

WRONG_IMAGES = {
    "one image": (torch.zeros(3, 32, 32), "got 3 dimensions; give a single image a batch dimension"),
    "a video": (torch.zeros(1, 2, 3, 32, 32), "got 5 dimensions"),
    "grey": (torch.zeros(2, 1, 32, 32), "images of 3 channels .* got 1"),
    "channels last": (torch.zeros(2, 32, 32, 3), "images of 3 channels .* got 32"),
    "another size": (torch.zeros(2, 3, 32, 40), r"32 x 32 pixels \(H x W\), got 32 x 40"),
    "bytes": (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8; divide by 255"),
    "whole numbers": (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "got torch.int64"),
}


@pytest.mark.parametrize("stride", [None, 4])
@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_wrong_images_are_one_clear_line(kind, stride):
    images, message = WRONG_IMAGES[kind]
    model = create(stride=stride)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=message) as caught:
            call(images)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stride", [None, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_empty_logits(backend, stride):
    model = create(stride=stride, backend=backend)
    images = torch.zeros(0, 3, 32, 32, requires_grad=True)
    logits = model(images)
    assert logits.shape == (0, 4)
    logits.sum().backward()
    assert images.grad.shape == images.shape
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model(images).shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token_leaves_the_bias_as_it_is(backend):
    x, weight, bias = torch.randn(1, 1, 8), torch.randn(8, 4), torch.randn(8)
    before = bias.clone()
    ops.causal_conv1d(x, weight, bias, backend=backend)
    assert torch.equal(bias, before)


def test_an_empty_batch_with_an_adapter():
    model = create(peft="lora+bitfit", peft_kwargs={"rank": 2})
    model(torch.zeros(0, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("size", [36, (32, 36)])
def test_pixels_that_no_patch_covers_are_mentioned(caplog, size):
    model = create(img_size=size)
    assert model.patch_embed.grid_size == (4, 4)
    assert "do not fill an image of" in caplog.text and "columns are not seen" in caplog.text
    caplog.clear()
    create(img_size=40)
    create(img_size=36, stride=4)
    assert not caplog.text


@pytest.mark.parametrize("options", [{}, {"img_size": 48}, {"img_size": (40, 24), "in_chans": 1}])
@pytest.mark.parametrize("features_only", [False, True])
def test_the_pretrained_cfg_says_the_size_of_the_models_images(options, features_only):
    model = create(**options, features_only=features_only)
    channels, height, width = resolve_model_data_config(model)["input_size"]
    size = options.get("img_size", 32)
    assert (height, width) == (size if isinstance(size, tuple) else (size, size))
    assert channels == options.get("in_chans", 3)
    model(torch.zeros(1, channels, height, width))
    assert timm.get_pretrained_cfg("test_vim").input_size == (3, 32, 32)


# --- device and dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_parameters(dtype):
    model = create(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if dtype in (torch.float32, torch.bfloat16):
        assert model(torch.zeros(1, 3, 32, 32, dtype=dtype)).dtype == dtype
    model.reset_classifier(7)
    assert model.head.weight.dtype == dtype


def test_device_of_the_parameters():
    model = create(device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 4)
    plain, placed = create(), create(device="cpu", dtype=torch.float32)
    assert all(torch.equal(x, placed.state_dict()[name]) for name, x in plain.state_dict().items())
    assert placed.creation == plain.creation


def test_created_on_the_device_and_in_the_dtype_of_the_context():
    with torch.device("meta"):
        assert create().cls_token.device.type == "meta"
    with FakeTensorMode():
        model = create()
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


# --- copies


@pytest.mark.parametrize("make", ["deepcopy", "torch.save", "local-dir", "local-dir by timm"])
def test_copies_compute_the_same(make, tmp_path):
    model = create(img_size=(32, 24), global_pool="avg").eval()
    images = torch.randn(2, 3, 32, 24)
    expected = model(images)
    if make == "deepcopy":
        again = copy.deepcopy(model)
    elif make == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    else:
        if make == "local-dir":
            config = {
                "architecture": "test_vim",
                "num_classes": 4,
                "pretrained_cfg": {**model.pretrained_cfg, "num_classes": 4, "fixed_input_size": True},
                "model_args": {"img_size": [32, 24], "global_pool": "avg"},
            }
            (tmp_path / "config.json").write_text(json.dumps(config))
            save_file(model.state_dict(), tmp_path / "model.safetensors")
        else:
            given = {
                "img_size": [32, 24],
                "global_pool": "avg",
            }  # newer versions of timm know it by themselves
            timm.models.save_for_hf(model, str(tmp_path), model_args=given, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert again.creation == model.creation
        without = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
        assert without.patch_embed.img_size == (32, 24)
    assert torch.equal(again(images), expected)


def test_a_saved_folder_at_another_image_size(tmp_path):
    """The grid is the one that the folder states: 2 x 8 patches, though they might be 4 x 4."""
    from vimtune.models import resize_pos_embed

    model = create(img_size=(16, 64))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(32, 32))
    assert torch.equal(again.pos_embed, resize_pos_embed(model.pos_embed, (2, 8), (4, 4)))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"rank": 2}, r"'rank' is an option of a method, .* peft_kwargs=\{'rank': 2\}"),
        ({"block_size": 4}, r"'block_size' is an option of a method"),
        ({"peft": "lora", "alpha": 4.0}, r"'alpha' is an option of a method"),
        ({"deivce": "cpu"}, "unknown model option 'deivce'. Did you mean 'device'"),
        ({"dypte": torch.half}, "unknown model option 'dypte'. Did you mean 'dtype'"),
        ({"pretained": True}, "unknown model option 'pretained'. Did you mean 'pretrained'"),
    ],
)
def test_misplaced_and_misspelt_options(option, words):
    with pytest.raises(ValueError, match=words):
        create(**option)


@pytest.mark.parametrize(
    ("name", "value", "keyword"),
    [
        ("targets", "both", "peft_targets"),
        ("layers", "0-1", "peft_layers"),
        ("method", "lora", "peft"),
        ("model", "test_vim", "model_name"),
    ],
)
def test_where_an_adapter_goes_is_no_option_of_its_method(name, value, keyword):
    with pytest.raises(ValueError, match=f"peft_kwargs: {name} = '{value}' .*: give it as {keyword}$"):
        create(peft="lora", peft_kwargs={"rank": 3, name: value})


def test_the_other_arguments_of_an_adapter_may_stand_beside_its_options():
    model = create(peft="lora", peft_kwargs={"name": "mine", "num_classes": 3, "budget": 3000})
    assert vimtune.list_adapters(model) == ["mine"] and model.num_classes == 3
