"""Every shipped config is a recipe that loads, says where it comes from, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import vimtune
from vimtune.adapters import adapter_parameters, check_gradients
from vimtune.methods import METHODS
from vimtune.recipe import Recipe, load_recipe
from vimtune.strict_yaml import read_yaml
from vimtune.train.job import build_model
from vimtune.train.optim import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NUM_CLASSES = {"cars": 196, "caltech": 102, "flowers": 102}
PAPER = {  # parameters in M for Cars and for Caltech / Flowers, as in the paper's table
    "full": (7.00, 7.00),
    "linear": (0.04, 0.02),
    "bitfit": (0.08, 0.06),
    "strong": (0.96, 0.94),
    "ft_both": (5.35, 5.33),
    "ft_in": (3.58, 3.56),
    "ft_out": (1.81, 1.77),
    "lora_both": (0.63, 0.61),
    "lora_in": (0.41, 0.39),
    "lora_out": (0.26, 0.24),
    "dora_both": (0.69, 0.65),
    "dora_in": (0.43, 0.41),
    "dora_out": (0.28, 0.26),
    "prodial_both": (0.67, 0.65),
    "prodial_in": (0.42, 0.41),
    "prodial_out": (0.27, 0.25),
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


every_config = pytest.mark.parametrize("path", CONFIGS, ids=name_of)


def test_the_grid_of_the_paper_is_complete():
    names = {name_of(path) for path in CONFIGS}
    assert {f"{data}/vim_tiny_{cell}" for data in NUM_CLASSES for cell in PAPER} <= names


@every_config
def test_it_loads_and_its_place_tells_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.dataset == path.parent.name
    assert recipe.model.split("_patch")[0] == "_".join(path.stem.split("_")[:2])
    assert recipe.peft in path.stem


@every_config
def test_it_says_only_what_is_not_a_default(path):
    # A key with the default's value is allowed where it names the cell.
    values = read_yaml(path)
    naming = {"dataset", "model", "peft", "targets", "rank", "augmentation", "batch_size"}
    for key in values.keys() - naming:
        if key in ("lr", "weight_decay"):  # set in each config, so that methods can be compared by reading
            continue
        assert getattr(load_recipe(path), key) != getattr(Recipe(), key), key


@every_config
def test_the_header_has_command_source_and_expected_score(path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"python train_vim.py --config {path.relative_to(ROOT).as_posix()}" in text
    for heading in ("# Command: ", "# Expected: ", "# Source: "):
        assert text.count(heading) == 1
    assert max(map(len, header)) <= 110


@pytest.mark.parametrize("data", ["cars", "flowers", "caltech"])
@pytest.mark.parametrize("cell", PAPER)
def test_the_number_of_trained_parameters_is_the_one_stated_and_the_papers(cell, data):
    path = ROOT / "configs" / data / f"vim_tiny_{cell}.yaml"
    recipe = load_recipe(path)
    with torch.device("meta"):
        model = timm.create_model(recipe.model, num_classes=NUM_CLASSES[data])
        vimtune.inject(model, recipe.peft, targets=recipe.targets, **recipe.method_kwargs)
    trained = vimtune.summary(model).trainable
    stated = re.search(
        r"with ([\d.]+) M trained parameters \(here ([\d,]+)\)", path.read_text(encoding="utf-8")
    )
    assert stated is not None and int(stated[2].replace(",", "")) == trained
    published = PAPER[cell][data != "cars"]
    # DoRA's counts in the table belong to ranks tuned per data set; rank 16 is below.
    assert trained / 1e6 == pytest.approx(published, rel=0.005, abs=0.042 if "dora" in cell else 0.02)


def distinct() -> dict[str, Recipe]:
    """One recipe for every method setting among the configs, and for each method that has no config, put
    on the tiny model."""
    recipes = {}
    for path in CONFIGS:
        recipe = load_recipe(path)
        method = {name: getattr(recipe, name) for name in ("peft", "targets", "layers", "peft_kwargs")}
        fields = (
            recipe.method_kwargs | {"rank": 4} if "rank" in recipe.method_kwargs else recipe.method_kwargs
        )
        key = " ".join(str(value) for value in (*method.values(), fields) if value)
        recipes[key] = Recipe(
            model="test_vim",
            pretrained=False,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            **method | fields,
        )
    for method in set(METHODS) - {recipe.peft for recipe in recipes.values()}:
        recipes[method] = Recipe(model="test_vim", pretrained=False, peft=method)
    return recipes


@pytest.mark.parametrize("recipe", distinct().values(), ids=list(distinct()))
def test_one_step_of_every_method_setting_moves_all_it_trains(recipe):
    model = build_model(recipe, num_classes=5)
    torch.manual_seed(0)
    for entry in adapter_parameters(model):  # off the start, where B = 0 hides the gradient of A
        torch.nn.init.normal_(entry.parameter, std=0.05)
    entries = list(adapter_parameters(model))
    optimizer = build_optimizer(
        entries, lr=recipe.lr, head_lr=recipe.head_lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.999)
    )
    # Read off an owner, an adapted weight is the effective one; named_parameters has the raw tensors.
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images, labels = torch.randn(6, 3, 32, 32), torch.randint(5, (6,))
    F.cross_entropy(model(images), labels).backward()
    check_gradients(model)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {entry.name for entry in entries}


def test_a_flag_overrides_a_config():
    path = CONFIGS[0]
    assert load_recipe(path, {"epochs": "7"}) == load_recipe(path).replace(epochs=7)
