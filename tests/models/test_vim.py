"""The models compute what the official ones compute, and have the interface of timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models._features import FeatureGetterNet, FeatureHookNet

import vimtune  # noqa: F401  (registers the models)
from vimtune import ops
from vimtune.models import VisionMamba, list_models, resize_pos_embed
from vimtune.models.vim import default_cfgs
from vimtune.models.weights import WEIGHTS

FIXTURE = Path(__file__).parent.parent / "fixtures" / "vim_reference_small.safetensors"
NAMES = [*timm.list_models("vim_*"), "test_vim"]
SMALL_NAMES = ["test_vim", "vim_nano_patch8_64"]


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_official_implementation(backend):
    """Logits and every gradient of the official code, recorded in the fixture."""
    recorded = load_file(FIXTURE)
    model = VisionMamba(
        img_size=48, patch_size=16, stride=8, embed_dim=32, depth=3, num_classes=7, backend=backend
    )
    official = {key.removeprefix("state."): x for key, x in recorded.items() if key.startswith("state.")}
    assert set(official) == set(model.state_dict())
    model.load_state_dict(official)
    logits = model(recorded["input"])
    torch.testing.assert_close(logits, recorded["logits"], rtol=0, atol=1e-5)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = recorded[f"grad.{name}"]
        error = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert error <= 5e-5, f"{name}: {error:.1e} of max|g|"


# specs of the official implementation: all parameters for a number of classes
COUNTS = {
    "vim_tiny_patch16_224": {1000: 7_148_008, 196: 6_992_836, 102: 6_974_694, 10: 6_956_938},
    "vim_tiny_patch16_stride8_224": {1000: 7_250_344, 101: 7_076_837},
    "vim_small_patch16_224": {1000: 25_796_584, 102: 25_450_854},
    "vim_small_patch16_stride8_224": {1000: 26_001_256, 100: 25_654_756},
    "vim_base_patch16_224": {1000: 97_598_440},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    for num_classes, expected in COUNTS[name].items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=num_classes)
        assert sum(p.numel() for p in model.parameters()) == expected
        assert len(model.state_dict()) == 415


def test_nano_has_about_a_million_parameters():
    model = timm.create_model("vim_nano_patch8_64")
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


def test_every_model_is_listed():
    assert set(list_models()) == {*NAMES, *(weights.name for weights in WEIGHTS)}
    assert all(list_models().values())


def test_every_model_has_imagenet_statistics():
    for name in NAMES:
        cfg = timm.models.get_pretrained_cfg(name)
        assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    hub = {name: cfg.default.hf_hub_id for name, cfg in default_cfgs.items() if cfg.default.hf_hub_id}
    assert set(hub) == set(COUNTS)
    assert timm.models.get_pretrained_cfg("vim_tiny_patch16_224").crop_pct == 0.875


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_timm_interface(name):
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, model.patch_embed.num_patches + 1, model.num_features)
        features = model.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(features), model(x))
        torch.testing.assert_close(features, tokens[:, model.cls_position])

        final, maps = model.forward_intermediates(x, indices=2, norm=True)
        torch.testing.assert_close(final, tokens)
        grid = model.patch_embed.grid_size
        assert [m.shape for m in maps] == [(2, model.embed_dim, *grid)] * 2
        patches = torch.cat([tokens[:, : model.cls_position], tokens[:, model.cls_position + 1 :]], 1)
        torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), patches)
        [(sequence, cls_token)] = model.forward_intermediates(
            x,
            indices=[0],
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
            stop_early=True,
        )
        assert sequence.shape == (2, grid[0] * grid[1], model.embed_dim)
        assert cls_token.shape == (2, 1, model.embed_dim)

        model.reset_classifier(7, "avg")
        assert model(x).shape == (2, 7) and model.num_classes == 7
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), patches.mean(1))
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert len(groups) == len(model.layers) + 1
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_features_only():
    model = timm.create_model("test_vim", features_only=True, out_indices=[0, 2]).eval()
    maps = model(torch.randn(1, 3, 32, 32))
    assert [m.shape for m in maps] == [(1, 16, 4, 4)] * 2
    assert model.feature_info.channels() == [16, 16] and model.feature_info.reduction() == [8, 8]


def test_features_come_from_the_getter_alone():
    images = torch.randn(1, 3, 32, 32)
    for getter in ("getter", "GETTER", FeatureGetterNet):
        model = timm.create_model("test_vim", features_only=True, feature_cls=getter)
        assert [x.shape for x in model(images)] == [(1, 16, 4, 4)] * 3
    for other in ("fx", "hook", "Hook", "dict", "list", "nonsense", FeatureHookNet, 3):
        with pytest.raises(ValueError, match=r"feature_cls = .*: expected 'getter'"):
            timm.create_model("test_vim", features_only=True, feature_cls=other)
    with pytest.raises(ValueError, match="feature_cls = 'getter' without features_only=True"):
        timm.create_model("test_vim", feature_cls="getter")


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_non_square_images_and_input_channels():
    model = VisionMamba(img_size=(24, 40), patch_size=8, in_chans=1, embed_dim=16, depth=1, num_classes=2)
    assert model.patch_embed.grid_size == (3, 5) and model.cls_position == 7
    assert model(torch.randn(1, 1, 24, 40)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"24 x 40 pixels \(H x W\), got 40 x 24"):
        model(torch.randn(1, 1, 40, 24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path_rat": 0.1}, "'drop_path_rat'. Did you mean 'drop_path_rate'"),
        ({"peft_target": "both"}, "Did you mean 'peft_targets'"),
        ({"peft_targets": "both"}, "peft_targets without peft"),
        ({"img_size": 4}, "smaller than patch_size"),
        ({"img_size": -1}, "img_size.*greater than or equal to 1"),
        ({"global_pool": "max"}, "global_pool"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_vim", **options)


def test_drop_path_grows_linearly():
    model = timm.create_model("test_vim", drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224")
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for mixer in (block.mixer for block in model.layers):
        bound = 384**-0.5 / 24**0.5
        assert mixer.out_proj.weight.abs().max() <= bound
        assert mixer.out_proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
            dt = torch.nn.functional.softplus(bias)
            assert dt.min() > 0.9e-3 and dt.max() < 0.11
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(384, 16))


class TestPositionEmbedding:
    def test_same_grid_is_untouched(self):
        rows = torch.randn(1, 17, 4)
        assert resize_pos_embed(rows, (4, 4), (4, 4)) is rows

    @pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((5, 5), (3, 7)), ((3, 7), (5, 5))])
    def test_class_row_moves_to_the_new_middle(self, old, new):
        old_count, new_count = old[0] * old[1], new[0] * new[1]
        rows = torch.zeros(1, old_count + 1, 2)
        rows[:, old_count // 2] = 7.0
        resized = resize_pos_embed(rows, old, new)
        assert resized.shape == (1, new_count + 1, 2)
        expected = torch.zeros_like(resized)
        expected[:, new_count // 2] = 7.0
        torch.testing.assert_close(resized, expected)

    def test_a_linear_field_stays_where_it_is(self):
        """Rows that encode their own relative position still do so away from the borders."""

        def field(height, width):
            y, x = torch.meshgrid(
                (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
            )
            rows = torch.stack([y, x], dim=-1).flatten(0, 1)
            middle = height * width // 2
            return torch.cat([rows[:middle], torch.zeros(1, 2), rows[middle:]])[None]

        resized = resize_pos_embed(field(14, 14), (14, 14), (28, 21))
        middle = 28 * 21 // 2
        drop = [index for index in range(28 * 21 + 1) if index != middle]
        maps = [t[0, drop].unflatten(0, (28, 21))[4:-4, 4:-4] for t in (resized, field(28, 21))]
        torch.testing.assert_close(*maps, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_fp32(dtype):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=4).eval()
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    assert torch.isfinite(logits).all()
    assert (logits.float() - expected).norm() / expected.norm() < 2e-2


def test_half_precision_model_keeps_its_residual_in_fp32():
    model = timm.create_model("test_vim", num_classes=4).to(torch.bfloat16)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    logits = model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert seen == [torch.float32] and logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=4, depth=1)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backends_agree_on_a_whole_model():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    with ops.use_backend("reference"):
        expected = model(x)
    for row in ops.backend_report("cpu"):
        if row.available:
            with ops.use_backend(row.name):
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
