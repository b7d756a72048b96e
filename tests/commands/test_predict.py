"""predict: an adapter file alone is enough, nothing in it is believed unchecked, and no result is lost."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from adapter_files import SPECIES, make_adapter, rewrite, write_photos
from nasty import NASTY_NAMES
from PIL import Image
from safetensors.torch import save_file

from vimtune import cli
from vimtune.adapters import AdapterFileError
from vimtune.commands.predict import load_predictor, run_predict
from vimtune.data import (
    CorruptImageError,
    ImageReadError,
    build_transform,
    create_dataset,
    load_image,
    model_preprocessing,
)
from vimtune.data.files import images as image_files
from vimtune.tasks.answers import SHOWN, Prediction
from vimtune.tasks.images.inputs import find_images
from vimtune.tasks.images.predictor import ImagePredictor
from vimtune.text import printable


def read_csv(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


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


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run folder with an adapter."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "adapter.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path, made) -> Path:
    return Path(shutil.copy(made / "adapter.safetensors", tmp_path))


@pytest.mark.parametrize("peft", ["prodial", "linear", "full", "lora+bitfit"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_file_alone_gives_the_predictions_of_the_trained_model(tmp_path, images, peft, checkpoint):
    values = {"peft": peft}
    if checkpoint:
        values["checkpoint"] = str(tmp_path / "base.safetensors")
        save_file(timm.create_model("test_vim", num_classes=7).state_dict(), values["checkpoint"])
    trained = make_adapter(tmp_path / "adapter.safetensors", **values)
    paths = find_images([images])
    transform = build_transform("none", **model_preprocessing(trained))
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
    with pytest.raises(AdapterFileError, match=r"base\.safetensors.*--checkpoint"):
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
    rows = read_csv(outputs[0])
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
    assert text.count("%") == SHOWN and f"and {64 - SHOWN} more images" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "none.safetensors"], "none.safetensors does not exist"),
        (["--adapter", "{adapter}", "-o", "p.txt"], "ending in .csv or .json"),
        (["--adapter", "{adapter}", "-o", "{adapter}/p.csv"], "not a writable folder"),
        (["--adapter", "{adapter}", "-o", "{folder}.csv"], "it is a folder"),
        (["--adapter", "{adapter}", "--top-k", "0"], "top_k = '0'"),
        (["--adapter", "{adapter}", "--top-k", "many"], "top_k = 'many': expected a whole number >= 1"),
        (["--adapter", "{adapter}", "--batch-size", "0"], "batch_size = '0'"),
        (["--adapter", "{adapter}", "--device", "gpu"], "device = 'gpu'"),
        (["--adapter", "{adapter}", "--backend", "fast"], "unknown backend 'fast'"),
        (["--adapter", "{adapter}", "--on-corrupt", "skp"], "Did you mean 'skip'?"),
        (["--adapter", "{adapter}", "--on-corrupt", "re\nport"], r"'re\nport'"),
        (
            ["--adapter", "{adapter}", "--model", "mamba_tiny"],
            "model = 'mamba_tiny': an adapter of images says",
        ),
        (["--adapter", "{adapter}", "--max-new-tokens", "3"], "max_new_tokens = '3' is not a field of"),
    ],
)
def test_bad_input_of_predict_is_one_line(images, adapter, capsys, flags, words):
    folder = adapter.with_name("folder")
    folder.with_suffix(".csv").mkdir()
    flags = [flag.format(adapter=adapter, folder=folder) for flag in flags]
    assert cli.main(["predict", str(images), *flags]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: ")] == error[-1:] and words in error[-1]


@pytest.mark.parametrize("name", NASTY_NAMES, ids=ascii)
def test_nasty_words_are_one_harmless_line(adapter, capsys, name):
    for words in ([f"{name}\0"], ["x.jpg", f"--top-k={name}x"], ["x.jpg", f"--on-corrupt={name}"]):
        assert cli.main(["predict", *words, "--adapter", str(adapter)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and printable(line) == line and len(line) < 800


@pytest.mark.parametrize("size", [0, 20, 2000])
def test_a_truncated_adapter_is_refused(images, adapter, capsys, size):
    adapter.write_bytes(adapter.read_bytes()[:size])
    assert cli.main(["predict", str(images), "--adapter", str(adapter)]) == 2
    assert "truncated" in capsys.readouterr().err


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


# --- what the file says is checked, and what it does not say is the model's own


@pytest.mark.parametrize("img_size", [None, 48, [48, 32]], ids=str)
def test_an_adapter_without_preprocessing_gets_that_of_its_model(tmp_path, img_size):
    make_adapter(tmp_path / "adapter.safetensors", img_size=img_size)
    stated = load_predictor(tmp_path)
    rewrite(tmp_path / "adapter.safetensors", lambda info: info.update(preprocessing={}))
    predictor = load_predictor(tmp_path)
    assert predictor.transform.config == stated.transform.config
    assert predictor.transform.config["crop_mode"] == "squash"
    [photo, *_] = write_photos(tmp_path / "photos")
    assert next(predictor.predict([photo])) == next(stated.predict([photo]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda info: info["preprocessing"].update(img_size=[64, 64]),
            "images of 64 x 64 pixels for a model",
        ),
        (lambda info: info["preprocessing"].update(img_size=[10**9, 32]), "img_size"),
        (lambda info: info["preprocessing"].update(std=[0, 1, 1]), "std"),
        (lambda info: info["preprocessing"].update(std=[1e-45, 1, 1]), "std positive"),
        (lambda info: info["preprocessing"].update(crop_pct=-1), "crop_pct"),
        (lambda info: info["preprocessing"].update(crop_mode="exec"), "crop mode"),
        (lambda info: info["preprocessing"].update(colour="red"), "colour"),
        (lambda info: info["classes"].pop(), "4 class names for a head of 5"),
        (lambda info: info.update(extra={"recipe": []}), "recipe"),
        (lambda info: info["extra"]["recipe"].update(checkpoint=7), "checkpoint"),
        (lambda info: info["extra"]["recipe"].update(seed=-1), "seed"),
        (lambda info: info["extra"]["recipe"].update(seed=10**30), "seed"),
        (lambda info: info["extra"]["recipe"].update(pretrained="yes"), "pretrained"),
    ],
)
def test_what_an_adapter_file_says_is_checked(tmp_path, adapter, capsys, change, words):
    [photo, *_] = write_photos(tmp_path / "photos")
    rewrite(adapter, change)
    for command in (["predict", str(photo), "--adapter"], ["merge", "-o", str(tmp_path / "m.safetensors")]):
        assert cli.main([*command, str(adapter)]) == 2
        error = capsys.readouterr().err.splitlines()
        assert [line for line in error if line.startswith("error: ")] == error[-1:] and words in error[-1]
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": "tell"}, "unknown task 'tell'"),
        ({"task": []}, "the task in the adapter file"),
        ({"mixup": "much"}, "mixup = 'much': expected a number"),
    ],
)
def test_what_an_adapter_file_says_of_its_task_is_checked(adapter, values, words):
    rewrite(adapter, lambda info: info["extra"]["recipe"].update(values))
    with pytest.raises(ValueError, match=words):
        load_predictor(adapter)


def test_a_file_without_class_names_has_numbers(tmp_path, adapter):
    rewrite(adapter, lambda info: info.update(classes=[]))
    assert load_predictor(adapter).classes == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "3", None], ids=repr)
@pytest.mark.parametrize("name", ["top_k", "batch_size"])
def test_counts_are_whole_numbers(adapter, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*whole number >= 1"):
        load_predictor(adapter).predict([], **{name: value})


@pytest.mark.parametrize("value", [0, -1.0, "warm", None, float("nan")], ids=repr)
def test_a_temperature_is_above_zero(adapter, value):
    with pytest.raises(ValueError, match="temperature = "):
        load_predictor(adapter).predict([], temperature=value)


def test_a_temperature_divides_the_logits_and_changes_no_order(images, adapter, tmp_path):
    predictor, output = load_predictor(adapter), tmp_path / "answers.json"
    cool = list(predictor.predict([images], top_k=5))
    for temperature in (0.5, 2):
        warm = list(predictor.predict([images], top_k=5, temperature=temperature))
        for one, other in zip(cool, warm, strict=True):
            expected = torch.tensor(one.probabilities).log().div(temperature).softmax(0)
            assert torch.allclose(torch.tensor(other.probabilities), expected, atol=1e-6)
            assert other.classes == one.classes
    flags = ("--adapter", str(adapter), "--temperature", "2", "--top-k", "5", "-o", str(output))
    assert cli.main(["predict", str(images), *flags]) == 0
    found = json.loads(output.read_text())
    assert [[each["probability"] for each in one["predictions"]] for one in found] == [
        pytest.approx(one.probabilities, abs=1e-6) for one in warm
    ]


class BreaksOnWhite(torch.nn.Module):
    """Its outputs are not finite for white images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.where(images.mean((1, 2, 3)) > 2, torch.nan, 0.0)[:, None].expand(-1, 3)


def test_outputs_that_are_not_finite_are_an_error_naming_the_image(tmp_path):
    for name in ("black", "white"):
        Image.new("RGB", (9, 7), name).save(tmp_path / f"{name}.png")
    transform = build_transform("none", (8, 8))
    predictor = ImagePredictor(BreaksOnWhite(), transform, list("abc"), torch.device("cpu"))
    assert len(list(predictor.predict([tmp_path / "black.png"]))) == 1
    with pytest.raises(ValueError, match=r"white\.png' are not finite"):
        list(predictor.predict(sorted(tmp_path.iterdir())))


# --- where the base weights are


TRAINING = (
    "--model test_vim --peft lora --epochs 1 --num-workers 0 --batch-size 16 --device cpu "
    "--dataset-kwargs species=2,train_per_species=8,val_per_species=4,test_per_species=4"
)


def test_base_weights_are_found_from_any_folder_and_no_path_is_passed_on(tmp_path, monkeypatch, capsys):
    [photo, *_] = write_photos(tmp_path / "photos")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), here / "base.safetensors")
    monkeypatch.chdir(here)
    command = [
        *TRAINING.split(),
        "--checkpoint",
        "base.safetensors",
        "--output-dir",
        "run",
    ]
    assert cli.train_main(command) == 0

    monkeypatch.chdir(there)
    adapter = here / "run" / "adapter.safetensors"
    assert os.fsencode(tmp_path) not in adapter.read_bytes()
    for given in (here / "run", adapter):
        assert cli.main(["predict", str(photo), "--adapter", str(given)]) == 0
    shared = there / "shared.safetensors"
    shared.write_bytes(adapter.read_bytes())
    capsys.readouterr()
    assert cli.main(["predict", str(photo), "--adapter", str(shared)]) == 2
    error = capsys.readouterr().err
    assert "'base.safetensors'" in error and "--checkpoint" in error and str(here) not in error
    base = str(here / "base.safetensors")
    assert cli.main(["predict", str(photo), "--adapter", str(shared), "--checkpoint", base]) == 0


def test_a_recipe_beside_the_adapter_that_names_other_weights_is_not_followed(tmp_path):
    base, other = tmp_path / "base.safetensors", tmp_path / "other.safetensors"
    for path in (base, other):
        save_file(timm.create_model("test_vim", num_classes=7).state_dict(), path)
    make_adapter(tmp_path / "adapter.safetensors", checkpoint=str(base))
    (tmp_path / "recipe.yaml").write_text(f"checkpoint: {other}\n")
    base.unlink()
    with pytest.raises(AdapterFileError, match=r"'base\.safetensors'.*--checkpoint"):
        load_predictor(tmp_path)


def test_an_older_file_with_the_whole_path_finds_its_base_weights(tmp_path):
    base = tmp_path / "weights" / "base.safetensors"
    base.parent.mkdir()
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), base)
    adapter = tmp_path / "adapter.safetensors"
    make_adapter(adapter, checkpoint=str(base))
    rewrite(adapter, lambda info: info["extra"]["recipe"].update(checkpoint=str(base)))
    assert load_predictor(adapter).classes[0] == "species 0"


def test_paths_may_start_in_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = tmp_path / "base.safetensors"
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), base)
    make_adapter(tmp_path / "adapter.safetensors", checkpoint=str(base))
    write_photos(tmp_path / "photos")
    assert load_predictor("~/adapter.safetensors", checkpoint="~/base.safetensors").classes
    flags = ["--adapter", "~", "--checkpoint", "~/base.safetensors", "--output", "~/p.csv"]
    assert cli.main(["predict", "~/photos", *flags]) == 0
    assert (tmp_path / "p.csv").is_file()
    assert cli.main(["merge", "~", "-o", "~/merged.safetensors"]) == 0
    assert (tmp_path / "merged.safetensors").is_file()


# --- no result is lost


def with_a_bad_photo(folder: Path) -> Path:
    """A folder of three photos and, in the middle, a file that is none."""
    write_photos(folder)
    (folder / "00 bad\n.png").write_bytes(b"\x89PNG but not really")
    return folder


@pytest.mark.parametrize(("choice", "code"), [(None, 1), ("report", 1), ("skip", 0)])
def test_one_bad_photo_does_not_take_the_others(tmp_path, adapter, capsys, caplog, choice, code):
    folder, output = with_a_bad_photo(tmp_path / "photos"), tmp_path / "p.csv"
    flags = [] if choice is None else ["--on-corrupt", choice]
    assert cli.main(["predict", str(folder), "--adapter", str(adapter), "-o", str(output), *flags]) == code
    rows = read_csv(output)
    assert [Path(row[0]).name for row in rows[1:]] == ["0.png", "1.png", "2.png"]
    assert "2.png" in capsys.readouterr().out
    [line] = [line for line in caplog.messages if r"00 bad\n.png" in line]
    assert line.startswith("left out ") and "1 of 4 images could not be read" in caplog.messages


@pytest.fixture
def without_heif(monkeypatch):
    """Pillow as it is where no plug-in reads photos of phones."""
    own = image_files._FORMATS["HEIF"]
    formats = [each for each in image_files.FORMATS if each != "HEIF"]
    monkeypatch.setattr(image_files, "FORMATS", tuple(formats))
    kept = [each for each in image_files.EXTENSIONS if each not in own]
    monkeypatch.setattr(image_files, "EXTENSIONS", tuple(kept))
    monkeypatch.setattr(image_files, "_UNREADABLE", dict.fromkeys(own, "HEIF"))


@pytest.mark.parametrize(("choice", "code"), [("report", 1), ("skip", 0), ("error", 2)])
def test_a_photo_that_needs_a_plug_in_is_one_that_cannot_be_read(
    tmp_path, adapter, caplog, capsys, without_heif, choice, code
):
    folder, output = tmp_path / "photos", tmp_path / "p.csv"
    write_photos(folder)
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(60))
    (folder / "film.mp4").touch()
    flags = ["--adapter", str(adapter), "-o", str(output), "--on-corrupt", choice]
    assert cli.main(["predict", str(folder), *flags]) == code
    assert "left out in" in caplog.text and "film.mp4" in caplog.text
    if choice == "error":
        assert "phone.heic" in capsys.readouterr().err and not output.exists()
        return
    [line] = [line for line in caplog.messages if "phone.heic" in line]
    assert line.endswith("pip install pillow-heif") and "1 of 4 images could not be read" in caplog.messages
    assert len(read_csv(output)) == 4


def test_error_stops_at_a_bad_photo_and_writes_nothing(tmp_path, adapter, capsys):
    folder, output = with_a_bad_photo(tmp_path / "photos"), tmp_path / "p.csv"
    flags = ["--adapter", str(adapter), "-o", str(output), "--on-corrupt", "error", "--batch-size", "1"]
    assert cli.main(["predict", str(folder), *flags]) == 2
    told = capsys.readouterr().err
    assert r"00 bad\n.png" in told and not output.exists()
    assert "--on-corrupt" not in told and "begin anew" not in told  # It was asked for, and there is no run.


@pytest.mark.parametrize("choice", ["report", "skip"])
def test_what_the_system_cannot_read_is_never_passed_over_in_silence(
    tmp_path, adapter, monkeypatch, capsys, caplog, choice
):
    paths = write_photos(tmp_path / "photos")

    def load(path):
        if Path(path) == paths[1]:
            raise ImageReadError(str(path), "Permission denied")
        return load_image(path)

    monkeypatch.setattr("vimtune.data.files.images.load_image", load)
    flags = ["--adapter", str(adapter), "--on-corrupt", choice]
    assert cli.main(["predict", str(tmp_path / "photos"), *flags]) == 1
    assert "1.png: Permission denied" in caplog.text and "2.png" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["report", "skip"])
def test_no_image_at_all_is_not_passed_over_in_silence(tmp_path, adapter, caplog, choice):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"no photo")
    assert cli.main(["predict", str(photo), "--adapter", str(adapter), "--on-corrupt", choice]) == 1
    assert "1 of 1 image could not be read" in caplog.text


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.EIO, "bad disk"), 2)])
def test_what_was_computed_before_a_stop_is_written(tmp_path, adapter, monkeypatch, caplog, stop, code):
    write_photos(tmp_path / "photos")
    logits, output = ImagePredictor.logits, tmp_path / "p.csv"
    calls = []

    def stops(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise stop
        return logits(self, batch)

    monkeypatch.setattr(ImagePredictor, "logits", stops)
    flags = ["--adapter", str(adapter), "-o", str(output), "--batch-size", "1"]
    assert cli.main(["predict", str(tmp_path / "photos"), *flags]) == code
    assert len(read_csv(output)) == 1 + 2
    assert "stopped after 2 of 3 images" in caplog.text


STRANGE = "=1+1 [red]$x_1$ :smile: \x1b[31m\u202e日本\r\n😀"


def predict_strangely(folder: Path, adapter: Path, name: str) -> list[Path]:
    """Run the command on a photo of this name and with strange class names; returns CSV and JSON."""
    rewrite(adapter, lambda info: info.update(classes=[f"{i}{STRANGE}" for i in range(SPECIES)]))
    write_photos(folder)[0].rename(folder / name)
    outputs = [folder / "p.csv", folder / "p.json"]
    run_predict(
        inputs=[str(folder)],
        adapter=adapter,
        options={"top_k": 3, "batch_size": 2},
        outputs=outputs,
        base={},
        device="cpu",
        backend="auto",
        force=False,
    )
    return outputs


@pytest.mark.parametrize(
    ("encoding", "errors", "columns"),
    [
        ("ascii", "strict", 80),
        ("ascii", "backslashreplace", 20),
        ("cp1252", "strict", 20),
        ("cp1252", "backslashreplace", 80),
        ("utf-8", "strict", 1),
        ("utf-8", "strict", 80),
    ],
)
def test_no_terminal_can_lose_the_files(tmp_path, adapter, monkeypatch, encoding, columns, errors):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", stream)
    name = os.fsdecode(b"-[b] \xff\x1b[2J.png")
    outputs = [tmp_path / "photos" / "p.csv", tmp_path / "photos" / "p.json"]
    predict_strangely(tmp_path / "photos", adapter, name)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "[red]" in shown.replace("\n", "") or columns < 80
    assert ":smile:" in shown or columns < 80

    rows = read_csv(outputs[0])
    assert [len(row) for row in rows] == [7] * 4
    records = json.loads(outputs[1].read_text(encoding="utf-8"))
    found = {os.fsencode(Path(record["path"]).name) for record in records}
    assert found == {os.fsencode(name), b"1.png", b"2.png"}
    assert {row[1][1:] for row in rows[1:]} == {STRANGE}
    assert {record["predictions"][0]["class"][1:] for record in records} == {STRANGE}


def test_cells_that_look_like_formulas_are_text(tmp_path, adapter, monkeypatch):
    names = ["=cmd()", "+1", "-1", "@x", "plain"]
    rewrite(adapter, lambda info: info.update(classes=names))
    [photo, *_] = write_photos(tmp_path)
    photo.rename(tmp_path / "=x.png")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "=x.png", "--adapter", str(adapter), "--top-k", "5", "-o", "p.csv"]) == 0
    _, row = read_csv(Path("p.csv"))
    assert row[0] == "'=x.png" and set(row[1::2]) == {"'=cmd()", "'+1", "'-1", "'@x", "plain"}


# --- which images


def test_folders_are_searched_as_training_does(tmp_path):
    folder = tmp_path / "photos.jpg"  # a folder, whatever its name
    folder.mkdir()
    photos = write_photos(folder / "inside.png")
    for hidden in (".hidden", "__MACOSX"):
        write_photos(folder / hidden)
    (folder / "link.png").symlink_to(photos[0])
    (folder / "circle").symlink_to(folder)
    (folder / ".secret.png").write_bytes(photos[0].read_bytes())
    found = find_images([folder])
    assert len(found) == 3 and {path.resolve() for path in found} == {path.resolve() for path in photos}


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    write_photos(tmp_path)
    (tmp_path / "old.tga").write_bytes(b"")
    with caplog.at_level("WARNING", "vimtune"):
        find_images([tmp_path])
    assert "1 .tga" in caplog.text
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no images in .*1 \.tga"):
        find_images([tmp_path])


# --- files that are written


@pytest.mark.parametrize("link", ["same", "symlink", "hard link"])
@pytest.mark.parametrize("source", ["image", "adapter"])
def test_no_input_is_overwritten(tmp_path, adapter, capsys, link, source):
    read = tmp_path / "read.csv"  # a file of any name may be read
    [photo, *_] = write_photos(tmp_path / "photos")
    (photo if source == "image" else adapter).rename(read)
    before, output = read.read_bytes(), read if link == "same" else tmp_path / "output.csv"
    if link == "symlink":
        output.symlink_to(read)
    elif link == "hard link":
        output.hardlink_to(read)
    inputs = [read if source == "image" else photo, "--adapter", adapter if source == "image" else read]
    assert cli.main(["predict", *map(str, inputs), "-o", str(output)]) == 2
    assert "it is read as input" in capsys.readouterr().err
    assert read.read_bytes() == before


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, adapter, monkeypatch, capsys):
    write_photos(tmp_path / "photos")
    output = tmp_path / "p.csv"
    output.write_text("before")

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert cli.main(["predict", str(tmp_path / "photos"), "--adapter", str(adapter), "-o", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot write") and "No space left" in error
    assert output.read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --------------------------------------------------------------------------- inputs from Python


def test_images_may_be_files_folders_bytes_images_and_arrays(images, adapter):
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    path = next(iter(sorted(images.rglob("*.png"))))
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        inputs = [
            path,
            path.read_bytes(),
            image,
            pixels,
            np.dstack([pixels, np.full(pixels.shape[:2], 255, "u1")]),
        ]
        found = list(predictor.predict(inputs))
        single = [
            next(iter(predictor.predict(each))) for each in (str(path), path.read_bytes(), image, pixels)
        ]
    assert [answer.path for answer in found] == [str(path), *(f"inputs[{number}]" for number in range(1, 5))]
    for answer in (*found, *single):
        assert answer.probabilities == pytest.approx(found[0].probabilities, abs=1e-6)
    assert [answer.path for answer in predictor.predict(images)] == [
        str(path) for path in sorted(images.rglob("*.*")) if path.suffix != ".txt"
    ]
    assert len(list(predictor.predict(np.stack([pixels, pixels])))) == 2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (b"nothing", r"inputs\[1\].*known format"),
        (np.zeros((2, 3, 9), "u1"), "array of uint8"),
        (torch.zeros(3, 64, 64), r"inputs\[1\] = a Tensor of shape \(3, 64, 64\): expected the path"),
        (
            {"image": np.zeros((9, 9, 3))},
            r"inputs\[1\] = {'image': an ndarray of shape \(9, 9, 3\)}: expected",
        ),
        (3, r"inputs\[1\] = 3: expected the path of an image or folder, bytes, a file opened as binary"),
        (None, r"inputs\[1\] = None: expected the path"),
        (io.StringIO("text"), r"inputs\[1\] = <_io.StringIO.*: expected the path"),
        (io.BytesIO(b"nothing"), r"inputs\[1\].*known format"),
        (bytearray(b"nothing"), r"inputs\[1\].*known format"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_place(images, adapter, wrong, told):
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    good = next(iter(images.rglob("*.png")))
    with pytest.raises(ValueError, match=told):
        list(predictor.predict([good, wrong]))


@pytest.mark.parametrize("wrong", [None, 3])
def test_what_is_neither_a_picture_nor_several_is_refused(adapter, wrong):
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    with pytest.raises(ValueError, match=f"inputs = {wrong}: expected the path of .*; or several of these"):
        predictor.predict(wrong)


def test_images_may_be_open_files_and_any_bytes(images, adapter):
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    path = next(iter(sorted(images.rglob("*.png"))))
    content = path.read_bytes()
    (expected,) = predictor.predict(content)
    written = io.BytesIO()
    written.write(content)  # It stands at its end now.
    forms = [io.BytesIO(content), written, bytearray(content), memoryview(content)]
    with open(path, "rb") as file:
        several = predictor.predict([*forms, file])
        single = [predictor.predict(each) for each in (*forms, file)]
    found = [*several, *(answer for answers in single for answer in answers)]
    assert len(found) == 10
    for answer in found:
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert {answer.path for answer in found[5:]} == {"inputs[0]"}
    with pytest.raises(ValueError, match=r"inputs\[0\] = .* cannot be read: .*closed file"):
        predictor.predict([file])


def test_arrays_of_another_kind_and_files_that_are_not_there_are_no_corrupt_images(adapter):
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    told = r"^inputs\[0\] is an array of float64 \(64, 64, 3\): expected uint8 .* Convert it"
    with pytest.raises(ValueError, match=told) as caught:
        list(predictor.predict([np.random.rand(64, 64, 3)]))
    assert not isinstance(caught.value, CorruptImageError)
    with pytest.raises(ImageReadError, match=r"^cannot read nonexist\.jpg: No such file or directory$"):
        list(predictor.predict(["nonexist.jpg"]))


def test_a_bad_image_of_a_folder_is_left_out_with_a_warning_and_one_by_itself_is_not(
    tmp_path, adapter, caplog
):
    folder = with_a_bad_photo(tmp_path)
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    found = list(predictor.predict(folder))
    assert found and "left out" in caplog.text
    bad = next(Path(path) for path in find_images([folder]) if str(path) not in [each.path for each in found])
    with pytest.raises(CorruptImageError):
        list(predictor.predict([folder, bad]))
    told = []
    assert len(list(predictor.predict([folder, bad], on_corrupt=told.append))) == len(found)
    assert len(told) == 2


def test_an_answer_is_printed_as_a_line():
    answer = Prediction("rose.jpg", [3, 1], ["rose", "lily"], [0.8125, 0.1])
    assert str(answer) == "rose.jpg: rose 81.2 %, lily 10.0 %"
