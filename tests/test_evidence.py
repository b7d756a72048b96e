"""The page of the documentation with the scores of the methods is made from files of results."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "_hooks"))

import evidence
import rankings
import verdicts

RUNS = """method,data,lr,seed,chosen,val,test,parameters,seconds
lora,x,0.001,0,False,60.0,,,
lora,x,0.003,0,True,60.0,70.0,900,1
lora,x,0.003,1,True,62.0,74.0,900,1
full,x,0.001,0,True,61.5,,,
"""
PAIRED = """method,against,data,pairs,difference,standard_error
full,lora,x,2,1.500,0.500
full,lora,y,2,-1.000,
full,lora,,4,0.500,0.250
dora,lora,x,2,0.100,0.000
dora,full,x,2,7.000,0.500
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Makes the page of files of results: name -> text."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(evidence, "BENCHMARKS", tmp_path)

    def make(**files: str) -> str:
        for name, text in files.items():
            stem, _, kind = name.rpartition("_")
            (tmp_path / "results" / f"{stem}.{kind}").write_text(text, encoding="utf-8")
        evidence.read_scores.cache_clear()
        return evidence.all_scores()

    yield make
    evidence.read_scores.cache_clear()


def test_scores_are_those_of_the_chosen_rate(page):
    text = page(
        native_csv=RUNS, native_png="", native_paired_csv=PAIRED, native2_png="", native_paired_png=""
    )
    # The first seed found both rates equally good; the file says which one was chosen.
    assert "| `lora` | **72.0 ± 2.8** | **72.0** | 900 |" in text and "| `full` | - | - | - |" in text
    pictures = [line for line in text.splitlines() if line.startswith("![")]
    assert pictures == [
        "![native](benchmarks/results/native.png)",
        "![native_paired](benchmarks/results/native_paired.png)",
    ]
    assert "Differences from `lora`" in text
    assert "| method | x | y | mean | in standard errors |" in text
    assert "| `full` | +1.50 ± 0.50 | -1.00 | +0.50 ± 0.25 | +2.0 |" in text
    assert "| `dora` | +0.10 ± 0.00 | - | - | - |" in text and "7.00" not in text


def test_scores_of_a_closed_test_are_those_of_the_validation_split(page):
    closed = RUNS.replace(",70.0,900", ",,").replace(",74.0,900", ",,")
    text = page(ablation_csv=closed)
    assert "## Ablation, validation split" in text and "Differences" not in text
    assert "| `full` | **61.5*** | **61.5** | - |\n| `lora` | 61.0 ± 1.4 | 61.0 | - |" in text


def test_without_a_word_on_it_the_first_seed_has_chosen(page):
    lines = [
        "method,data,lr,seed,val_acc,acc",
        "a,x,1,0,50,40",
        "a,x,2,0,51,41",
        "a,x,2,1,1,45",
        "a,x,1,1,99,99",
    ]
    assert "| `a` | **43.0 ± 2.8** |" in page(words_csv="\n".join(lines))


def test_sizes_that_differ_by_data_set_are_a_range(page):
    other = "lora,y,0.003,0,True,62.0,75.0,1900,1\n"
    assert "| 900 to 1,900 |" in page(native_csv=RUNS + other)


def test_what_the_plan_says_stands_with_its_tables(page, tmp_path):
    plan = (
        "# Every method,\n#  on one set.\n# Command: prepare\n#   compare -o runs/native\n"
        "# Data:   copies of\n#         few pixels.\n\n# not this\nmethods: {}\n"
    )
    (tmp_path / "image.yaml").write_text(plan)
    (tmp_path / "other.yaml").write_text(plan.replace("native", "native2"))
    text = page(native_csv=RUNS.replace("seconds\n", "seconds,device\n").replace(",900,1\n", ",900,1,H200\n"))
    assert "## Native\n\nEvery method, on one set.\n" in text
    assert "; seeds 0, 1, on H200.\n- Command: `prepare`, then `compare -o runs/native`\n" in text
    assert text.endswith("- Data: copies of few pixels.")


def test_paragraphs_and_commands_are_told_by_indentation():
    subject, notes = evidence.plan_comments(
        "# What counts.\n# Command: vimtune compare -o runs/a\n"
        "#   vimtune compare --model small\n#     --jobs 2\n"
        "# Asked because\n#         nobody knew.\n# ProDiaL: as it is: plain.\n\nmethods: {}\n"
    )
    assert subject == ["What counts."]
    assert notes == [
        "Command: `vimtune compare -o runs/a`, then `vimtune compare --model small --jobs 2`",
        "Asked because nobody knew.",
        "ProDiaL: as it is: plain.",
    ]


@pytest.mark.parametrize("plan", sorted(evidence.BENCHMARKS.glob("*.yaml")), ids=lambda plan: plan.stem)
def test_what_is_shown_as_a_command_of_a_plan_is_one(plan):
    (subject,), notes = evidence.plan_comments(plan.read_text(encoding="utf-8"))
    assert subject.endswith(".") and "Command" not in subject
    (line,) = (note for note in notes if note.startswith("Command: "))
    commands = re.findall("`(.*?)`", line)
    assert line == "Command: " + ", then ".join(f"`{command}`" for command in commands)
    assert all(re.match(r"(vimtune|torchrun|python) ", command) for command in commands)
    assert any(f"--config benchmarks/{plan.name} " in command for command in commands)


METHODS = ("lora", "dora", "prodial", "prodial_paper", "full", "linear")


def runs_of(methods, data=("flowers", "cars")) -> str:
    """A file of results in which later methods are better."""
    lines = [
        f"{method},{name},0.1,0,True,50,{50 + number},9,1"
        for number, method in enumerate(methods)
        for name in data
    ]
    return "\n".join(["method,data,lr,seed,chosen,val,test,parameters,seconds", *lines])


def paired_of(*lines: str) -> str:
    return "\n".join(["method,against,data,pairs,difference,standard_error", *lines])


def test_questions_are_answered_by_standard_errors(page):
    page(
        native_csv=runs_of(METHODS),
        native_paired_csv=paired_of(
            *("prodial,lora,flowers,3,2,.5", "prodial,lora,cars,3,-1,.5", "prodial,lora,,6,.5,.35"),
            *("prodial,dora,flowers,3,1,.5", "prodial,dora,cars,3,1.2,.5", "prodial,dora,,6,1.1,.35"),
            *("prodial_paper,prodial,flowers,3,1,.5", "prodial_paper,prodial,,3,2,.5"),
        ),
        compositions_csv=runs_of(["projectors", "scan", "lora+a", "lora+b", "A"]),
        compositions_paired_csv=paired_of(
            *(
                "scan,projectors,flowers,3,-1,.1",
                "scan,projectors,cars,3,-1.5,.1",
                "scan,projectors,,6,-1.25,.07",
            ),
            *("lora+a,projectors,flowers,3,1,", "lora+a,projectors,,3,.4,"),
            *("lora+b,projectors,flowers,3,1,.1", "A,lora+b,flowers,3,1,.1", "A,projectors,flowers,3,0,.1"),
        ),
    )
    text = verdicts.verdicts()
    native, compositions = "[Native](#native)", "[Compositions](#compositions)"
    assert (
        f"| `prodial` - `lora` | {native} | +0.50 ± 0.35 | +1.4 | 1 of 2 | no difference to be told |" in text
    )
    assert f"| `prodial` - `dora` | {native} | +1.10 ± 0.35 | +3.1 | 2 of 2 | **better** |" in text
    assert f"| `prodial` - `prodial_paper` | {native} | -2.00 ± 0.50 | -4.0 | 0 of 1 | **worse** |" in text
    assert f"| `projectors` - `scan` | {compositions} | +1.25 ± 0.07 | +17.9 | 2 of 2 | **better** |" in text
    assert (
        f"| `projectors` - `A` | {compositions} | - | - | 0 of 1 | open: not run on all data sets |" in text
    )
    assert text.index("| `lora+b`") < text.index("| `lora+a`") and "one run each" in text
    assert "`prodial_free`" not in text and text.count("###") == 5


def test_without_results_nothing_is_said_to_hold(page):
    page(words_csv=RUNS)
    assert verdicts.verdicts() == "" and rankings.rankings() == ""


def test_the_order_stands_beside_that_of_the_papers(page):
    page(native_csv=runs_of(METHODS))
    text = rankings.rankings()
    # The paper has full, prodial, dora, lora, linear, by the mean of Flowers and Cars.
    assert "| `linear` | 55.0 | 1 | 58.7 | 5 |" in text and "| `full` | 54.0 | 2 | 91.1 | 1 |" in text
    assert "Here: means over flowers, cars." in text and "Rank correlation (Spearman): -0.10." in text
    others = ["full,pets,0.1,0,True,99,99,9,1", "linear,pets,0.1,0,True,1,1,9,1"]
    page(native_csv="\n".join([runs_of(METHODS), *others]))
    assert rankings.rankings() == text, "other data sets count in no rank"
    page(native_csv=runs_of(METHODS[:4], ["pets"]))
    assert rankings.rankings() == ""
