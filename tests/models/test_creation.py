"""What a file or a recipe says about a model: its own options, checked, and nothing else."""

from __future__ import annotations

import base64
import copy
import inspect
import json
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import timm
import torch
import yaml
from annotated_types import Ge
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vimtune
from vimtune import cli
from vimtune.models import (
    MODELS,
    CheckpointError,
    VisionMamba,
    create_listed_model,
    list_models,
    register_model,
)
from vimtune.models.options import OPTIONS, ModelOptions
from vimtune.models.registry import check_creation, check_model_options
from vimtune.recipe import Recipe, RecipeError
from vimtune.schema import STRICT
from vimtune.tasks.images.job import build_model

PAYLOAD = "open('owned', 'w')\n"


def planting(folder: Path) -> dict:
    """Model options that make timm's factory write the attacker's file into `folder`, without a network."""
    address = "data:text/plain;base64," + base64.b64encode(PAYLOAD.encode()).decode()
    overlay = {"url": address, "hf_hub_id": None, "file": None}
    return {"pretrained_cfg_overlay": overlay, "cache_dir": str(folder)}


ATTACKS = {
    "planting": planting,
    "pretrained_cfg": lambda folder: {"pretrained_cfg": {"file": str(folder / "any.pth")}},
    "checkpoint_path": lambda folder: {"checkpoint_path": str(folder / "any.pth")},
    "features_only": lambda folder: {"features_only": True},
    "misspelt": lambda folder: {"depht": 2},
    "boolean": lambda folder: {"depth": True},
    "terabytes": lambda folder: {"embed_dim": 2**14, "depth": 1024},
    "pixels": lambda folder: {"img_size": 2**14, "patch_size": 1},
    "text": lambda folder: {"depth": "2"},
}


def rewrite(path: Path, change) -> None:
    """Write a safetensors file anew with `change(metadata)`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(metadata)
    save_file(load_file(path), path, metadata=metadata)


@pytest.fixture
def adapter(tmp_path) -> Path:
    recipe = Recipe(model="test_vim", pretrained=False, peft="lora")
    path = tmp_path / "adapter.safetensors"
    model = build_model(recipe, 3)
    vimtune.save_adapter(model, path, extra={"recipe": recipe.to_dict() | {"pretrained": True}})
    return path


def test_the_attack_is_real(tmp_path):
    """With an unchecked option timm writes the file; otherwise the tests below would prove nothing."""
    options = planting(tmp_path / "site")
    with pytest.raises(Exception):  # noqa: B017 - what is no checkpoint is refused only after it was written
        timm.create_model("test_vim", pretrained=True, **options)
    assert [path.read_text() for path in (tmp_path / "site").iterdir()] == [PAYLOAD]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("command", ["predict", "merge", "load_adapter", "read_adapter_info"])
def test_an_adapter_file_cannot_choose_arguments_of_the_factory(tmp_path, adapter, capsys, attack, command):
    site = tmp_path / "site"

    def change(metadata):
        info = json.loads(metadata["info"])
        info["model"]["kwargs"] |= ATTACKS[attack](site)
        metadata["info"] = json.dumps(info)

    rewrite(adapter, change)
    before = sorted(tmp_path.iterdir())
    if command in ("predict", "merge"):
        (tmp_path / "a.png").write_bytes(b"")
        before = sorted(tmp_path.iterdir())
        image, output = str(tmp_path / "a.png"), str(tmp_path / "m.safetensors")
        arguments = {
            "predict": ["predict", image, "--adapter", str(adapter)],
            "merge": ["merge", str(adapter), "--output", output],
        }[command]
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and len(error.splitlines()) == 1
    elif attack not in ("terabytes", "pixels"):  # sizes count when a model is created
        with pytest.raises(ValueError):
            if command == "load_adapter":
                vimtune.load_adapter(timm.create_model("test_vim"), adapter)
            else:
                vimtune.read_adapter_info(adapter)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "local-dir:/tmp", "resnet18", "test_vim.tag", 3, None]
)
def test_only_models_of_the_registry_are_created(adapter, capsys, name):
    def change(metadata):
        info = json.loads(metadata["info"])
        info["model"]["name"] = name
        metadata["info"] = json.dumps(info)

    rewrite(adapter, change)
    assert cli.main(["merge", str(adapter), "-o", str(adapter.with_name("m.safetensors"))]) == 2
    assert "expected a known model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a known model"):
        create_listed_model(name, {})


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = (
        "--model test_vim --no-pretrained --peft lora --epochs 1 --num-workers 0 --batch-size 16 "
        "--device cpu --no-pictures "
        "--dataset-kwargs species=2,train_per_species=8,val_per_species=4,test_per_species=4"
    )
    assert cli.train_main([*flags.split(), "--output-dir", str(run)]) == 0
    return run


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("where", ["recipe", "state", "config"])
def test_a_recipe_cannot_choose_arguments_of_the_factory(
    tmp_path, finished_run, capsys, monkeypatch, attack, where
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "checkpoint.safetensors"):
        (run / name).write_bytes((finished_run / name).read_bytes())
    site = tmp_path / "site"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    evil = recipe | {"model_kwargs": ATTACKS[attack](site), "pretrained": True, "epochs": 2}
    if where in ("recipe", "config"):
        (run / "recipe.yaml").write_text(yaml.safe_dump(evil))
    if where == "state":

        def change(metadata):
            metadata["recipe"] = json.dumps(evil)

        rewrite(run / "checkpoint.safetensors", change)
    flags = ["--resume", str(run), "--epochs", "2"]
    if where == "config":
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(evil | {"output_dir": str(tmp_path / "new")}))
        flags = ["--config", str(tmp_path / "own.yaml")]
    capsys.readouterr()
    assert cli.train_main(flags) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not site.exists() and not (tmp_path / "new").exists()


def test_a_recipe_names_the_wrong_option():
    with pytest.raises(
        RecipeError, match=r"model_kwargs: unknown model option 'depht'. Did you mean 'depth'"
    ):
        Recipe(model_kwargs={"depht": 2})
    with pytest.raises(RecipeError, match=r"depth: Input should be a valid integer .found True"):
        Recipe(model_kwargs={"depth": True})
    with pytest.raises(RecipeError, match="in_chans = 1: images are read as RGB"):
        Recipe(model_kwargs={"in_chans": 1})
    assert (
        Recipe(model_kwargs={"depth": 2, "in_chans": 3, "global_pool": "avg"}).backbone.model_kwargs["depth"]
        == 2
    )


# --- the schema


def test_the_schema_is_the_constructor():
    arguments = inspect.signature(VisionMamba).parameters
    assert list(OPTIONS) == [name for name in arguments if name not in ("device", "dtype")]
    assert {field.name: field.default for field in fields(ModelOptions)} == {
        name: arguments[name].default for name in OPTIONS
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"img_size": (96, 80), "stride": 8, "in_chans": 1, "num_classes": 0, "depth": 2}]
)
def test_number_of_parameters(name, options):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert ModelOptions(**model.options).num_parameters == sum(p.numel() for p in model.parameters())
    assert ModelOptions(**model.options).grid == model.patch_embed.grid_size


@pytest.mark.parametrize("name", MODELS)
def test_every_model_states_its_options_and_is_created_again_from_them(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, img_size=(96, 112), depth=2)
        stated = json.loads(json.dumps(model.creation))
        again = create_listed_model(stated["name"], stated["kwargs"])
    assert set(stated["kwargs"]) == set(OPTIONS)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1] and again.options == model.options


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": True}, {"img_size": (64,)}, {"img_size": (64, 64, 3)}, {"img_size": True},
        {"img_size": [32, 0]}, {"patch_size": 0}, {"stride": 0}, {"in_chans": 0}, {"num_classes": -1},
        {"num_classes": 2.5}, {"global_pool": "max"}, {"depth": 0}, {"d_state": 0}, {"d_conv": None},
        {"expand": 1.5}, {"dt_rank": 0}, {"drop_rate": 1.0}, {"drop_rate": float("nan")},
        {"pos_drop_rate": -0.1}, {"drop_path_rate": True}, {"drop_path_rate": "0.1"}, {"backend": None},
        {"depth": 10**40}, {"embed_dim": object},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused_in_one_line_by_constructor_and_file(options):
    with pytest.raises(ValueError) as caught:
        VisionMamba(**options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(ValueError):
        check_model_options("test_vim", options)


def test_unknown_backend_is_refused_when_the_model_is_created():
    with pytest.raises(ValueError, match=r"unknown backend 'tritn'. Did you mean 'triton'"):
        create_listed_model("test_vim", {"backend": "tritn"})


def test_whole_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    model = VisionMamba(img_size=np.int64(32), depth=np.int32(1), num_classes=np.int64(3), embed_dim=16)
    assert json.loads(json.dumps(model.options))["depth"] == 1 and type(model.num_classes) is int


@pytest.mark.parametrize(
    "creation",
    [[], None, "test_vim", {"name": "test_vim"}, {"kwargs": {}}, {"name": [], "kwargs": {}},
     {"name": "test_vim", "kwargs": [1]},
     {"name": "test_vim", "kwargs": {}, "url": "x"}],
    ids=str,
)  # fmt: skip
def test_what_a_file_says_about_the_model_has_one_form(creation):
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        check_creation(creation, "a.safetensors")
    assert check_creation({}, "a.safetensors") == {}


# --- models of other packages


@pytest.fixture
def someones_model(monkeypatch):
    """A plain convolutional model of a user's own package, known to timm and to vimtune."""
    monkeypatch.setattr(MODELS, "_things", dict(MODELS._things))
    name = "someones_net"

    class Net(torch.nn.Module):
        def __init__(self, num_classes=10, in_chans=3, width=8, img_size=32):
            super().__init__()
            self.num_classes = num_classes
            self.stem = torch.nn.Conv2d(in_chans, width, 3, 2, 1)
            self.mix = torch.nn.Linear(width, width)
            self.fc = torch.nn.Linear(width, num_classes)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(torch.nn.functional.gelu(self.mix(self.stem(x).mean((2, 3)))))

    module = types.ModuleType("someones_package")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = {"num_classes": 10, "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    module.default_cfgs = timm.models.generate_default_cfgs({name: {**cfg, "classifier": "fc"}})

    def someones_net(pretrained=False, **options):
        return timm.models.build_model_with_cfg(Net, name, pretrained, **options)

    someones_net.__module__ = module.__name__
    timm.models.register_model(someones_net)

    @dataclass(frozen=True, kw_only=True)
    class NetOptions:
        __pydantic_config__ = STRICT
        num_classes: int = 10
        width: Annotated[int, Ge(1)] = 8
        img_size: int = 32

    register_model(name, summary="a small net", options=NetOptions)
    return name


def test_a_registered_model_of_ones_own_is_created_adapted_and_found_again(someones_model, tmp_path):
    torch.manual_seed(0)
    model = create_listed_model(someones_model, {"num_classes": 4, "width": 16})
    assert model.creation == {"name": someones_model, "kwargs": {"num_classes": 4, "width": 16}}
    with pytest.raises(ValueError, match=r"unknown model option 'widht'. Did you mean 'width'"):
        create_listed_model(someones_model, {"widht": 4})
    with pytest.raises(ValueError, match="width: Input should be greater than or equal to 1"):
        create_listed_model(someones_model, {"width": 0})
    vimtune.inject(model, "lora", targets="mix", rank=2)
    vimtune.save_adapter(model, tmp_path / "a.safetensors")
    info = vimtune.read_adapter_info(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    other = create_listed_model(info.model["name"], info.model["kwargs"])
    vimtune.load_adapter(other, tmp_path / "a.safetensors")
    assert someones_model in list_models()


@pytest.mark.parametrize(
    ("summary", "options", "message"),
    [
        ("", object, "expected one line"),
        ("x", object, "expected a dataclass"),
        ("two\nlines", int, "one line"),
    ],
)
def test_what_is_no_model_to_register(summary, options, message):
    with pytest.raises(ValueError, match=message):
        register_model("nobodys_net", summary=summary, options=options)


def test_no_model_takes_the_name_of_another(someones_model):
    """A new version of one's own model does take the place of the old one, as in a notebook."""
    options = MODELS.get(someones_model).load_options()
    for name in ("vim_tiny_patch16_224", "test_vim"):
        for schema in (options, ModelOptions):
            with pytest.raises(ValueError, match=rf"there is a model '{name}' already .*another name"):
                register_model(name, summary="mine", options=schema)
    register_model(someones_model, summary="better", options=options)
    assert list_models()[someones_model] == "better"
    with pytest.raises(ValueError, match="there is a model"):
        register_model(someones_model, summary="another's", options=ModelOptions)


def test_what_a_model_of_ones_own_may_lack(someones_model):
    model = copy.deepcopy(create_listed_model(someones_model, {}))
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match=rf"{someones_model} has no set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    with pytest.raises(CheckpointError, match=f"no pretrained weights are published for {someones_model}"):
        create_listed_model(someones_model, {}, pretrained=True)
    register_model("unknown_to_timm", summary="x", options=MODELS.get(someones_model).load_options())
    with pytest.raises(ValueError, match="timm does not know the model unknown_to_timm"):
        create_listed_model("unknown_to_timm", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: delattr(type(model), "get_classifier"), "has no get_classifier"),
        (lambda model: delattr(model, "num_classes"), "has no num_classes"),
        (lambda model: delattr(model, "pretrained_cfg"), "has no pretrained_cfg"),
        (lambda model: setattr(model, "num_classes", 1000), "num_classes = 1000 where 4 was asked for"),
        (lambda model: setattr(model, "pretrained_cfg", {"input_size": (3, 8, 8)}), "lacks mean, std"),
    ],
)
def test_what_a_model_of_ones_own_must_have(someones_model, monkeypatch, change, message):
    create = timm.create_model

    def create_changed(*args, **kwargs):
        model = create(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(timm, "create_model", create_changed)
    with pytest.raises(ValueError, match=message) as caught:
        create_listed_model(someones_model, {"num_classes": 4})
    assert "\n" not in str(caught.value)
