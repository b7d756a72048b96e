"""Checkpoints of others are read without running their code, and fitted to the model."""

from __future__ import annotations

import argparse
import json
import pickle
import random
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

import vimtune
from vimtune.models import CheckpointError, resize_pos_embed
from vimtune.models.checkpoint import pretrained_loading
from vimtune.recipe import Recipe
from vimtune.training.identity import Facts
from vimtune.training.state import Progress, RunState, save_run_state


def save(content: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.fixture
def model():
    torch.manual_seed(1)
    return timm.create_model("test_vim", num_classes=4)


@pytest.fixture
def official(tmp_path, model):
    """A file laid out as the official training script writes it."""
    path = tmp_path / "official.pth"
    content = {
        "model": {name: x + 1 for name, x in model.state_dict().items()},
        "model_ema": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "scaler": "none",
        "args": argparse.Namespace(lr=1e-3, model="vim"),
    }
    torch.save(content, path)
    return path


def test_official_file(model, official):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    vimtune.load_checkpoint(model, official)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name] + 1)


def test_official_file_through_timm(official):
    """timm's own rule for local files prefers the averaged weights, `model_ema`."""
    overlay = {"file": str(official), "num_classes": 4}
    model = timm.create_model("test_vim", num_classes=4, pretrained=True, pretrained_cfg_overlay=overlay)
    expected = torch.load(official, weights_only=False)["model_ema"]
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_safetensors_with_adapters_in_place(tmp_path, model):
    path = tmp_path / "plain.safetensors"
    save_file({name: x + 1 for name, x in model.state_dict().items()}, path)
    vimtune.inject(model, "lora", rank=2)
    before = model.layers[0].mixer.in_proj.weight.clone()
    vimtune.load_checkpoint(model, path)
    torch.testing.assert_close(model.layers[0].mixer.in_proj.weight, before + 1)


def test_other_image_size_resizes_the_position_embedding(tmp_path, model):
    path = tmp_path / "plain.pth"
    torch.save(model.state_dict(), path)
    larger = timm.create_model("test_vim", num_classes=4, img_size=(40, 48))
    vimtune.load_checkpoint(larger, path)
    torch.testing.assert_close(
        larger.pos_embed[:, larger.cls_position], model.pos_embed[:, model.cls_position]
    )
    assert larger(torch.randn(1, 3, 40, 48)).shape == (1, 4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_position_embedding_of_the_models_shape_stays_as_it_is(tmp_path, suffix, caplog):
    """16 patches are 2 x 8 here, though they might be 4 x 4."""
    wide, again = (timm.create_model("test_vim", num_classes=4, img_size=(16, 64)) for _ in range(2))
    path = save(wide.state_dict(), tmp_path / f"plain{suffix}")
    vimtune.load_checkpoint(again, path)
    assert torch.equal(again.pos_embed, wide.pos_embed) and not caplog.text


def test_a_grid_that_is_guessed_is_said_and_one_that_the_file_states_is_taken(tmp_path, caplog):
    wide = timm.create_model("test_vim", num_classes=4, img_size=(16, 64))
    other = {"num_classes": 4, "img_size": (32, 64)}
    square = resize_pos_embed(wide.pos_embed.detach(), (4, 4), (4, 8))
    stated = resize_pos_embed(wide.pos_embed.detach(), (2, 8), (4, 8))
    path = save(wide.state_dict(), tmp_path / "plain.safetensors")
    guessing = vimtune.load_checkpoint(timm.create_model("test_vim", **other), path)
    assert torch.equal(guessing.pos_embed, square)
    assert "how its 16 patches lie: taken as a 4 x 4 grid and resized to 4 x 8" in caplog.text
    caplog.clear()
    save_file(wide.state_dict(), path, metadata={"options": json.dumps(wide.options)})
    knowing = vimtune.load_checkpoint(timm.create_model("test_vim", **other), path)
    assert torch.equal(knowing.pos_embed, stated) and not caplog.text
    # The same number of patches in another grid, and the file says so.
    transposed = vimtune.load_checkpoint(timm.create_model("test_vim", num_classes=4), path)
    assert torch.equal(transposed.pos_embed, resize_pos_embed(wide.pos_embed, (2, 8), (4, 4)))


@pytest.mark.parametrize("options", ["{", "[]", '{"img_size": true}', '{"img_size": 32}', '{"url": "x"}'])
def test_damaged_metadata_of_a_merged_file_is_refused(tmp_path, model, options):
    path = tmp_path / "merged.safetensors"
    save_file(model.state_dict(), path, metadata={"options": options})
    with pytest.raises(CheckpointError) as caught:
        vimtune.load_checkpoint(model, path)
    assert "\n" not in str(caught.value)


# --- checkpoints of others

PREFIXES = ["_orig_mod.", "module.", "model.", "backbone.", "module._orig_mod.", "model.backbone."]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_stripped(tmp_path, model, prefix, suffix):
    state = {prefix + name: x + 1 for name, x in model.state_dict().items()}
    path = save(state, tmp_path / f"wrapped{suffix}")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    vimtune.load_checkpoint(model, path)
    assert all(torch.equal(x, before[name] + 1) for name, x in model.state_dict().items())


def test_a_prefix_of_some_names_stays(tmp_path, model):
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing pos_embed|missing cls_token"):
        vimtune.load_checkpoint(model, save(state, tmp_path / "mixed.pth"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state": {"model": state}, "epoch": 3},
        lambda state: {"checkpoint": {"weights": {"net": state}}},
        lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "net": state},
        lambda state: {"teacher": {"x": torch.zeros(1)}, "student": state, 5: None},
        lambda state: state | {"epoch": 3, "note": "text", "history": [1.0], 7: None},
        lambda state: {"state_dict": {f"model.{name}": x for name, x in state.items()}, "loops": {}},
        lambda state: {"model": state, "model_ema": {name: x * 0 for name, x in state.items()}},
    ],
)
def test_weights_are_found_wherever_they_lie(tmp_path, model, wrap):
    state = {name: x + 1 for name, x in model.state_dict().items()}
    path = save(wrap(state), tmp_path / "nested.pth")
    vimtune.load_checkpoint(model, path)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_a_dictionary_inside_itself_ends(tmp_path, model):
    circle: dict = {"epoch": 1}
    circle["model"] = circle
    with pytest.raises(CheckpointError, match="no weights in the checkpoint"):
        vimtune.load_checkpoint(model, save(circle, tmp_path / "circle.pth"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: torch.full_like(x, float("nan")), "norm_f.weight holds values that are not finite"),
        (lambda x: x / 0, "norm_f.weight holds values that are not finite"),
        (lambda x: x.double() + 1e300, "norm_f.weight holds values that are too large for the model's"),
        (lambda x: x.to(torch.int8), r"norm_f.weight holds torch.int8 .*, expected floating point"),
        (lambda x: x.to(torch.complex64), r"norm_f.weight holds torch.complex64"),
        (lambda x: x.bool(), r"norm_f.weight holds torch.bool"),
        (lambda x: x.to_sparse(), r"norm_f.weight holds .*sparse"),
        (lambda x: x.to("meta"), "norm_f.weight holds no values"),
        (lambda x: x[0], r"norm_f.weight \(\) instead of \(16,\)"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(tmp_path, model, change, words):
    state = dict(model.state_dict())
    state["norm_f.weight"] = change(state["norm_f.weight"])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        vimtune.load_checkpoint(model, save(state, tmp_path / "odd.pth"))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 17), (2, 17, 16), (1, 1, 16), (1, 0, 16), (1, 17, 8), (1, 9, 16)]
)
def test_a_position_embedding_of_no_grid_is_refused(tmp_path, model, shape):
    state = dict(model.state_dict()) | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"pos_embed|position embedding"):
        vimtune.load_checkpoint(model, save(state, tmp_path / "odd.pth"))


def test_an_adapter_or_a_run_state_says_what_it_is(tmp_path, model):
    vimtune.inject(model, "lora", rank=2)
    vimtune.save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"is an adapter.*vimtune.load_adapter"):
        vimtune.load_checkpoint(model, tmp_path / "adapter.safetensors")
    state = RunState(Recipe(), Facts({}, 0, ""), Progress(), {"x": torch.zeros(1)}, {}, {}, {})
    save_run_state(tmp_path / "checkpoint.safetensors", state)
    with pytest.raises(CheckpointError, match=r"is the state of a run.*--resume"):
        vimtune.load_checkpoint(model, tmp_path / "checkpoint.safetensors")


def test_a_head_that_the_adapter_brings_is_not_missed(tmp_path, model, caplog):
    path = save(model.state_dict(), tmp_path / "plain.pth")
    other = timm.create_model("test_vim", num_classes=9)
    vimtune.load_checkpoint(other, path, head=False)
    assert not caplog.text and torch.equal(other.norm_f.weight, model.norm_f.weight)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_one_line(tmp_path, model, seed):
    """Bytes overwritten anywhere: either the file still loads, or one line says that it cannot."""
    path = save({"model": model.state_dict(), "epoch": 3}, tmp_path / "damaged.pth")
    data = bytearray(path.read_bytes())
    generator = random.Random(seed)
    for _ in range(generator.choice([1, 20])):
        start = generator.randrange(len(data))
        data[start : start + 8] = generator.randbytes(8)
    path.write_bytes(data)
    try:
        vimtune.load_checkpoint(model, path)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_other_number_of_classes_keeps_the_fresh_head(tmp_path, model, caplog):
    path = tmp_path / "plain.pth"
    torch.save(model.state_dict(), path)
    other = timm.create_model("test_vim", num_classes=9)
    head = other.head.weight.clone()
    vimtune.load_checkpoint(other, path)
    assert "head for 9 classes" in caplog.text
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.layers[0].mixer.in_proj.weight, model.layers[0].mixer.in_proj.weight)
    headless = timm.create_model("test_vim", num_classes=0)
    vimtune.load_checkpoint(headless, path)
    assert torch.equal(headless.norm_f.weight, model.norm_f.weight)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def write_garbage(path):
    path.write_bytes(b"\x00\x01 not a checkpoint")


def write_truncated(path):
    torch.save({"weight": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])


def write_malicious(path):
    torch.save({"model": Evil()}, path)


def write_bare_pickle(path):
    path.write_bytes(pickle.dumps(Evil()))


def write_empty(path):
    path.write_bytes(b"")


def write_other_model(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def write_no_weights(path):
    torch.save({"epoch": 3}, path)


def write_list(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        write_garbage,
        write_truncated,
        write_malicious,
        write_bare_pickle,
        write_empty,
        write_other_model,
        write_no_weights,
        write_list,
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, model, write, suffix):
    path = tmp_path / f"bad{suffix}"
    write(path)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        vimtune.load_checkpoint(model, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_a_file_has_in_place_of_a_dictionary_is_said(tmp_path, model):
    torch.save([torch.zeros(2, 3)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"holds \[a Tensor of shape \(2, 3\)\], expected a dictionary"):
        vimtune.load_checkpoint(model, tmp_path / "list.pth")


def test_endings_may_be_in_upper_case(tmp_path, model):
    """Some systems write them so, and `vimtune merge -o MERGED.SAFETENSORS` makes such a file."""
    save_file(model.state_dict(), tmp_path / "MERGED.SAFETENSORS")
    vimtune.load_checkpoint(model, tmp_path / "MERGED.SAFETENSORS")


def test_missing_file_and_folder(tmp_path, model):
    with pytest.raises(
        CheckpointError, match=r"does not exist; expected .* ending in \.safetensors or \.pth"
    ):
        vimtune.load_checkpoint(model, tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        vimtune.load_checkpoint(model, tmp_path)


def test_mismatch_names_the_keys(tmp_path, model):
    state = model.state_dict()
    state["layers.0.mixer.rope"] = torch.zeros(1)
    state["norm_f.weight"] = torch.zeros(3)
    del state["cls_token"]
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        vimtune.load_checkpoint(model, path)
    message = str(caught.value)
    assert "missing cls_token" in message and "unexpected layers.0.mixer.rope" in message
    assert "norm_f.weight (3,) instead of (16,)" in message


def test_no_published_weights_is_one_clear_message():
    with pytest.raises(CheckpointError, match="no pretrained weights are published for test_vim"):
        timm.create_model("test_vim", pretrained=True)


def test_unreachable_hub_is_one_clear_message(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        timm.create_model("vim_tiny_patch16_224", pretrained=True)
    assert "--checkpoint" in str(caught.value)


def test_a_connection_that_breaks_is_one_clear_message():
    with (
        pytest.raises(CheckpointError, match=r"could not be downloaded \(the line is dead\)"),
        pretrained_loading("vim", pretrained=True),
    ):
        raise HfHubHTTPError.__bases__[0]("the line is dead")


def test_first_checkpoint_on_real_images(shared_dir):
    """50.4 % top-1 on the Tiny-ImageNet-200 validation set; a fixed subset here, all of it under `slow`."""
    assert evaluate_tiny_imagenet(shared_dir, 200) == pytest.approx(50.4, abs=11)  # three sigma


@pytest.mark.slow
def test_first_checkpoint_on_all_real_images(shared_dir):
    assert evaluate_tiny_imagenet(shared_dir, 10_000) == pytest.approx(
        50.4, abs=1.0
    )  # measured in bf16, here fp32


def evaluate_tiny_imagenet(shared_dir, count):
    import io

    import numpy as np
    from PIL import Image

    data = np.load(shared_dir / "data" / "tiny_imagenet" / "val.npz")
    blob, offset, label = data["blob"], data["offset"], data["label"]
    model = timm.create_model("vim_tiny_patch8_64", num_classes=200).eval()
    vimtune.load_checkpoint(model, shared_dir / "weights" / "vim_tiny_patch8_64.tiny_in200_50p4.safetensors")
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    indices = np.random.default_rng(0).permutation(len(label))[:count]
    correct = 0
    for start in range(0, count, 100):
        batch = []
        chunk = indices[start : start + 100]
        for i in chunk:
            with Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]].tobytes())) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
            batch.append((pixels - mean) / std)
        with torch.inference_mode():
            predicted = model(torch.stack(batch)).argmax(1)
        correct += (predicted == torch.from_numpy(label[chunk].astype(np.int64))).sum().item()
    return 100 * correct / count
