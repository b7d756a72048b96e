"""What is given to functions in the place of a path is refused with what was expected and what to do."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import timm
import torch
from adapter_files import make_adapter
from safetensors.torch import save_file

import vimtune

NO_PATHS = {
    "nothing": None,
    "bytes": b"runs/my-run",
    "content": b"\x93" * 3000,
    "something open": io.BytesIO(b"x"),
    "a number": 3,
    "true": True,
    "an array": np.zeros((40, 50)),
    "a text in an array": np.array("runs/my-run"),
    "a tensor": torch.zeros(3),
    "a list": ["runs/my-run"],
    "empty": "",
    "a class": dict,
    "NUL": "a\0b",
}
"""Values of users, none of which is a path."""


@pytest.fixture(scope="module")
def model():
    return vimtune.inject(timm.create_model("test_vim", num_classes=3), "lora", rank=2)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that lies alone."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "mine.safetensors", rank=2)
    (folder / "recipe.yaml").unlink()
    return folder / "mine.safetensors"


READERS = {
    "load_predictor": lambda value, here, model: vimtune.load_predictor(value),
    "evaluate": lambda value, here, model: vimtune.evaluate(value),
    "analyze": lambda value, here, model: vimtune.analyze(value),
    "merge_to_file": lambda value, here, model: vimtune.merge_to_file(value, here / "out.safetensors"),
    "export_to_file": lambda value, here, model: vimtune.export_to_file(value, here / "out.onnx"),
    "convert": lambda value, here, model: vimtune.convert(value, here / "out"),
    "combine_files": lambda value, here, model: vimtune.combine_files([value], here / "out.safetensors"),
    "load_adapter": lambda value, here, model: vimtune.load_adapter(model, value),
    "read_adapter_info": lambda value, here, model: vimtune.read_adapter_info(value),
    "load_checkpoint": lambda value, here, model: vimtune.load_checkpoint(model, value),
    "load_peft": lambda value, here, model: vimtune.load_peft(model, value),
    "load_recipe": lambda value, here, model: vimtune.load_recipe(value),
    "create_dataset": lambda value, here, model: vimtune.create_dataset("folder", "train", value),
}
"""Functions that read what lies at a path."""
WRITERS = {
    "save_adapter": lambda value, adapter, model: vimtune.save_adapter(model, value),
    "save_peft": lambda value, adapter, model: vimtune.save_peft(model, value),
    "save": lambda value, adapter, model: vimtune.Recipe().save(value),
    "merge_to_file": lambda value, adapter, model: vimtune.merge_to_file(adapter, value),
    "export_to_file": lambda value, adapter, model: vimtune.export_to_file(adapter, value),
    "convert": lambda value, adapter, model: vimtune.convert(adapter, value),
    "combine_files": lambda value, adapter, model: vimtune.combine_files([adapter, adapter], value),
    "pull": lambda value, adapter, model: vimtune.pull("me/adapter", value),
}
"""Functions that write there."""
OPTIONAL = ("evaluate", "load_recipe", "create_dataset")
"""Functions for which nothing is something: there is no adapter, no file, no folder."""


def refused(call, *given) -> str:
    with pytest.raises(ValueError) as caught:
        call(*given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("value", NO_PATHS.values(), ids=NO_PATHS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_path_is_not_read(name, value, tmp_path, model):
    if value is None and name in OPTIONAL:
        return
    said = refused(READERS[name], value, tmp_path, model)
    assert " = " in said and ("expected a path" in said or "expected the path of " in said), said
    assert not list(tmp_path.iterdir()) and vimtune.list_adapters(model) == ["default"]


@pytest.mark.parametrize("value", NO_PATHS.values(), ids=NO_PATHS)
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_path_is_not_written(name, value, tmp_path, adapter, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(WRITERS[name], value, adapter, model)
    assert " = " in said and ("expected a path" in said or "expected the path of " in said), said
    assert not list(tmp_path.iterdir())


def test_what_was_given_is_named_with_the_next_step():
    assert refused(vimtune.load_predictor, b"runs/x") == (
        "adapter = b'runs/x': expected the path of a run folder, an adapter file or a merged file, as text "
        "or pathlib.Path; write what is open or in memory to a file, and give its path"
    )
    assert refused(vimtune.evaluate, 3) == (
        "trained = 3: expected the path of a run folder, an adapter file or a merged file, as text or "
        "pathlib.Path"
    )
    assert refused(vimtune.combine_files, "a", "out.safetensors").startswith(
        "adapters = 'a': expected a list"
    )
    assert refused(vimtune.combine_files, None, "out.safetensors").startswith(
        "adapters = None: expected a list"
    )
    assert "expected at least one" in refused(vimtune.combine_files, [], "out.safetensors")
    assert "vimtune.load_recipe reads one from a file" in refused(vimtune.train, "recipe.yaml")
    assert "images[0] = 'a.jpg': expected an image of Pillow" in refused(vimtune.draw_images, ["a.jpg"])
    assert "images[0] = 3: expected" in refused(vimtune.draw_images, 3)


@pytest.mark.parametrize(
    "read",
    [
        vimtune.load_predictor,
        vimtune.evaluate,
        vimtune.read_adapter_info,
        lambda folder: vimtune.load_adapter(timm.create_model("test_vim", num_classes=3), folder),
    ],
)
def test_folders_without_an_adapter(read, tmp_path, adapter):
    said = refused(read, str(tmp_path))
    assert said.startswith(str(tmp_path))
    assert said.endswith(
        "is a folder without adapter.safetensors; expected the folder of a run, or an adapter file"
    )
    (tmp_path / "my-run").mkdir()
    shutil.copy(adapter, tmp_path / "my-run" / "adapter.safetensors")
    assert refused(read, str(tmp_path)).endswith(f". Did you mean {tmp_path / 'my-run'}?")
    (tmp_path / "recipe.yaml").touch()
    assert f"go on with vimtune train --resume {tmp_path}" in refused(read, str(tmp_path))
    with pytest.raises(
        vimtune.RecipeError, match=r"init_adapter = '.*': .* is a run without an adapter \(it has no ad"
    ):
        vimtune.load_recipe(None, {"init_adapter": str(tmp_path)})


def test_the_folder_of_a_run_is_its_adapter(tmp_path, adapter):
    shutil.copy(adapter, tmp_path / "adapter.safetensors")
    assert vimtune.read_adapter_info(tmp_path).method == "lora"
    with pytest.raises(vimtune.AdapterFileError, match="was trained on other base weights"):
        vimtune.load_adapter(timm.create_model("test_vim", num_classes=5), str(tmp_path))


def test_folders_are_no_files_to_write(tmp_path, model):
    assert "is a folder: give the name of a file to write" in refused(vimtune.save_adapter, model, tmp_path)
    assert "is a folder: give the name of a file to write" in refused(vimtune.Recipe().save, tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"peft": "runs/my-run"}, r"with vimtune\.load_adapter\(model, path\)"),
        ({"peft": "adapter.safetensors"}, r"with vimtune\.load_adapter\(model, path\)"),
        (
            {"peft": "lora", "peft_kwargs": "rank=2"},
            r"peft_kwargs = 'rank=2': expected options .*\{\"rank\": 8\}",
        ),
        (
            {"peft": "lora", "peft_kwargs": [("rank", 2)]},
            r"peft_kwargs = \[\('rank', 2\)\]: expected options",
        ),
        ({"peft": "lora", "peft_kwargs": {3: 2}}, r"peft_kwargs = \{3: 2\}: expected options"),
        ({"peft": "lora", "peft_targets": 3}, "targets = 3: expected both"),
        ({"peft": "lora", "peft_layers": b"0"}, "layers = b'0': expected block indices"),
    ],
)
def test_options_of_an_adapter_of_a_new_model(options, expected):
    with pytest.raises(ValueError, match=expected):
        timm.create_model("test_vim", **options)


def test_a_folder_of_weights_is_no_adapter(tmp_path, model):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "is a folder without adapter.safetensors" in refused(vimtune.load_adapter, model, tmp_path)
