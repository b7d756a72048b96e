"""The table of the ProDiaL paper as one comparison: the grid of its recipes is the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from tiny_plans import TINY, InProcess, result

from vimtune.compare.command import compare
from vimtune.compare.plan import Cell, Plan, PlanError, load_plan
from vimtune.compare.results import Row
from vimtune.compare.tables.csv import to_csv
from vimtune.compare.tables.markdown import to_markdown
from vimtune.recipe import load_recipe
from vimtune.recipe.config_files import read_plan, variants_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER = CONFIGS / "paper.yaml"
DATA = ("cars", "caltech", "flowers", "caltech_small")
"""Data sets of the paper; the last one is Vim-small on Caltech-101."""


@pytest.fixture(scope="module")
def paper() -> Plan:
    return load_plan(PAPER, {"seeds": "0,1,2"})


def test_its_runs_are_the_recipes_of_the_grid(paper, tmp_path):
    assert sorted(f"{data}/{method}" for method, data in paper.pairs) == sorted(variants_of(PAPER))
    for method, data in paper.pairs:
        (lr,) = paper.rates(method, data)
        found = paper.recipe(Cell(method, data, lr, 2), tmp_path)
        alone = load_recipe(PAPER, variant=f"{data}/{method}")
        assert found.replace(seed=0, output_dir=None) == alone.replace(output_dir=None)


def test_published_scores_are_those_of_the_readme(paper):
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## paper\.yaml:.*?(?=^## )", readme, re.M | re.S)
    rows = re.findall(r"^\| (\w+)" + r" \| ([\d.]+|-)" * len(DATA), section, re.M)
    stated = {
        name: {data: float(score) for data, score in zip(DATA, own, strict=True) if score != "-"}
        for name, *own in rows
    }
    assert paper.options.published == stated
    assert set(paper.methods) == set(stated) and tuple(paper.data) == DATA


def test_a_stand_in_of_the_grid_runs_and_shows_published_scores(paper, tmp_path, monkeypatch, capsys):
    """A method of the grid on a few generated images that go by the names of Flowers-102 and Caltech-101."""
    monkeypatch.setattr("vimtune.compare.command.Processes", InProcess())
    monkeypatch.setattr("vimtune.compare.command.POLL_SECONDS", 0)
    monkeypatch.setattr("vimtune.pages.style.save_picture", lambda figure, path: path.touch())
    changes = {key: value for key, value in TINY.items() if key != "dataset_kwargs"}
    stand_in = {"dataset": "synthetic_flowers", "dataset_kwargs": TINY["dataset_kwargs"]}
    small = {**paper.data["caltech_small"], **stand_in, "model": "test_vim", "model_kwargs": {"depth": 4}}
    data = {"flowers": stand_in, "caltech_small": small}
    values = {**paper.to_dict(), **changes, "amp": "none", "eval_interval": 1, "seeds": [0], "data": data}
    plan = Plan.from_values({**values, "methods": {"prodial_in": paper.methods["prodial_in"]}})
    rows, failed = compare(plan, tmp_path / "compared")
    assert not failed and [row.published for row in rows] == [85.97, 97.09]
    assert rows[0].parameters is not None and rows[1].parameters == 4 * rows[0].parameters // 3  # blocks
    assert "published scores without a run here (61): full on cars, " in capsys.readouterr().out
    table = (tmp_path / "compared" / "table.md").read_text()
    assert "| published |" in table and re.search(r"\| prodial\\_in \| .* \| 85\.97 \|", table)
    assert load_plan(tmp_path / "compared" / "plan.yaml", {}).to_dict() == plan.to_dict()


@pytest.mark.slow
def test_stand_ins_with_the_shapes_of_the_paper(paper, tmp_path, monkeypatch):
    """Both models of the grid at their own size: the weights are random ones with the keys of the official
    files and a head for the classes of ImageNet, the images are generated."""
    monkeypatch.setattr("vimtune.compare.command.Processes", InProcess())
    monkeypatch.setattr("vimtune.compare.command.POLL_SECONDS", 0)
    stand_in = {"dataset": "synthetic_flowers", "dataset_kwargs": TINY["dataset_kwargs"]}
    data = {}
    for name in ("caltech", "caltech_small"):
        own = paper.data[name]
        model = own.get("model", paper.base["model"])
        weights = tmp_path / f"{model}.pth"
        if not weights.exists():
            torch.save({"model": timm.create_model(model, num_classes=1000).state_dict()}, weights)
        data[name] = {**own, **stand_in, "checkpoint": str(weights)}
    few = {
        "epochs": 1,
        "warmup_epochs": 0,
        "eval_interval": 1,
        "num_workers": 0,
        "device": "cpu",
        "threads": 1,
    }
    methods = {name: paper.methods[name] for name in ("linear", "prodial_both")}
    values = {**paper.to_dict(), **few, "amp": "none", "seeds": [0], "data": data, "methods": methods}
    rows, failed = compare(Plan.from_values(values), tmp_path / "compared")
    assert not failed and len(rows) == 4
    for row in rows:
        assert row.published == paper.options.published[row.method].get(row.data)
    # Without the head they are those of the paper.
    assert {row.parameters for row in rows} == {0, 626_688, 1_253_376}


def test_rows_without_published_scores_have_no_column_for_them():
    rows = [Row("lora", "x", (result(),), 1e-3), Row("full", "x", (result(),), 1e-3)]
    assert "published" not in to_markdown(rows, "") and "published" not in to_csv(rows)
    rows.append(Row("dora", "x", (result(),), 1e-3, published=81.25))
    assert "81.25" in to_markdown(rows, "") and "81.25" in to_csv(rows)


def test_other_grids_are_plans_too(tmp_path):
    assert set(read_plan(CONFIGS / "nano.yaml")) >= {"methods"} and "data" not in read_plan(
        CONFIGS / "nano.yaml"
    )
    language = read_plan(CONFIGS / "language.yaml")
    assert language["data"]["arc_easy-mamba_130m"]["task"] == "arc_easy" and len(language["data"]) == 16
    path = tmp_path / "grid.yaml"
    path.write_text("variants: {data: {a: {dataset: flowers}}}\n")
    with pytest.raises(PlanError, match="a comparison needs a grid with the group 'method'; it has data"):
        load_plan(path, {})
    path.write_text("methods: lora\npublished: {lora: 3}\n")
    with pytest.raises(PlanError, match="expected scores by method and data set"):
        load_plan(path, {})
