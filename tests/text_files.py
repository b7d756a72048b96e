"""Right lines of the official files of the language tasks, and how to write them, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARC = {
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
SCENE = {
    "activity_label": "Roof work",
    "ctx_a": "A man climbs [title] Oh.",
    "ctx_b": "the Tall man",
    "endings": ["sits down.", "[step] flies."],
    "label": 1,
}
SENTENCE = {"sentence": "Ann saw Eva because _ was near.", "option1": "Ann", "option2": "Eva", "answer": "2"}
GOAL = {"goal": "open a door", "sol1": "push it", "sol2": "eat it", "label": 0}
BOOL = {"passage": "Ice is cold.", "question": "is ice cold", "label": True}


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    """Write a file of JSON Lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
