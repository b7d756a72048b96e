"""Whether texts that are to be scored were trained on: such scores say little about new texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from vimtune.data import DatasetError
from vimtune.data.text import Example, TextSplit
from vimtune.tasks.origin import data_of_run
from vimtune.tasks.text.job import open_splits
from vimtune.tasks.text.settings import TextDataSettings

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask


Identity = tuple[tuple[str, ...], tuple[str, ...]]
"""What is read of a text, whichever of its answers is right."""


def trained_texts(adapter: Path | None, task: TextTask) -> set[Identity]:
    """The texts that an adapter was trained on; none where nobody knows, such as of an adapter file without
    its run folder, which does not say where its texts lay.

    Args:
        adapter: its file; None for a model without one.
        task: of which kind they are.
    """
    run = None if adapter is None else data_of_run(adapter, TextDataSettings)
    if run is None:
        return set()
    try:
        # What is wanted beside the scores is not worth a download.
        trained, _, _ = open_splits(task, dataclasses.replace(run, test=False, download=False))
    except DatasetError:  # They are gone since.
        return set()
    return {_identity(example) for example in trained.examples}


def unseen_part(texts: TextSplit, trained: Collection[Identity]) -> TextSplit:
    """The texts of a split that were not trained on; the split itself where that is true of all of them.

    The same words are the same text, in whatever file they stand: a test file that repeats texts of the
    training file is found out, too.
    """
    left = tuple(example for example in texts.examples if _identity(example) not in trained)
    return texts if len(left) == len(texts.examples) else dataclasses.replace(texts, examples=left)


def _identity(example: Example) -> Identity:
    return example.contexts, example.continuations
