"""The page of the documentation with the scores of the methods is made from files of results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "_hooks"))

import evidence

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
    evidence.read_scores.cache_clear()

    def make(**files: str) -> str:
        for name, text in files.items():
            stem, _, kind = name.rpartition("_")
            (tmp_path / "results" / f"{stem}.{kind}").write_text(text, encoding="utf-8")
        return evidence.all_scores()

    yield make
    evidence.read_scores.cache_clear()


def test_scores_are_those_of_the_chosen_rate(page):
    text = page(
        native_csv=RUNS, native_png="", native_paired_csv=PAIRED, native2_png="", native_paired_png=""
    )
    # The first seed found both rates equally good; the file says which one was chosen.
    assert "| `lora` | 72.0 ± 2.8 | 72.0 | 900 |" in text and "| `full` | - | - | - |" in text
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
    assert "| `lora` | 61.0 ± 1.4 | 61.0 | - |" in text and "| `full` | 61.5* | 61.5 | - |" in text


def test_without_a_word_on_it_the_first_seed_has_chosen(page):
    lines = [
        "method,data,lr,seed,val_acc,acc",
        "a,x,1,0,50,40",
        "a,x,2,0,51,41",
        "a,x,2,1,1,45",
        "a,x,1,1,99,99",
    ]
    assert "| `a` | 43.0 ± 2.8 |" in page(words_csv="\n".join(lines))
