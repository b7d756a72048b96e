from __future__ import annotations

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import vimtune
from vimtune.models import CheckpointError, resize_pos_embed


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


def test_as_many_patches_in_another_grid_are_resized_too(tmp_path, model, caplog):
    """16 patches are 4 x 4 in the file and 2 x 8 here: equal shapes, different places."""
    path = tmp_path / "plain.pth"
    torch.save(model.state_dict(), path)
    wide = timm.create_model("test_vim", num_classes=4, img_size=(16, 64))
    vimtune.load_checkpoint(wide, path)
    assert "16 patches taken as a 4 x 4 grid" in caplog.text
    assert not torch.allclose(wide.pos_embed, model.pos_embed)
    torch.testing.assert_close(wide.pos_embed, resize_pos_embed(model.pos_embed, (4, 4), (2, 8)))


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


def test_missing_file_and_folder(tmp_path, model):
    with pytest.raises(CheckpointError, match="does not exist"):
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
    with pytest.raises(CheckpointError, match="no pretrained weights are published for vim_tiny_patch8_64"):
        timm.create_model("vim_tiny_patch8_64", pretrained=True)


def test_unreachable_hub_is_one_clear_message(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        timm.create_model("vim_tiny_patch16_224", pretrained=True)
    assert "--checkpoint" in str(caught.value)


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
