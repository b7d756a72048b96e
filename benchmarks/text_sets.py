"""Bring public data sets into the files that language tasks read, for benchmarks/text_methods.yaml.

    python benchmarks/text_sets.py DOWNLOADS sets

DOWNLOADS is a folder with what is public elsewhere; what is missing is left out, with a line that says so:

    arc/ARC-{Easy,Challenge}-{train,test}.jsonl    the official files
    winogrande/{train_m,dev}.jsonl                 the official files
    piqa/valid.jsonl, piqa/valid-labels.lst        https://github.com/ybisk/ybisk.github.io
    qc/, sentence_polarity/, subjectivity/         https://github.com/nltk/nltk_data, unpacked corpora

Of PIQA's validation file the last 500 questions are for the test, the others for training. The folders of
nltk that have no split of their own give a fifth to the test.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIQA_TEST = 500


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    for name, prepare in SETS.items():
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            prepare(source, folder)
        except FileNotFoundError as error:
            folder.rmdir()
            print(f"{name} is left out: {error}")


def arc(level: str) -> Callable[[Path, Path], None]:
    """Copy the two official files of a level."""

    def prepare(source: Path, folder: Path) -> None:
        for part in ("train", "test"):
            shutil.copy(source / "arc" / f"ARC-{level}-{part}.jsonl", folder)

    return prepare


def winogrande(source: Path, folder: Path) -> None:
    """Copy the training file of medium size, and the one whose answers are public."""
    for part in ("train_m", "dev"):
        shutil.copy(source / "winogrande" / f"{part}.jsonl", folder)


def piqa(source: Path, folder: Path) -> None:
    """Divide the validation file."""
    lines = (source / "piqa" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    labels = (source / "piqa" / "valid-labels.lst").read_text(encoding="utf-8").split()
    goals = [json.loads(line) | {"label": int(label)} for line, label in zip(lines, labels, strict=True)]
    write(folder / "train.jsonl", goals[:-PIQA_TEST])
    write(folder / "valid.jsonl", goals[-PIQA_TEST:])


def questions(source: Path, folder: Path) -> None:
    """TREC's questions with the coarse of their classes, in the official split (Li & Roth 2002)."""
    for part in ("train", "test"):
        lines = (source / "qc" / f"{part}.txt").read_text(encoding="latin-1").splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        write(folder / f"{part}.jsonl", [{"text": text, "label": name.split(":")[0]} for name, text in pairs])


def polarity(source: Path, folder: Path) -> None:
    """Sentences of film reviews, for or against a film (Pang & Lee 2005)."""
    files = {"positive": "rt-polarity.pos", "negative": "rt-polarity.neg"}
    labelled(source / "sentence_polarity", files, folder)


def subjectivity(source: Path, folder: Path) -> None:
    """Sentences that tell a plot, or an opinion (Pang & Lee 2004)."""
    files = {"objective": "plot.tok.gt9.5000", "subjective": "quote.tok.gt9.5000"}
    labelled(source / "subjectivity", files, folder)


def labelled(source: Path, files: dict[str, str], folder: Path) -> None:
    """Sentences of a file for each class, of which each fifth one is for the test."""
    examples = [
        {"text": " ".join(line.split()), "label": name}
        for name, file in files.items()
        for line in (source / file).read_text(encoding="latin-1").splitlines()
    ]
    random.Random(0).shuffle(examples)
    write(folder / "test.jsonl", examples[::5])
    write(folder / "train.jsonl", [example for index, example in enumerate(examples) if index % 5])


def write(path: Path, examples: list[dict[str, Any]]) -> None:
    lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8")


SETS: dict[str, Callable[[Path, Path], None]] = {
    "arc_easy": arc("Easy"),
    "arc_challenge": arc("Challenge"),
    "winogrande": winogrande,
    "piqa": piqa,
    "questions": questions,
    "polarity": polarity,
    "subjectivity": subjectivity,
}
"""Makes the files of each set from the downloads, in the folder that is given second."""


if __name__ == "__main__":
    main()
