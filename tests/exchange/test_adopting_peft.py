"""From a folder in HF peft's format to an adapter file, on the command line."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from adapter_files import SPECIES, make_adapter, write_photos
from safetensors.torch import load_file, save_file

import vimtune
from vimtune import cli
from vimtune.adapters.manage import base_parameters


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an adapter in HF peft's format, its base weights, names of its classes, and the model."""
    folder = tmp_path_factory.mktemp("made")
    model = make_adapter(folder / "adapter.safetensors", rank=2)
    vimtune.save_peft(model, folder / "theirs")
    save_file(
        {name: value.detach().contiguous() for name, value in base_parameters(model)},
        folder / "base.safetensors",
    )
    (folder / "names.txt").write_text("".join(f"kind {n}\n" for n in range(SPECIES)), "utf-8")
    return folder, model


def convert(made, output, *more):
    base = ["--model", "test_vim", "--checkpoint", str(made[0] / "base.safetensors")]
    return cli.main(["convert", str(made[0] / "theirs"), "-o", str(output), *base, *map(str, more)])


def same(predictor, model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(predictor.logits(images), model(images), rtol=0, atol=1e-5)


def test_a_folder_of_peft_becomes_an_adapter_file(tmp_path, made, capsys):
    assert convert(made, tmp_path / "ours", "--classes", made[0] / "names.txt") == 0
    captured = capsys.readouterr()
    assert "written to" in captured.out and "README.md, adapter.safetensors" in captured.out
    assert "does not say on which base weights it was trained" in captured.err
    assert "starts from scratch" not in captured.err and "numbers" not in captured.err
    # The file names the base weights and has no folder of this computer, as any that is passed on.
    text = (tmp_path / "ours" / "README.md").read_text("utf-8")
    assert "Adapter (lora) of test\\_vim, trained." in text and "kind 4" in text
    info = vimtune.read_adapter_info(tmp_path / "ours")
    assert str(made[0]) not in json.dumps(info.extra) and "dataset" not in info.extra["recipe"]
    predictor = vimtune.load_predictor(tmp_path / "ours", checkpoint=made[0] / "base.safetensors")
    assert predictor.classes == [f"kind {n}" for n in range(SPECIES)]
    same(predictor, made[1])


def test_what_was_made_is_used_by_the_commands(tmp_path, made, capsys):
    assert convert(made, tmp_path / "ours") == 0
    assert "its 5 classes get numbers: give their names with --classes" in capsys.readouterr().err
    photos = [str(path) for path in write_photos(tmp_path / "photos")]
    adapter = ["--adapter", str(tmp_path / "ours"), "--checkpoint", str(made[0] / "base.safetensors")]
    assert cli.main(["predict", *photos, *adapter]) == 0
    # It says nothing of its data, and those of a recipe without the key would be any others.
    capsys.readouterr()
    assert cli.main(["evaluate", *adapter]) == 2
    assert "says nothing of its data: name them with --dataset or --folder" in capsys.readouterr().err


def without_a_head(folder, target):
    """A copy of a folder of peft as its default writes it: the head stays that of the base model."""
    shutil.copytree(folder, target)
    settings = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": None}))
    tensors = load_file(target / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".head." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, target / "adapter_model.safetensors")


def test_an_adapter_without_a_head_has_that_of_its_base(tmp_path, made, capsys):
    without_a_head(made[0] / "theirs", tmp_path / "theirs")
    base, names = made[0] / "base.safetensors", made[0] / "names.txt"
    flags = ["--model", "test_vim", "--checkpoint", str(base)]
    asked = ["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "ours"), *flags]
    assert cli.main([*asked, "--classes", str(names)]) == 0
    assert "scratch" not in capsys.readouterr().err
    predictor = vimtune.load_predictor(tmp_path / "ours", checkpoint=base)
    assert predictor.classes == names.read_text("utf-8").split("\n")[:SPECIES]
    (head,) = (
        tensor
        for name, tensor in load_file(tmp_path / "ours" / "adapter.safetensors").items()
        if "head.weight" in name
    )
    assert torch.equal(head, load_file(base)["head.weight"])
    headless = {name: tensor for name, tensor in load_file(base).items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "headless.safetensors")
    asked = [*asked[:3], str(tmp_path / "other"), *flags[:3], str(tmp_path / "headless.safetensors")]
    assert cli.main(asked) == 2 and not (tmp_path / "other").exists()
    assert "has no classification head, and the adapter brings none" in capsys.readouterr().err


def test_a_folder_of_peft_is_merged_in_one_go(tmp_path, made):
    assert convert(made, tmp_path / "merged", "--to", "merged") == 0
    same(vimtune.load_predictor(tmp_path / "merged"), made[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            [],
            r"does not say of which model \(its settings name 'me/base'\): give it with --model",
        ),
        (["--model", "test_vmi"], "expected a known model.*Did you mean 'test_vim'"),
        (
            ["--model", "test_vim"],
            r"no pretrained weights are published for test_vim; give a file of weights \(--checkpoint FILE; "
            r"in Python load_checkpoint\), or train from random weights \(vimtune train --no-pretrained; in",
        ),
        (["--model", "test_vim", "--task", "colours"], "task = 'colours'"),
        (["--classes", "few.txt"], "2 names of classes are given, and the model of .* has 5 outputs"),
        (["--classes", "empty.txt"], "'empty.txt' is empty: expected the names of the classes, one a line"),
        (["--classes", "none.txt"], "cannot read none.txt"),
        (["--classes", "twice.txt"], "'twice.txt': line 1 and line 4 are both 'rose'"),
    ],
)
def test_what_is_missing_or_wrong(tmp_path, made, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[0] / "theirs", "theirs")
    settings = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "me/base"
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "twice.txt").write_text("rose\n\nlily\n rose\na\nb\n")
    if "--classes" in more:
        more = [*more, "--model", "test_vim", "--checkpoint", str(made[0] / "base.safetensors")]
    assert cli.main(["convert", "theirs", "-o", "out", *more]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_two_classes_of_one_name_are_refused_from_python_too(tmp_path, made):
    classes = ["rose", "lily", "rose", "a", "b"]
    with pytest.raises(ValueError, match=r"classes\[0\] and classes\[2\] are both 'rose'"):
        vimtune.convert(made[0] / "theirs", tmp_path / "out", model="test_vim", classes=classes)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_setting_that_we_do_not_know(tmp_path, made, capsys):
    shutil.copytree(made[0] / "theirs", tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": "all"}))
    base = ["--model", "test_vim", "--checkpoint", str(made[0] / "base.safetensors")]
    assert cli.main(["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "out"), *base]) == 2
    assert "bias" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["theirs", "theirs/adapter_model.safetensors"])
@pytest.mark.parametrize(
    "command",
    [
        ["predict", "x.png", "--adapter", "ADAPTER"],
        ["evaluate", "--adapter", "ADAPTER"],
        ["embed", "x.png", "--adapter", "ADAPTER", "-o", "out.npz"],
        ["analyze", "ADAPTER"],
        ["merge", "ADAPTER", "-o", "out.safetensors"],
        ["export", "ADAPTER", "-o", "out.onnx"],
        ["combine", "ADAPTER", "ADAPTER", "-o", "out.safetensors"],
        ["push", "ADAPTER", "me/theirs"],
        ["train", "--init-adapter", "ADAPTER"],
    ],
)
def test_other_commands_name_the_one_that_reads_it(tmp_path, monkeypatch, made, capsys, name, command):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path)
    (tmp_path / "0.png").rename("x.png")
    given = [str(made[0] / name) if part == "ADAPTER" else part for part in command]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert f"make an adapter file of it with vimtune convert {made[0] / 'theirs'} --model X -o NEW" in error


@pytest.mark.parametrize(("flag", "value"), [("--task", "text"), ("--classes", "names.txt")])
def test_what_an_adapter_file_says_by_itself_is_refused(tmp_path, made, capsys, monkeypatch, flag, value):
    monkeypatch.chdir(made[0])
    given = ["convert", str(made[0] / "adapter.safetensors"), "-o", str(tmp_path / "out"), flag, value]
    assert cli.main(given) == 2
    assert "folders in HF peft's format alone do not. Leave it out" in capsys.readouterr().err


def test_a_language_model(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    from vimtune.recipe import Recipe
    from vimtune.testing.methods import disturb

    recipe = Recipe.from_values({"task": "text", "model": "mamba_tiny"})
    model = recipe.task.create_base(recipe, head=True)
    disturb(vimtune.inject(model, "lora", rank=2))
    vimtune.save_peft(model, tmp_path / "theirs")
    given = ["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]
    assert cli.main([*given, "--task", "text", "--model", "mamba_tiny"]) == 0
    predictor = vimtune.load_predictor(tmp_path / "ours")
    ids = torch.arange(12).view(2, 6)
    labels = ids.clone()
    labels[:, 0] = -100
    from vimtune.tasks.text.models import SequenceScorer

    with torch.no_grad():
        found, expected = SequenceScorer(predictor.model)(ids, labels), model.eval()(ids, labels)
    torch.testing.assert_close(found, expected)
    assert cli.main(["predict", "a text", "--adapter", str(tmp_path / "ours"), "--max-new-tokens", "2"]) == 0
