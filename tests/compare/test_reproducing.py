"""The table of the ProDiaL paper as one comparison: the grid of its recipes is the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_plans import TINY, InProcess, result

from vimtune.compare.command import compare
from vimtune.compare.plan import Cell, Plan, PlanError, load_plan
from vimtune.compare.results import Row
from vimtune.compare.tables import to_csv, to_markdown
from vimtune.config_files import read_plan, variants_of
from vimtune.recipe import load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER = CONFIGS / "paper.yaml"


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
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", section, re.M)
    stated = {
        name: dict(zip(("cars", "caltech", "flowers"), map(float, own), strict=True)) for name, *own in rows
    }
    assert paper.options.published == stated
    assert set(paper.methods) == set(stated) and set(paper.data) == {"cars", "caltech", "flowers"}


def test_a_stand_in_of_the_grid_runs_and_shows_published_scores(paper, tmp_path, monkeypatch, capsys):
    """A method of the grid on a few generated images that go by the name of Flowers-102."""
    monkeypatch.setattr("vimtune.compare.command.Processes", InProcess())
    monkeypatch.setattr("vimtune.compare.command.POLL_SECONDS", 0)
    monkeypatch.setattr("vimtune.training.pictures.save_picture", lambda figure, path: path.touch())
    changes = {key: value for key, value in TINY.items() if key != "dataset_kwargs"}
    data = {"flowers": {"dataset": "synthetic_flowers", "dataset_kwargs": TINY["dataset_kwargs"]}}
    values = {**paper.to_dict(), **changes, "amp": "none", "eval_interval": 1, "seeds": [0], "data": data}
    plan = Plan.from_values({**values, "methods": {"prodial_in": paper.methods["prodial_in"]}})
    rows, failed = compare(plan, tmp_path / "compared")
    assert not failed and [row.published for row in rows] == [85.97]
    assert "published scores without a run here (47): full on cars, " in capsys.readouterr().out
    table = (tmp_path / "compared" / "table.md").read_text()
    assert "| published |" in table and re.search(r"\| prodial\\_in \| .* \| 85\.97 \|", table)
    assert load_plan(tmp_path / "compared" / "plan.yaml", {}).to_dict() == plan.to_dict()


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
