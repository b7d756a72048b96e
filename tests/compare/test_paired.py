"""Differences between methods: pairs by seed, errors, the mean over data sets, and where they are shown."""

from __future__ import annotations

import csv
import io
import math

import pytest
from tiny_plans import result

from vimtune.compare.paired import Difference, all_differences, difference, differences_from, differences_of
from vimtune.compare.pictures import draw_differences
from vimtune.compare.plan import Plan, PlanError
from vimtune.compare.results import Row
from vimtune.compare.tables.csv import paired_to_csv, rates_to_csv
from vimtune.compare.tables.files import write_tables
from vimtune.compare.tables.markdown import to_markdown


def row(method, data, *scores, first_seed=0, **changes):
    runs = [result(score, seed=seed, **changes) for seed, score in enumerate(scores, first_seed)]
    return Row(method, data, tuple(runs), 1e-3)


ROWS = [
    row("lora", "flowers", 60, 62, 61),
    row("prodial", "flowers", 61, 62, 63),
    row("full", "flowers", 50),
    row("lora", "cars", 40, 44),
    row("prodial", "cars", 43, 45),
    row("full", "cars"),
]


def test_a_difference_is_that_of_runs_with_the_same_seed():
    found = difference(ROWS[1], ROWS[0])  # differences of 1, 0 and 2
    assert (found.pairs, found.mean) == (3, 1.0) and found.error == pytest.approx(1 / math.sqrt(3))
    assert found.show(2) == "+1.00 ± 0.58"
    # The seeds that only one of them has are left out, and one pair has no error.
    later = row("dora", "flowers", 70, 80, first_seed=2)
    assert difference(later, ROWS[0]) == Difference("dora", "lora", "flowers", 1, 9.0, None)
    assert difference(later, ROWS[0]).show(1) == "+9.0"
    assert difference(ROWS[5], ROWS[3]) is None
    assert difference(row("x", "flowers", 60, first_seed=7), ROWS[0]) is None
    assert difference(row("x", "flowers", 60, split="val"), ROWS[0]) is None


def test_draws_of_the_data_are_pairs_of_their_own():
    def runs(*scores):
        seeds = [(0, 0), (0, 1), (1, 0)]
        made = [
            result(score, seed=seed, recipe={"data_seed": draw})
            for score, (seed, draw) in zip(scores, seeds, strict=True)
        ]
        return Row("m", "x", tuple(made), 1e-3)

    assert difference(runs(1, 2, 4), runs(0, 0, 0)).mean == pytest.approx(7 / 3)


def test_the_mean_over_data_sets_takes_them_as_given():
    flowers, cars, mean = differences_of(ROWS, "prodial", "lora")
    assert (cars.mean, cars.error) == (2.0, pytest.approx(1.0))
    assert (mean.data, mean.pairs, mean.mean) == (None, 5, 1.5)
    assert mean.error == pytest.approx(math.sqrt(flowers.error**2 + cars.error**2) / 2)
    assert [each.data for each in differences_of(ROWS, "full", "lora")] == ["flowers"]  # cars are missing
    names = [(each.method, each.against) for each in all_differences(ROWS)]
    assert set(names) == {("prodial", "lora"), ("full", "lora"), ("full", "prodial")}
    assert [each.method for each in differences_from(ROWS, "prodial")] == ["lora", "lora", "lora", "full"]
    assert differences_from(ROWS, "prodial")[2].mean == -1.5
    assert list(all_differences([])) == []


def test_tables_show_them_from_the_reference(tmp_path):
    text = to_markdown(ROWS, "")
    assert "## Difference from lora" in text and "± their standard error" in text
    assert "| prodial | +1.00 ± 0.58 | +2.00 ± 1.00 | +1.50 ± 0.58 |" in text
    assert "| full | -10.00 | - | - |" in text
    assert "| lora | -1.00 ± 0.58 |" in to_markdown(ROWS, "", reference="prodial")
    assert "Difference" not in to_markdown([row("a", "x", 1), row("b", "x", 2)], "")  # no seeds, no error
    lines = list(csv.DictReader(io.StringIO(paired_to_csv(ROWS))))
    assert [line["data"] for line in lines[:3]] == ["flowers", "cars", ""]
    assert float(lines[2]["difference"]) == 1.5 and lines[3]["standard_error"] == ""
    assert {"paired.csv", "rates.csv", "paired.png"} <= set(write_tables(ROWS, tmp_path, "", []))
    for rows in (ROWS, ROWS[:3]):
        (axes,) = draw_differences(differences_from(rows, "lora")).axes
        assert [label.get_text() for label in axes.get_yticklabels()][-1] == "prodial"


def test_the_scores_behind_a_learning_rate_are_kept():
    rejected = tuple(result(90, val=60, lr=1e-2, seed=seed) for seed in (0, 1))
    text = rates_to_csv([Row("lora", "x", (result(80, val=70),), 1e-3, tried=2, others=rejected)])
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [(line["lr"], line["chosen"], line["seed"], line["top1"]) for line in lines] == [
        ("0.001", "True", "0", "70.0"),
        ("0.01", "False", "0", "60.0"),
        ("0.01", "False", "1", "60.0"),
    ]
    assert "90" not in text  # The test split is not looked at.


def test_what_the_split_of_the_scores_has_chosen_is_said():
    epochs = [{"epoch": n, "loss": 1.0, "top1": 1.0, "top5": None} for n in (1, 2)]
    (kept,) = row("a", "x", 1, split="val").results
    (several,) = row("a", "x", 1, split="val", history=epochs).results
    assert "optimistic" not in to_markdown([Row("a", "x", (kept,), 1e-3)], "")
    assert "also chose the learning rates, which" in to_markdown([Row("a", "x", (kept,), 1e-3, tried=2)], "")
    both = to_markdown([Row("a", "x", (several,), 1e-3, tried=2)], "")
    assert "also chose the epochs and learning rates, which" in both


def test_a_reference_is_one_of_the_methods():
    assert Plan.from_values({"methods": "lora,full"}).reference == "lora"
    assert Plan.from_values({"methods": "lora,full", "reference": "full"}).reference == "full"
    with pytest.raises(PlanError, match=r"reference = 'lara' is none of the methods\..*'lora'"):
        Plan.from_values({"methods": "lora,full", "reference": "lara"})
