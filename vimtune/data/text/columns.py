"""Which columns of a user's own texts are read: the text, its label, or prompt and completion.

A file is looked at as a whole, so that all of its lines are read in the same way; what else it has is named
in the source of its split, and nothing is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vimtune.data.columns import LABELS, find_column
from vimtune.data.errors import DatasetError
from vimtune.data.text.lines import Line
from vimtune.text import counted, name_some, quote

TEXTS = (
    *("text", "sentence", "review", "content", "comment", "message", "tweet", "post", "document", "body"),
    *("article", "utterance", "texts", "sentences"),
)
"""Usual names of the column of texts, in lower case; of several in one file the first here is taken."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns; of those that are None the usual names are looked for."""

    text: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Meaning:
    """Which columns of a file mean what."""

    text: str | None
    """The column of texts; None where lines have prompts and completions."""
    label: str | None
    """The column of labels, beside texts."""
    others: tuple[str, ...]
    """The columns that are not used."""

    def arranged(self, line: Line) -> Line:
        """A line of the file with its text and its label under the names "text" and "label", and with what it
        is asked about where it has a prompt. Messages about it say where the two stood.

        A line of prompt and completion stays as it is.
        """
        if self.text is None or not isinstance(line.values, dict):
            return line
        names = {"text": self.text, "label": self.label, "prompt": "prompt"}
        values = {name: line.values[own] for name, own in names.items() if own in line.values}
        renamed = [f"{name} is column {quote(names[name])}" for name in values if names[name] != name]
        where = f" ({', '.join(renamed)})" if renamed else ""
        return Line(line.place + where, values)

    def note(self, classes: Sequence[str]) -> str:
        """How the columns were read, in words.

        Args:
            classes: those of the texts; empty where labels are not looked at.
        """
        unused = list(self.others)
        if self.text is None:
            read = "prompts and completions"
        elif classes:
            labels = f"{counted(len(classes), 'labels')} in column {quote(self.label)}"
            read = f"texts in column {quote(self.text)} with {labels}"
        else:
            read = f"plain texts in column {quote(self.text)}, no labels"
            unused = [*filter(None, [self.label]), *unused]
        return f"{read}; columns not used: {name_some(unused)}" if unused else read


def understand(lines: Sequence[Line], answered: bool, columns: Columns) -> Meaning:
    """Which columns of a file mean what, by their names.

    Prompts go before usual names of texts; the names "text" and "label" themselves go before prompts.

    Args:
        lines: all of the file; those of JSON Lines may have different fields.
        answered: whether the answers are needed, as in training. Else the file may be another one than
            those that `columns` was given for, and what it lacks of these is looked for under usual names.
        columns: what the user says.

    Raises:
        DatasetError: no texts, or a column that is not there.
    """
    fields = list(dict.fromkeys(name for line in lines for name in line.fields()))
    file = lines[0].file
    given = columns if answered else _there(columns, fields)
    if given.text is not None and given.text == given.label:
        raise DatasetError(f"text_column and label_column are both {quote(given.text)}: give two columns")
    # A column that is named as the one is not found as the other.
    for_text = _without(fields, {None if given.text else given.label})
    for_label = _without(fields, {None if given.label else given.text})
    text = find_column(for_text, file, "text_column", given.text, TEXTS)
    label = find_column(for_label, file, "label_column", given.label, LABELS)
    if given == Columns() and "completion" in fields and not {"text", "label"} <= set(fields):
        alone = any(line.has("text") and not line.has("completion") for line in lines)
        used = {"prompt", "completion", *(["text"] if alone else [])}
        return Meaning(None, None, _without(fields, used))
    if text is not None:
        return Meaning(text, label, _without(fields, {text, label}))
    if fields and "prompt" not in fields:
        raise DatasetError(
            f"{file} has no column of texts: found {name_some(fields)}. Expected prompt and completion, or "
            f"text (or {', '.join(TEXTS[1:])}), alone or with label (or {', '.join(LABELS[1:])}); others "
            "are named by text_column=... and label_column=..."
        )
    return Meaning(None, None, _without(fields, {"prompt"}))


def _there(columns: Columns, fields: Sequence[str]) -> Columns:
    """The names of the columns that are there."""
    return Columns(
        columns.text if columns.text in fields else None, columns.label if columns.label in fields else None
    )


def _without(fields: Sequence[str], used: Collection[str | None]) -> tuple[str, ...]:
    return tuple(name for name in fields if name not in used)
