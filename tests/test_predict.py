"""predict and merge: an adapter file alone is enough, and a merged file computes the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vimtune
from vimtune import cli
from vimtune.adapters import AdapterFileError, adapter_parameters
from vimtune.data import CorruptImageError, build_transform, create_dataset, load_image
from vimtune.plain import MergeError, merge_to_file
from vimtune.predict import find_images, load_predictor
from vimtune.recipe import Recipe
from vimtune.results import SHOWN_IMAGES
from vimtune.train.job import build_model

SPECIES = 5


def make_adapter(path: Path, scale: float = 0.1, **values) -> torch.nn.Module:
    """An adapter file as a training run leaves it, moved away from its start; returns the model."""
    recipe = Recipe(model="test_vim", **{"pretrained": False, "peft": "lora", **values})
    model = build_model(recipe, SPECIES).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for entry in adapter_parameters(model):
            entry.parameter.add_(scale * torch.randn(entry.parameter.shape, generator=generator))
    transform = build_transform("none", (32, 32), train=False, crop_pct=1.0)
    vimtune.save_adapter(
        model,
        path,
        classes=[f"species {index}" for index in range(SPECIES)],
        preprocessing=transform.config,
        extra={"recipe": recipe.to_dict()},
    )
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder with images in two subfolders, of several sizes and kinds."""
    folder = tmp_path_factory.mktemp("images")
    dataset = create_dataset("synthetic_flowers", "test", img_size=(40, 56), species=2, test_per_species=4)
    for index in range(len(dataset)):
        inside = folder / f"class {dataset.label(index)}"
        inside.mkdir(exist_ok=True)
        image = dataset.load(index).resize((40 + 7 * index, 50))
        image.save(inside / f"{index}.{('png', 'JPG', 'bmp', 'webp')[index % 4]}")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    make_adapter(tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("peft", ["prodial", "linear", "full", "lora+bitfit"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_file_alone_gives_the_predictions_of_the_trained_model(tmp_path, images, peft, checkpoint):
    values = {"peft": peft}
    if checkpoint:
        values["checkpoint"] = str(tmp_path / "base.safetensors")
        save_file(timm.create_model("test_vim", num_classes=7).state_dict(), values["checkpoint"])
    trained = make_adapter(tmp_path / "adapter.safetensors", **values)
    paths = find_images([images])
    transform = build_transform("none", (32, 32), train=False, crop_pct=1.0)
    with torch.no_grad():
        expected = trained(torch.stack([transform(load_image(path)) for path in paths])).softmax(1)

    predictor = load_predictor(tmp_path, device="cpu")  # the run folder stands for its adapter
    found = list(predictor.predict(paths, top_k=99, batch_size=3))
    assert [p.path for p in found] == [str(path) for path in paths]
    for row, prediction in zip(expected, found, strict=True):
        assert prediction.indices == row.argsort(descending=True).tolist()
        assert prediction.classes == [f"species {index}" for index in prediction.indices]
        torch.testing.assert_close(torch.tensor(prediction.probabilities), row.sort(descending=True).values)


def test_a_checkpoint_that_moved_is_asked_for_and_can_be_given(tmp_path, images):
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), base)
    make_adapter(adapter, checkpoint=str(base))
    moved = base.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(AdapterFileError, match="--checkpoint"):
        load_predictor(adapter)
    assert load_predictor(adapter, checkpoint=str(moved)).classes[0] == "species 0"


def test_other_base_weights_are_refused(tmp_path, adapter):
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), other)
    with pytest.raises(AdapterFileError, match="other base weights"):
        load_predictor(adapter, checkpoint=str(other))


def test_corrupt_images(tmp_path, images, adapter):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG but not really")
    paths = [*find_images([images]), bad]
    predictor = load_predictor(adapter)
    with pytest.raises(CorruptImageError, match=r"bad\.png"):
        list(predictor.predict(paths))
    skipped: list[CorruptImageError] = []
    found = list(predictor.predict(paths, on_corrupt=skipped.append))
    assert len(found) == len(paths) - 1 and [error.path for error in skipped] == [str(bad)]


def test_images_are_found_in_order_and_nothing_else(images, tmp_path):
    found = find_images([images])
    assert len(found) == 8 and found == sorted(found)
    assert find_images([found[3], images])[0] == found[3]
    with pytest.raises(ValueError, match="no images in"):
        find_images([tmp_path])
    with pytest.raises(ValueError, match="no such image"):
        find_images([tmp_path / "none.jpg"])


# --- the commands


def test_predict_prints_and_writes(tmp_path, images, adapter, capsys):
    outputs = [tmp_path / "p.csv", tmp_path / "p.json"]
    flags = ["--top-k", "2", "-o", str(outputs[0]), "--output", str(outputs[1]), "--device", "cpu"]
    assert cli.main(["predict", str(images), "--adapter", str(adapter), *flags]) == 0
    text = capsys.readouterr().out
    rows = list(csv.reader(outputs[0].open(encoding="utf-8")))
    assert rows[0] == ["path", "class1", "probability1", "class2", "probability2"]
    records = json.loads(outputs[1].read_text(encoding="utf-8"))
    assert len(rows) - 1 == len(records) == 8
    for row, record in zip(rows[1:], records, strict=True):
        first, second = record["predictions"]
        assert row == [
            record["path"],
            first["class"],
            f"{first['probability']:.6f}",
            second["class"],
            f"{second['probability']:.6f}",
        ]
        assert str(Path(record["path"]).relative_to(images)) in text
        assert f"{first['class']}  " in text and f"{100 * first['probability']:.1f} %" in text


def test_a_long_table_is_cut_and_says_so(images, adapter, capsys):
    copies = [str(path) for path in find_images([images])] * 8
    assert cli.main(["predict", *copies, "--adapter", str(adapter), "--top-k", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("%") == SHOWN_IMAGES and f"and {64 - SHOWN_IMAGES} more images" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "none.safetensors"], "none.safetensors does not exist"),
        (["--adapter", "{adapter}", "-o", "p.txt"], "ending in .csv or .json"),
        (["--adapter", "{adapter}", "-o", "{adapter}/p.csv"], "not a writable folder"),
        (["--adapter", "{adapter}", "--top-k", "0"], "top_k = 0"),
        (["--adapter", "{adapter}", "--batch-size", "0"], "batch_size = 0"),
        (["--adapter", "{adapter}", "--device", "gpu"], "device = 'gpu'"),
        (["--adapter", "{adapter}", "--backend", "fast"], "unknown backend 'fast'"),
        (["--adapter", "{adapter}", "--on-corrupt", "skp"], "Did you mean 'skip'?"),
    ],
)
def test_bad_input_of_predict_is_one_line(images, adapter, capsys, flags, words):
    flags = [flag.format(adapter=adapter) for flag in flags]
    assert cli.main(["predict", str(images), *flags]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: ")] == error[-1:] and words in error[-1]


@pytest.mark.parametrize("size", [0, 20, 2000])
def test_a_truncated_adapter_is_refused(images, adapter, capsys, size):
    adapter.write_bytes(adapter.read_bytes()[:size])
    assert cli.main(["predict", str(images), "--adapter", str(adapter)]) == 2
    assert "truncated" in capsys.readouterr().err


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


def test_a_merge_that_changes_the_model_leaves_no_file(tmp_path, adapter, monkeypatch):
    merge = vimtune.merge

    def wrong(model):
        merge(model).head.bias.data[0] += 0.1
        return model

    monkeypatch.setattr(vimtune, "merge", wrong, raising=False)
    with pytest.raises(MergeError, match=r"maximum logit error 1\.0e-01"):
        merge_to_file(adapter, tmp_path / "merged.safetensors")
    assert list(tmp_path.iterdir()) == [adapter]


def test_merge_does_not_overwrite_what_it_reads(tmp_path, adapter, capsys):
    before = adapter.read_bytes()
    assert cli.main(["merge", str(adapter), "-o", str(adapter)]) == 2
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "merged.bin")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert adapter.read_bytes() == before


def test_from_a_flag_to_a_prediction(tmp_path, images, capsys):
    """The whole way: train, predict with the run folder, merge."""
    run = tmp_path / "run"
    flags = (
        "--model test_vim --no-pretrained --peft prodial --rank 4 --epochs 1 --num-workers 0 --batch-size 16 "
        "--dataset-kwargs species=2,train_per_species=16,val_per_species=4,test_per_species=4 --device cpu"
    )
    assert cli.train_main([*flags.split(), "--output-dir", str(run)]) == 0
    assert cli.main(["predict", str(images), "--adapter", str(run)]) == 0
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged.safetensors")]) == 0
    capsys.readouterr()
    assert cli.train_main([*flags.split(), "--output-dir", str(run)]) == 2
    assert "holds another run" in capsys.readouterr().err
