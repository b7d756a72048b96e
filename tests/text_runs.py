"""Small runs of language tasks on made-up texts, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from text_files import ARC, BOOL, GOAL, SCENE, SENTENCE, write_lines

from vimtune.tasks import TASKS

PROMPTED = {"prompt": "Two and two is", "completion": " four"}
LABELLED = {"text": "warm and bright", "label": "summer"}

LINES: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [ARC, {**ARC, "question": "What is cold and deep?", "answerKey": "C"}],
    "arc_challenge": [ARC, {**ARC, "answerKey": "A"}],
    "hellaswag": [SCENE, {**SCENE, "label": 0}],
    "winogrande": [SENTENCE, {**SENTENCE, "answer": "1"}],
    "piqa": [GOAL, {**GOAL, "label": 1}],
    "boolq": [BOOL, {**BOOL, "label": False}],
    "text": [LABELLED, {"text": "cold", "label": "winter"}],
}
"""Two right lines of the files of each language task."""

SETTINGS: dict[str, Any] = {
    "model": "mamba_tiny",
    "peft": "lora",
    "rank": 2,
    "epochs": 1,
    "batch_size": 4,
    "lr": 1e-3,
    "val_share": 0.25,
    "device": "cpu",
    "backend": "torch",
    "threads": 1,
}
"""Keys of the recipe of a run that takes about a second."""


def write_data(task: str, folder: Path, number: int = 12) -> Path:
    """Write the files of a data set under their official names, with `number` lines to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    files = TASKS.get(task).form.files
    write_lines(folder / files["train"][0], (LINES[task] * number)[:number])
    write_lines(folder / files["test"][0], LINES[task])
    return folder
