"""All analyses: each has a section on a small model, and the report of them is whole and harmless."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from changed_models import changed_vim
from torch import nn

import vimtune
from vimtune.adapters import active_adapter
from vimtune.analysis.command import run_analyses
from vimtune.analysis.components import movements
from vimtune.analysis.parameters import GROUPS, OTHERS, effective_parameters, group_of, layer_of
from vimtune.analysis.registry import ANALYSES, load_analysis, parse_names
from vimtune.analysis.report import AnalysisReport
from vimtune.analysis.subject import NotApplicable, Subject
from vimtune.compare.plan import Cell, load_plan
from vimtune.pages.section import Section, Table

COMPONENTS = Path(__file__).resolve().parents[2] / "benchmarks" / "components.yaml"


@pytest.fixture(scope="module")
def report(subject) -> AnalysisReport:
    return run_analyses(subject, list(ANALYSES))


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_finds_something(name, report):
    section = report.sections[name]
    assert section.findings and section.explanation and section.numbers
    assert all(len(row) == len(table.heading) for table in section.tables for row in table.rows)
    assert all(picture.caption for picture in section.pictures)
    json.dumps(section.numbers)


def test_the_page_needs_nothing_and_shows_names_as_text(report):
    for own in report.sections.values():
        for picture in own.pictures:
            picture.figure.set_layout_engine("none")  # which is most of the time of drawing
    section = Section("a <b>title</b>", "x & y", ["<script>"], {}, [Table("c", ["h"], [["<i>\x1b[31m"]])])
    page = AnalysisReport({"file": "<b>run</b>"}, {**report.sections, "own": section}, {"x": "why"}).to_html()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page and "\x1b" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:image/png;base64,)""", page)
    assert page.count("data:image/png") == sum(len(own.pictures) for own in report.sections.values())
    assert "default-src 'none'" in page and "x: why" in page


def test_the_numbers_are_json(report):
    values = json.loads(report.to_json())
    assert list(values["analyses"]) == list(ANALYSES) and values["left_out"] == {}
    assert {own["direction"] for own in values["analyses"]["scan_maps"]["layers"]} == {"forward", "reverse"}


def test_what_an_analysis_lacks_is_said():
    before, after = changed_vim("linear")
    report = run_analyses(Subject(before, after), list(ANALYSES))
    assert list(report.sections) == ["components", "cost"]
    assert report.left_out["transformation"] == "no in_proj and no out_proj has changed"
    assert report.left_out["similarity"] == "it needs images: name a data set with --dataset"
    other = Subject(nn.Linear(2, 2), nn.Linear(2, 2), batches=[torch.zeros(4, 3, 8, 8)])
    with pytest.raises(NotApplicable, match="about Vision Mamba, and the model is a Linear"):
        load_analysis("similarity")(other)


def test_every_parameter_of_a_vim_has_a_group():
    before, after = changed_vim("lora", targets=["in_proj", "conv1d"], rank=2)
    weights = effective_parameters(before)
    assert weights.keys() == dict(before.named_parameters()).keys()
    groups = {path: group_of(path) for path in weights}
    assert OTHERS not in groups.values() and set(groups.values()) == set(GROUPS)
    assert layer_of("layers.12.mixer.D") == 12 and layer_of("norm_f.weight") is None
    found = movements(weights, effective_parameters(after))
    moved = {group for group, layers in found.items() if any(own.change for own in layers.values())}
    assert moved == {"projectors", "convolution", "head"}
    assert sum(own.parameters for layers in found.values() for own in layers.values()) == sum(
        parameter.numel() for parameter in before.parameters()
    )


def test_relative_change():
    before = {"layers.0.norm.weight": torch.tensor([3.0, 4.0]), "layers.0.mixer.D": torch.zeros(2)}
    after = {"layers.0.norm.weight": torch.tensor([3.0, 5.0]), "layers.0.mixer.D": torch.ones(2)}
    found = movements(before, after)
    assert found["norms"][0].relative == pytest.approx(1 / 5) and found["SSM"][0].relative is None


def test_names_of_analyses():
    assert parse_names("cost, components") == ["components", "cost"]
    with pytest.raises(ValueError, match="unknown analysis 'csot'"):
        parse_names("csot")


def test_the_component_study_trains_what_its_names_say():
    plan = load_plan(COMPONENTS, {}, check_paths=False)
    with torch.device("meta"):
        model = timm.create_model("vim_nano_patch8_64", num_classes=2, depth=2)
    for name in plan.methods:
        method = plan.recipe(Cell(name, "flowers", 1e-3, 0), COMPONENTS.parent).method
        with torch.device("meta"):
            adapted = vimtune.inject(
                copy.deepcopy(model), method.peft, targets=method.targets, **method.method_kwargs
            )
        (paths,) = active_adapter(adapted).sites.values()
        groups = {group_of(path) for path in paths}
        expected = {"in_proj": "projectors", "out_proj": "projectors", "linear": None}.get(name, name)
        if name in ("x_proj", "dt_proj", "A_log", "D", "ssm"):
            expected = "SSM"
        assert groups == ({expected} if expected else set()), name
