"""Tables and pictures: what stands in them, and that nothing in a name does harm."""

from __future__ import annotations

import csv
import io
import re
import runpy
from pathlib import Path

import pytest
from tiny_plans import TINY, result

from vimtune.compare.pictures import draw_curves, draw_pareto, pareto, short_count
from vimtune.compare.plan import Plan
from vimtune.compare.results import Row, Spread, best_of, rows_of_runs
from vimtune.compare.tables.console import print_rows
from vimtune.compare.tables.csv import runs_to_csv, to_csv
from vimtune.compare.tables.files import write_tables
from vimtune.compare.tables.latex import to_latex
from vimtune.compare.tables.markdown import to_markdown
from vimtune.compare.tables.notes import protocol_of
from vimtune.console import build_console

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = [
    Row("lora", "flowers", (result(80, seed=0), result(82, seed=1)), 1e-3, 1, 2),
    Row("full", "flowers", (result(81.5, trained=50_000, seed=0),), 1e-4),
    Row("linear", "flowers", (result(60, trained=100),), 1e-2),
    Row("lora", "cars", (result(30),), 1e-3),
    Row("full", "cars", (), None, 3),
]
EPOCHS = [{"epoch": n, "loss": 1.0, "top1": 3.0, "top5": None} for n in (1, 2)]
"""The history of a run that could choose between two epochs."""


def test_mean_and_deviation():
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3)
    assert Spread.of([2.0]) == Spread(2.0, None, 1)
    assert Spread.of([]) is None and Spread.of([1.0, None]) is None
    assert Spread.of([80.0, 82.0]).show() == "81.0 ± 1.4"


def test_markdown_has_an_overview_and_the_numbers_of_each_data_set():
    text = to_markdown(ROWS, "the note", ["full on cars: a | b"])
    assert "the note" in text and "- full on cars: a \\| b" in text
    assert "| lora | 81.0 ± 1.4 | 30.0 | 55.5 |" in text
    assert "| full | 81.5 | - | - |" in text
    assert "| lora | 81.0 ± 1.4 | 2 of 3 | 0.001 | 900 | 1,000 | 1.0 s | 100 MiB | 4 kB |" in text
    assert "| full | **81.5** | 1 | 0.0001 | 49,900 | 50,000 |" in text
    assert "| full | - | 0 of 3 | - | - | - | - | - | - |" in text
    assert "top5" not in text and "top-5" not in text  # there are only four classes


def test_csv_has_unrounded_numbers():
    first, *others = csv.DictReader(io.StringIO(to_csv(ROWS)))
    assert len(others) == 4
    assert (first["top1_mean"], first["seeds"], first["missing"]) == ("81.0", "2", "1")
    assert float(first["top1_sd"]) == pytest.approx(2**0.5)
    assert first["method_parameters"] == "900" and first["adapter_bytes_mean"] == "4000.0"


def test_names_are_harmless_in_every_format(tmp_path):
    name = "=a|b_$x$&%#{}~^\\ *`<i>\x1b[31m"
    rows = [Row(name, name, (result(),), 1e-3)]
    heading = to_markdown(rows, "").splitlines()
    assert all("\x1b" not in line and "<i>" not in line.replace("\\<", "") for line in heading)
    assert next(csv.DictReader(io.StringIO(to_csv(rows))))["method"].startswith("'=")
    assert r"=a|b\_\$x\$\&\%\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in to_latex(rows)
    write_tables(rows, tmp_path, "", [])


def test_names_of_data_sets_are_harmless_where_tables_and_remarks_have_them():
    name = "a|b <i>\x1b[31m"
    runs = tuple(
        result(split="val", seed=seed, recipe={"data_seed": seed, "shots": 1}, history=EPOCHS)
        for seed in (0, 1)
    )
    text = to_markdown([Row(method, data, runs, 1e-3) for method in "xy" for data in (name, "c")], "")
    assert text.count(r"a\|b \<i\>\\x1b\[31m") == 5, "in two headings, in a title, and in two remarks"
    assert "\x1b" not in text and "a|b" not in text and "`with head`" in text


def test_what_a_report_says_is_no_formula_of_a_spreadsheet():
    own = result(
        recipe={"budget": 1000},
        method_config={"lora": {"rank": "\x1b"}},
        split="=1+1",
        peak_memory_of="@x",
    )
    rows = [Row("lora", "flowers", (own,), 1e-3)]
    for text in (to_csv(rows), runs_to_csv(rows)):
        (line,) = csv.DictReader(io.StringIO(text))
        assert line["split"] == "'=1+1" and line.get("peak_memory_of", "'@x") == "'@x" and "\x1b" not in text


def test_latex_has_as_many_cells_as_columns():
    text = to_latex(ROWS)
    for table in re.findall(r"\\begin\{tabular\}\{(l(?:r+))\}(.*?)\\end\{tabular\}", text, re.S):
        lines = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert lines and all(len(re.findall(r"(?<!\\)&", line)) == len(table[0]) - 1 for line in lines)
    assert r"81.0 $\pm$ 1.4" in text


def test_warnings_of_runs_are_repeated():
    often, once = "one corrupt image was left out", "a | b"
    runs = (result(warnings=[often]), result(seed=1, warnings=[once, often]), result(seed=2))
    text = to_markdown([Row("lora", "flowers", runs, 1e-3)], "")
    assert f"Warning of 2 of 3 runs: {often}" in text and r"Warning of 1 of 3 runs: a \| b" in text
    many = tuple(result(warnings=[f"{number} images"]) for number in range(8))
    text = to_markdown([Row("lora", "flowers", many, 1e-3)], "")
    assert text.count("Warning of 1 of 8 runs") == 5 and "have 3 more warnings" in text


def test_the_best_row_is_none_where_splits_differ():
    first, second = (Row(name, "x", (result(score),), 1e-3) for name, score in (("a", 1), ("b", 2)))
    assert best_of([first, second]) == [second] and best_of([first]) == []
    other = Row("c", "x", (result(3, split="val", history=EPOCHS),), 1e-3)
    assert best_of([first, second, other]) == []
    assert "which makes them optimistic" in to_markdown([other], "")


def test_nobody_beats_the_methods_on_the_line():
    names = [row.method for row in pareto(ROWS[:3])]
    assert names == ["linear", "lora", "full"]
    worse = Row("dora", "flowers", (result(79, trained=1000),), 1e-3)
    larger = Row("prodial", "flowers", (result(81.5, trained=60_000),), 1e-3)
    assert [row.method for row in pareto([*ROWS[:3], worse, larger])] == names


def test_pictures_of_several_sizes_of_one_method_and_of_nothing(tmp_path):
    from vimtune.pages.style import save_picture

    many = [Row(f"m{n}", "x", (result(50 + n, trained=1000 + 100 * n),), 1e-3) for n in range(25)]
    for number, rows in enumerate((ROWS, many, ROWS[3:], ROWS[4:])):
        save_picture(draw_pareto(rows), tmp_path / f"{number}.png")
        assert draw_curves(rows).axes
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
    figure = draw_pareto(many)
    assert len(figure.legends[0].get_texts()) == 25
    assert [short_count(n) for n in (950, 36_900, 5_308_416)] == ["950", "36.9k", "5.31M"]


@pytest.mark.parametrize("failed", [5, 45])
def test_a_score_far_behind_does_not_press_the_others_together(failed):
    scores = {f"m{n}": 50 + n for n in range(12)} | {"failed": failed}
    rows = [
        Row(name, "x", (result(score, trained=1000 * 2**n),), 1e-3)
        for n, (name, score) in enumerate(scores.items())
    ]
    figure = draw_pareto(rows)
    (axes,) = figure.axes
    assert axes.get_ylim()[0] == pytest.approx(50 - 0.12 * 11 if failed == 5 else 45 - 0.12 * 16)
    assert [text.get_text() for text in axes.texts] == (["5.0 %"] if failed == 5 else [])
    assert len(figure.legends[0].get_texts()) == len(scores)
    at_a_budget = [Row(name, "x", (result(score, trained=1000),), 1e-3) for name, score in scores.items()]
    (axes,) = draw_pareto(at_a_budget).axes
    assert axes.get_xlim()[0] > (49 if failed == 5 else 44)
    assert [text.get_text() for text in axes.texts] == (["5.0 %"] if failed == 5 else [])


def test_methods_of_about_one_size_stand_one_below_the_other():
    def row(method, data, *scores, trained=173_000):
        return Row(
            method, data, tuple(result(each, seed=n, trained=trained) for n, each in enumerate(scores)), 1e-3
        )

    rows = [
        *(row("a", "x", 60, 62), row("b", "x", 70, 71, trained=200_000), row("c", "x", 50, 52)),
        *(row("a", "y", 90, 91), row("b", "y", 60, 61, trained=200_000), row("late", "y", 99)),
    ]
    figure = draw_pareto(rows)
    figure.draw_without_rendering()
    first, second = figure.axes[:2]
    names = [label.get_text() for label in first.get_yticklabels()]
    # No data set has scores of all of them, so they stand as they come.
    assert names == ["a", "b", "c", "late"] and "%" in second.get_xlabel()
    figure = draw_pareto([row for row in rows if row.method != "c" and row.method != "late"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b", "a"]
    assert len(figure.axes[0].containers) == 2
    far = [row(name, "y", 95, trained=trained) for name, trained in (("full", 7_000_000), ("bias", 2_000))]
    assert "parameters" in draw_pareto([*rows, *far]).axes[0].get_xlabel()


def test_few_methods_of_other_sizes_have_them_with_their_names():
    def row(method, data, score, trained):
        return Row(method, data, (result(score, trained=trained),), 1e-3)

    names = ["a", "b", "c", "d", "e", "f"]
    rows = [row(name, data, 50 + n, 173_000) for data in "xy" for n, name in enumerate(names)]
    rows += [row("full", data, 49, 7_000_000) for data in "xy"] + [row("bias", "x", 40, 2_000)]
    figure = draw_pareto(rows)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    sizes = {row.method: short_count(row.parameters) for row in rows}
    assert labels == [f"bias ({sizes['bias']})", f"full ({sizes['full']})", *names]


def test_labels_of_sizes_do_not_run_into_each_other():
    near = [
        Row("a", "x", (result(50, trained=92_700),), 1e-3),
        Row("b", "x", (result(55, trained=93_900),), 1e-3),
    ]
    apart = [
        Row("a", "y", (result(50, trained=92_700),), 1e-3),
        Row("b", "y", (result(55, trained=300_000),), 1e-3),
    ]
    figure = draw_pareto([*near, *apart])
    figure.draw_without_rendering()
    shown = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert shown == [["93.9k"], ["92.7k", "300k"]]


def test_runs_without_a_plan_are_named_by_what_tells_them_apart():
    runs = [
        result(80, seed=1, recipe={"rank": 2}),
        result(82, seed=0, recipe={"rank": 2}),
        result(70, recipe={"rank": 8}),
        result(60, recipe={"peft": "full"}),
        result(50, recipe={"peft": "full", "dataset_kwargs": {**TINY["dataset_kwargs"], "species": 5}}),
    ]
    rows = rows_of_runs(runs)
    assert [(row.method, row.data, row.seeds) for row in rows] == [
        ("lora (rank=2)", "synthetic_flowers (species=2)", [0, 1]),
        ("lora (rank=8)", "synthetic_flowers (species=2)", [0]),
        ("full", "synthetic_flowers (species=2)", [0]),
        ("full", "synthetic_flowers (species=5)", [0]),
    ]


def test_draws_of_the_data_are_averaged_over():
    def run(top1, seed, draw, source="images"):
        recipe = {"rank": 2, "data_seed": draw, "shots": 1}
        return result(top1, seed=seed, recipe=recipe, data={"train": source})

    runs = [run(80 + 2 * seed + draw, seed, draw, f"draw {draw}") for draw in (3, 4) for seed in (0, 1)]
    (row,) = rows_of_runs(runs[::-1])
    assert row.score == Spread.of([83, 85, 84, 86]) and row.score.count == 4
    assert (row.method, row.data, row.seeds, row.data_seeds) == ("lora", "synthetic_flowers", [0, 1], [3, 4])
    text = to_markdown([row], "")
    assert "| runs | lr |" in text and "| 4 | 0.001 |" in text and "data seeds draw nothing" not in text
    line = next(csv.DictReader(io.StringIO(to_csv([row]))))
    assert (line["runs"], line["seeds"], line["data_seeds"]) == ("4", "2", "2")
    assert [own["data_seed"] for own in csv.DictReader(io.StringIO(runs_to_csv([row])))] == [
        "3",
        "3",
        "4",
        "4",
    ]
    (same,) = rows_of_runs([run(80, 0, 3), run(80, 0, 4)])
    assert r"The data seeds draw nothing of synthetic\_flowers" in to_markdown([same], "")


def test_a_run_that_was_made_twice_is_no_second_seed():
    (row,) = rows_of_runs([result(80), result(80)])
    assert "| runs | lr |" in to_markdown([row], "") and row.seeds == [0]


def test_the_notes_say_over_what_the_means_are():
    plan = Plan.from_values({"methods": "lora", "seeds": "0,1", "data_seeds": "0,1,2", "lrs": "1e-3,1e-2"})
    assert protocol_of(plan) == (
        "For each method on each data set the validation split chooses the learning rate among those of its "
        "grid (seeds 0, data seed 0); the other seeds and data seeds are run with that one alone. Scores are "
        "means and standard deviations (n - 1) over the 6 pairs of the seeds (0, 1) and the data seeds "
        "(0, 1, 2)."
    )


def test_tables_without_a_line_have_their_columns(tmp_path, monkeypatch):
    """One method has nothing to be paired with; where no run has finished, there is no run to list."""
    one = [Row("lora", "x", (result(80, val=70),), 1e-3)]
    for name, rows in (("one", one), ("none", [Row("full", "x", (), None, 3)])):
        (tmp_path / name).mkdir()
        write_tables(rows, tmp_path / name, "", [])
        for table in tmp_path.glob(f"{name}/*.csv"):
            assert table.read_text().startswith("method,"), table
    monkeypatch.setattr("sys.argv", ["", *(str(tmp_path / name) for name in ("one", "none", "out"))])
    runpy.run_path(str(BENCHMARKS / "image_tables.py"), run_name="__main__")
    paired = (tmp_path / "out" / "one_paired.csv").read_text()
    assert paired == "method,against,data,pairs,difference,standard_error\n"
    assert (tmp_path / "out" / "none.csv").read_text() == "method,data,lr,seed,chosen\n"


def test_the_published_tables_have_a_line_for_each_run(tmp_path, monkeypatch, capsys):
    rejected = (result(95, val=60.12345, lr=1e-2),)
    rows = [
        Row(
            "lora",
            "x",
            (result(80.00009, val=70), result(82, val=71, seed=1)),
            1e-3,
            tried=2,
            others=rejected,
        ),
        Row("full", "x", (result(81, val=72, lr=3e-4), result(84, val=70, seed=1, lr=3e-4)), 3e-4),
    ]
    (tmp_path / "native").mkdir()
    write_tables(rows, tmp_path / "native", "", [])
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "native"), str(tmp_path / "published")])
    runpy.run_path(str(BENCHMARKS / "image_tables.py"), run_name="__main__")
    first, *others = csv.DictReader(io.StringIO((tmp_path / "published" / "native.csv").read_text()))
    assert first == {
        **{"method": "lora", "data": "x", "lr": "0.001", "seed": "0", "chosen": "True"},
        **{"val": "70.0", "test": "80.000", "parameters": "900", "seconds": "2.0"},
        "device": "a processor",
    }
    assert [(line["chosen"], line["val"], line["test"]) for line in others[:2]] == [
        ("True", "71.0", "82"),
        ("False", "60.123", ""),
    ]
    assert len(others) == 4 and (tmp_path / "published" / "native_paired.png").exists()
    assert others[-1]["method"] == "full" and others[-1]["lr"] == "0.0003"
    paired = (tmp_path / "published" / "native_paired.csv").read_text().splitlines()
    assert paired[1] == "full,lora,x,2,1.500,0.500"
    both = [str(tmp_path), str(tmp_path / "native"), str(tmp_path / "again")]
    monkeypatch.setattr("sys.argv", ["", *both])
    with pytest.raises(SystemExit, match="is no comparison that has tables"):
        runpy.run_path(str(BENCHMARKS / "image_tables.py"), run_name="__main__")
    assert (tmp_path / "again" / "native.csv").is_file(), "the other one is published all the same"


def test_the_terminal_shows_the_same(capsys):
    print_rows(ROWS, build_console())
    out = capsys.readouterr().out
    assert "81.0 ± 1.4" in out and "all data sets" in out and "cars" in out
