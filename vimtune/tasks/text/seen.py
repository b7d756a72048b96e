"""Whether texts that are to be scored were trained on: such scores say little about new texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from vimtune.data import DatasetError
from vimtune.data.text import Example, TextSplit
from vimtune.tasks.origin import data_of_run, trained_note
from vimtune.tasks.text.job import open_splits
from vimtune.tasks.text.settings import TextDataSettings

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask


def seen_notes(adapter: Path | None, texts: TextSplit, task: TextTask) -> list[str]:
    """What has to be said of texts that an adapter was trained on; nothing where there are none, or where
    nobody knows, such as of an adapter file without its run folder, which does not say where its texts lay.

    The same words are the same text, in whatever file they stand: a test file that repeats texts of the
    training file is found out, too.

    Args:
        adapter: its file; None for a model without one.
        texts: those that are scored.
        task: of which kind they are.
    """
    run = None if adapter is None else data_of_run(adapter, TextDataSettings)
    if run is None:
        return []
    try:
        # What is wanted beside the scores is not worth a download.
        trained, _, _ = open_splits(task, dataclasses.replace(run, test=False, download=False))
    except DatasetError:  # They are gone since.
        return []
    known = {_identity(example) for example in trained.examples}
    count = sum(_identity(example) in known for example in texts.examples)
    return trained_note(count, len(texts.examples), "texts")


def _identity(example: Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is read of a text, whichever of its answers is right."""
    return example.contexts, example.continuations
