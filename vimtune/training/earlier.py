"""Run states of format 1, which knew no task but image classification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vimtune.schema import check, parse_json
from vimtune.training.identity import ResumeError

FORMAT_1 = "vimtune run state 1"
"""What the metadata of such a state call its format."""


def convert(metadata: Mapping[str, str], shown: str) -> dict[str, str]:
    """The metadata of a state of format 1, its facts and progress in the form of format 2.

    Keys get their new names and are moved to their new places; the schemas of format 2 then check them.

    Raises:
        ResumeError: they are no JSON, or no objects. `shown` names the file.
    """
    facts = _object(metadata, "facts", shown)
    _rename(facts, {"train_images": "train_examples"})
    if "classes" in facts:
        facts["outputs"] = {"classes": facts.pop("classes")}
    progress = _object(metadata, "progress", shown)
    _rename(progress, {"loss_images": "loss_count", "images": "count"})
    progress.pop("best_top1", None)  # it stands in the record of the best epoch, too
    progress["history"] = check(
        list[dict[str, Any]], progress.get("history"), f"{shown}: its history", ResumeError
    )
    for record in progress["history"]:
        _rename(record, {"images_per_second": "rate"})
        if scores := {name: record.pop(name) for name in ("top1", "top5") if name in record}:
            record["scores"] = scores
    return {**metadata, "facts": json.dumps(facts), "progress": json.dumps(progress)}


def _object(metadata: Mapping[str, str], key: str, shown: str) -> dict[str, Any]:
    what = f"{shown}: its {key}"
    return check(dict[str, Any], parse_json(metadata.get(key), what, ResumeError), what, ResumeError)


def _rename(values: dict[str, Any], names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if old in values:
            values[new] = values.pop(old)
