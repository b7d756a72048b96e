"""merge: the file that is written computes the same, in vimtune, in plain timm, and as its own text says."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from adapter_files import SPECIES, make_adapter, rewrite, write_photos
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

import vimtune
from vimtune import adapters, cli
from vimtune.commands.merge import merge_to_file
from vimtune.commands.predict import load_predictor
from vimtune.models import MODELS
from vimtune.models.merged import MergedFileError, is_merged_file
from vimtune.tasks.merging import MergeError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run folder with an adapter, and the merged file of it."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "adapter.safetensors")
    merge_to_file(folder, folder / "merged.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path, made) -> Path:
    shutil.copy(made / "recipe.yaml", tmp_path)
    return Path(shutil.copy(made / "adapter.safetensors", tmp_path))


@pytest.fixture
def merged(tmp_path, made) -> Path:
    return Path(shutil.copy(made / "merged.safetensors", tmp_path))


@pytest.mark.parametrize("peft", ["prodial", "dora", "full", "linear", "lora+bitfit"])
def test_a_merged_file_loads_as_plain_weights_and_computes_the_same(tmp_path, peft, capsys):
    trained = make_adapter(tmp_path / "adapter.safetensors", peft=peft)
    output = tmp_path / "merged.safetensors"
    assert cli.main(["merge", str(tmp_path), "--output", str(output)]) == 0
    assert "maximum logit error" in capsys.readouterr().out

    plain = timm.create_model("test_vim", num_classes=SPECIES)
    assert load_file(output).keys() == plain.state_dict().keys()
    by_timm = timm.create_model("test_vim", num_classes=SPECIES, checkpoint_path=str(output)).eval()
    by_us = vimtune.load_checkpoint(plain, output).eval()
    batch = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for model in (by_timm, by_us):
            torch.testing.assert_close(model(batch), trained(batch), rtol=1e-4, atol=1e-4)
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["classes"])[1] == "species 1"


@pytest.mark.parametrize(
    ("peft", "kwargs"),
    [("affix", {"num_tokens": 2}), ("affix+lora", {"rank": 4, "hidden": 3})],
)
def test_tokens_are_folded_into_what_the_merged_model_begins_with(tmp_path, peft, kwargs, capsys):
    trained = make_adapter(tmp_path / "adapter.safetensors", peft=peft, peft_kwargs=kwargs)
    output = tmp_path / "merged.safetensors"
    assert cli.main(["merge", str(tmp_path), "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "initial_state=True" in printed
    scope: dict = {}
    exec(printed_code(printed), scope)
    batch = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(batch), trained(batch), rtol=1e-4, atol=1e-4)
    plain = timm.create_model("test_vim", num_classes=SPECIES)
    with pytest.raises(
        ValueError, match=r"unexpected .*\. The file is for a model with initial_state=True \(--"
    ):
        vimtune.load_checkpoint(plain, output)
    photos = write_photos(tmp_path / "photos")
    expected = list(load_predictor(tmp_path, device="cpu").predict(photos))
    for before, after in zip(expected, load_predictor(output, device="cpu").predict(photos), strict=True):
        assert before.classes == after.classes
        assert before.probabilities == pytest.approx(after.probabilities, abs=1e-4)


def test_a_merge_that_changes_the_model_leaves_no_file(tmp_path, adapter, monkeypatch):
    merge = vimtune.merge

    def wrong(model):
        merge(model).head.bias.data[0] += 0.1
        return model

    monkeypatch.setattr(adapters, "merge", wrong)
    with pytest.raises(MergeError, match=r"maximum logit error 1\.0e-01"):
        merge_to_file(adapter, tmp_path / "merged.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {adapter.name, "recipe.yaml"}


def test_merge_does_not_overwrite_what_it_reads(tmp_path, adapter, capsys):
    before = adapter.read_bytes()
    assert cli.main(["merge", str(adapter), "-o", str(adapter)]) == 2
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "merged.bin")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert adapter.read_bytes() == before


# --- the merged file as others use it


def printed_code(output: str) -> str:
    """The Python that `vimtune merge` prints."""
    _, _, code = output.partition("load it with:\n")
    return textwrap.dedent(code)


@pytest.mark.parametrize(
    ("name", "img_size", "peft"),
    [
        *((name, None, "lora") for name in MODELS),
        ("test_vim", [80, 48], "lora"),
        ("vim_tiny_patch16_224", [96, 80], "lora"),
        ("test_vim", None, "additional_scan"),  # merges into a model of another size
    ],
)
def test_plain_timm_answers_as_predict_does(tmp_path, name, img_size, peft, capsys):
    """Every model, on photos that are not square: probabilities of adapter, merged file, and timm alone."""
    photos = write_photos(tmp_path / "photos")
    small = {"depth": 1, "embed_dim": 16, "d_state": 2}
    values = {"model": name, "img_size": img_size, "model_kwargs": small, "peft": peft}
    make_adapter(tmp_path / "adapter.safetensors", scale=1.0, **values)
    output = tmp_path / "merged.safetensors"
    assert cli.main(["merge", str(tmp_path), "-o", str(output)]) == 0
    expected = list(load_predictor(tmp_path, device="cpu").predict(photos, top_k=SPECIES))
    found = list(load_predictor(output, device="cpu").predict(photos, top_k=SPECIES))

    scope: dict = {}
    exec(printed_code(capsys.readouterr().out), scope)
    model = scope["model"].eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(photo).convert("RGB")) for photo in photos])
        by_timm = model(batch).softmax(1)
    for prediction, again, row in zip(expected, found, by_timm, strict=True):
        assert prediction.indices[0] == again.indices[0] == int(row.argmax())
        assert prediction.classes == again.classes
        torch.testing.assert_close(
            torch.tensor([prediction.probabilities, again.probabilities]),
            row[prediction.indices].expand(2, -1),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("name", ['it\'s "new" [red].safetensors', "a\nb.safetensors"], ids=ascii)
def test_the_printed_code_works_for_any_path(tmp_path, adapter, name, capsys):
    output = tmp_path / name
    assert cli.main(["merge", str(adapter), "-o", str(output)]) == 0
    scope: dict = {}
    exec(printed_code(capsys.readouterr().out), scope)
    assert torch.equal(scope["model"].head.weight, load_file(output)["head.weight"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_terminal_can_stop_a_merge(tmp_path, adapter, monkeypatch, encoding):
    rewrite(adapter, lambda info: info.update(classes=["日本", "caf\udcff", "$x", "[red]", "\x1b[31m"]))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    output = tmp_path / "日本.safetensors"
    assert cli.main(["merge", str(adapter), "-o", str(output)]) == 0
    assert load_predictor(output).classes == ["日本", r"caf\udcff", "$x", "[red]", "\x1b[31m"]


def test_a_merged_file_is_a_base_for_training(tmp_path, merged):
    flags = (
        "--model test_vim --peft lora --epochs 1 --num-workers 0 --batch-size 16 --device cpu --no-pictures "
        "--dataset-kwargs species=5,train_per_species=4,val_per_species=2,test_per_species=2"
    )
    run = tmp_path / "run"
    command = [*flags.split(), "--checkpoint", str(merged), "--output-dir", str(run)]
    assert cli.train_main(command) == 0
    [photo, *_] = write_photos(tmp_path / "photos")
    assert cli.main(["predict", str(photo), "--adapter", str(run)]) == 0


def test_a_merged_file_of_before_has_no_options(tmp_path, adapter):
    make_adapter(adapter, img_size=[48, 32])
    output = tmp_path / "merged.safetensors"
    merge_to_file(adapter, output)
    [photo, *_] = write_photos(tmp_path / "photos")
    expected = next(load_predictor(output).predict([photo]))
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    del metadata["options"]
    preprocessing = json.loads(metadata["preprocessing"])
    del preprocessing["crop_mode"]
    save_file(load_file(output), output, metadata | {"preprocessing": json.dumps(preprocessing)})
    assert next(load_predictor(output).predict([photo])) == expected


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("model", "hf-hub:someone/model", "known model"),
        ("model", "resnet18", "known model"),
        ("options", '{"cache_dir": "/tmp"}', "cache_dir"),
        ("options", '{"pretrained_cfg_overlay": {}}', "pretrained_cfg_overlay"),
        ("options", '{"depth": 1000000000}', "depth"),
        ("options", '{"depth": 2, "num_classes": 5}', "does not hold the weights of its model"),
        ("options", '{"num_classes": 6}', "does not hold the weights of its model"),
        ("options", "[1]", "options"),
        ("options", "{", "not valid JSON"),
        ("classes", '["a"]', "1 class names for a head of 5"),
        ("classes", '"abcde"', "classes"),
        ("classes", "[1, 2, 3, 4, 5]", "classes"),
        ("preprocessing", '{"mean": [NaN, 0, 0]}', "NaN"),
        ("preprocessing", '{"img_size": [16, 16]}', "16 x 16 pixels"),
        ("preprocessing", "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_a_merged_file_says_is_checked(tmp_path, merged, capsys, part, value, words):
    with safe_open(merged, "pt") as file:
        metadata = file.metadata() | {part: value}
    save_file(load_file(merged), merged, metadata)
    [photo, *_] = write_photos(tmp_path / "photos")
    assert cli.main(["predict", str(photo), "--adapter", str(merged)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: ")] == error[-1:] and words in error[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x + float("nan"), r"head\.bias holds values that are not finite"),
        (lambda x: x + float("inf"), r"head\.bias holds values that are not finite"),
        (lambda x: x.double() + 1e300, r"head\.bias holds values that are too large for the model's"),
        (lambda x: x.to(torch.float8_e4m3fn), r"head\.bias holds torch\.float8_e4m3fn"),
        (lambda x: x.long(), r"head\.bias holds torch\.int64"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(merged, change, words):
    with safe_open(merged, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(merged)
    tensors["head.bias"] = change(tensors["head.bias"])
    save_file(tensors, merged, metadata)
    with pytest.raises(MergedFileError, match=words):
        load_predictor(merged)


def test_a_file_of_another_kind_says_what_it_is(tmp_path, adapter, merged, capsys):
    [photo, *_] = write_photos(tmp_path / "photos")
    plain = tmp_path / "plain.safetensors"
    save_file(timm.create_model("test_vim").state_dict(), plain)
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html>")
    for command, words in (
        (["merge", str(merged), "-o", str(tmp_path / "again.safetensors")], "is merged already"),
        (["merge", str(plain), "-o", str(tmp_path / "again.safetensors")], "adapter file"),
        (["predict", str(photo), "--adapter", str(plain)], "plain weights, which name no classes, are for"),
        (
            ["predict", str(photo), "--adapter", str(page)],
            "page.html is no adapter file; expected the folder of",
        ),
        (["predict", str(photo), "--adapter", str(merged), "--checkpoint", str(plain)], "is a merged file"),
        (["predict", str(photo), "--adapter", str(adapter), "--checkpoint", str(adapter)], "is an adapter"),
    ):
        assert cli.main(command) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert is_merged_file(merged) and not is_merged_file(adapter) and not is_merged_file(plain)


# --- files that cannot be written


@contextlib.contextmanager
def at_most(size: int):
    """No file of more than `size` bytes can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, adapter, capsys):
    output = tmp_path / "merged.safetensors"
    output.write_text("before")
    with at_most(20_000):
        assert cli.main(["merge", str(adapter), "-o", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot write") and re.search(rf"\b{errno.EFBIG}\b|too large", error)
    assert output.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {output.name, adapter.name, "recipe.yaml"}


@pytest.mark.parametrize("link", ["same", "symlink", "hard link"])
@pytest.mark.parametrize("source", ["adapter", "base"])
def test_no_input_is_overwritten(tmp_path, adapter, capsys, link, source):
    """Nor are base weights of which only the adapter knows."""
    base = tmp_path / "base.safetensors"
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), base)
    make_adapter(adapter, checkpoint=str(base))
    read = base if source == "base" else adapter
    before, output = read.read_bytes(), read if link == "same" else tmp_path / "output.safetensors"
    if link == "symlink":
        output.symlink_to(read)
    elif link == "hard link":
        output.hardlink_to(read)
    assert cli.main(["merge", str(tmp_path), "-o", str(output)]) == 2
    assert "it is read as input" in capsys.readouterr().err
    assert read.read_bytes() == before


def test_a_name_that_is_not_unicode_is_no_output(tmp_path, adapter, capsys):
    output = tmp_path / os.fsdecode(b"\xff.safetensors")
    assert cli.main(["merge", str(adapter), "-o", str(output)]) == 2
    assert "its path is not UTF-8" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {adapter.name, "recipe.yaml"}


def test_a_pipe_is_no_output(tmp_path, adapter, capsys):
    output = tmp_path / "merged.safetensors"
    os.mkfifo(output)
    assert cli.main(["merge", str(adapter), "-o", str(output)]) == 2
    assert "it is a device or a pipe" in capsys.readouterr().err and output.is_fifo()


def test_a_folder_is_no_output(tmp_path, adapter, capsys):
    (tmp_path / "merged.safetensors").mkdir()
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "merged.safetensors")]) == 2
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "none" / "merged.safetensors")]) == 2
    errors = capsys.readouterr().err
    assert "it is a folder" in errors and "not a writable folder" in errors
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_of_the_bits_are_half_of_the_file_and_enough(tmp_path, made, adapter, precision, dtype, capsys):
    output = tmp_path / "half.safetensors"
    assert cli.main(["merge", str(adapter), "-o", str(output), "--precision", precision]) == 0
    whole, half = load_file(made / "merged.safetensors"), load_file(output)
    assert all(torch.equal(half[name], tensor.to(dtype)) for name, tensor in whole.items())
    sizes = [path.stat().st_size for path in (output, made / "merged.safetensors")]
    assert sizes[0] < 0.6 * sizes[1]
    predictor = load_predictor(output, device="cpu")
    assert predictor.classes[1] == "species 1"
    # Such a file is what `pretrained=True` of a model in the table of weights reads.
    published = {"file": str(output), "num_classes": SPECIES}
    model = timm.create_model(
        "test_vim", pretrained=True, pretrained_cfg_overlay=published, num_classes=SPECIES
    )
    assert torch.equal(model.head.weight, predictor.model.head.weight)
    assert all(parameter.dtype == torch.float32 for parameter in predictor.model.parameters())


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path, capsys):
    trained = make_adapter(tmp_path / "adapter.safetensors", peft="full")
    with torch.no_grad():
        trained.norm_f.weight.fill_(1e6)
        trained.head.weight.mul_(1e-6)
    vimtune.save_adapter(trained, tmp_path / "adapter.safetensors", classes=[str(i) for i in range(SPECIES)])
    output = tmp_path / "half.safetensors"
    assert cli.main(["merge", str(tmp_path), "-o", str(output), "--precision", "fp16"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not output.exists()
