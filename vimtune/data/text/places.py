"""Where the splits of a text data set come from: files of a folder, a named file, or the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vimtune.data.errors import DatasetError, MissingSplitError
from vimtune.data.text.columns import Meaning
from vimtune.data.text.examples import Example, TextSplit
from vimtune.data.text.lines import Line, read_lines
from vimtune.schema import parse_json
from vimtune.text import counted, name_some, printable, quote


@dataclass(frozen=True)
class HubPlace:
    """A data set on the Hugging Face hub."""

    path: str
    config: str | None
    splits: Mapping[str, str]
    """Names of its splits: ours -> the hub's."""


def _nothing_to_note(lines: list[Line]) -> str:
    return ""


def _complete_already(path: Path, lines: list[Line]) -> list[Line]:
    return lines


def _answered_already(line: Line) -> Line:
    return line


def _no_classes(lines: Sequence[Line]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How the files of one data set look."""

    name: str
    read: Callable[[Line], Example]
    """The example of a line; raises a `DatasetError` that names line and field."""
    files: Mapping[str, tuple[str, ...]]
    """Names that the file of a split may have in the data folder, those to prefer first."""
    hub: HubPlace | None = None
    per_character: bool = True
    """Whether likelihoods per character (acc_norm) are compared as well."""
    classes: tuple[str, ...] = ()
    """The choices of every example, where they are always the same."""
    find_classes: Callable[[Sequence[Line]], tuple[str, ...]] = _no_classes
    """The same where the training file says which they are."""
    read_labelled: Callable[[Line, Sequence[str]], Example] | None = None
    """The example of a line of a data set that has such classes."""
    with_answer: Callable[[Line], Line] = _answered_already
    """The line with any answer where it has none: who asks for answers does not have them."""
    prompt: Callable[[Line], str] | None = None
    """The prompt of a line that is to be completed; None where lines are questions with choices, which a text
    alone cannot be."""
    complete: Callable[[Path, list[Line]], list[Line]] = _complete_already
    """Adds to the lines of a file what stands in another file beside it."""
    note: Callable[[list[Line]], str] = _nothing_to_note
    """What a user has to know about these lines; empty if nothing."""
    understand: Callable[[Sequence[Line], bool], Meaning] | None = None
    """Which columns of a file mean what, where users name them. It is told whether the answers are needed."""

    def entry(self, place: str, text: str) -> Line:
        """The line for which a text stands that a user gives without a file.

        Args:
            place: what the text is called in messages.
            text: a plain text or, where lines are questions, a line as files have it.

        Raises:
            DatasetError: a question is asked for, and the text is no JSON.
        """
        if self.prompt is not None:
            return Line(place, {"text": text})
        try:
            return Line(place, parse_json(text, place, DatasetError))
        except DatasetError as error:
            raise DatasetError(
                f"{error}; {self.name} has questions with choices: give a file of them, or the JSON of one"
            ) from None

    def ask_about(self, lines: Sequence[Line]) -> list[Line]:
        """The lines of one file about which a user asks, with the fields that `asked` looks for.

        Raises:
            DatasetError: the file has no column of texts.
        """
        if self.understand is None:
            return list(lines)
        meaning = self.understand(lines, False)
        return [meaning.arranged(line) for line in lines]

    def is_completed(self, classes: Sequence[str]) -> bool:
        """Whether a model with these classes is asked for completions, not for one of several choices."""
        return self.prompt is not None and not classes

    def asked(self, lines: Sequence[Line], classes: Sequence[str]) -> list[str] | list[Example]:
        """The prompts or the questions of a user's entries, for a model with these classes.

        Raises:
            DatasetError: a line that is wrong.
        """
        if self.is_completed(classes):
            assert self.prompt is not None
            return list(map(self.prompt, lines))
        return [self.question(line, classes) for line in lines]

    def question(self, line: Line, classes: Sequence[str]) -> Example:
        """The example of a line whose answer is asked for; if it has one, that is not believed.

        Args:
            line: the entry.
            classes: those of the model.

        Raises:
            DatasetError: a line that is wrong.
        """
        if self.read_labelled is not None and classes:
            return self.read_labelled(line.with_field("label", classes[0]), classes)
        return self.read(self.with_answer(line))

    def split(
        self, name: str, lines: list[Line], source: str, classes: Sequence[str] | None = None
    ) -> TextSplit:
        """The examples of `lines`.

        Args:
            name: of the split.
            lines: its entries.
            source: where they come from.
            classes: those of the training split, which only data sets with `read_labelled` have; None if this
                is the training split.

        Raises:
            DatasetError: a line that is wrong.
        """
        meaning = None if self.understand is None else self.understand(lines, True)
        if meaning is not None:
            lines = [meaning.arranged(line) for line in lines]
        by_class = self.read_labelled
        known: tuple[str, ...] = ()
        if by_class is not None:
            known = tuple(self.find_classes(lines) if classes is None else classes)
        if by_class is not None and known:
            examples = tuple(by_class(line, known) for line in lines)
        else:
            examples = tuple(map(self.read, lines))
        read = "" if meaning is None else f" ({meaning.note(known)})"
        shown = [f"{self.name}, {source}{read}, {counted(len(examples), 'examples')}", self.note(lines)]
        return TextSplit(name, examples, "; ".join(filter(None, shown)), known or self.classes)


def open_text(
    form: TextFormat,
    split: str,
    *,
    folder: str | Path | None = None,
    file: str | Path | None = None,
    download: bool = True,
    classes: Sequence[str] | None = None,
) -> TextSplit:
    """Open a split of a data set.

    Args:
        form: which data set.
        split: "train", "test", whose scores are published, or "val", which only a user's own data have.
        folder: has the files under their official names.
        file: has the split itself, whatever its name is.
        download: without folder and file, take the hub's copy.
        classes: those of the training split, for another split.

    Raises:
        MissingSplitError: there is no file of this split.
        DatasetError: a file that cannot be read, or a line that is wrong.
    """
    if file is not None:
        found, unused = Path(file), ""
    elif folder is not None:
        found, *others = _find(form, split, Path(folder))
        unused = f" (not used: {', '.join(other.name for other in others)} beside it)" if others else ""
    else:
        return form.split(split, *_from_hub(form, split, download), classes=classes)
    lines = form.complete(found, read_lines(found))
    return form.split(split, lines, printable(str(found)) + unused, classes)


def _find(form: TextFormat, split: str, folder: Path) -> list[Path]:
    """The files of a split in a folder, of which the first is the one to use."""
    if found := [folder / name for name in form.files[split] if (folder / name).is_file()]:
        return found
    selecting = [name for name in form.files.get("val", ()) if split == "test" and (folder / name).is_file()]
    hint = f"; {name_some(selecting)} selects the best epoch, and is scored if it is given as test_file"
    raise MissingSplitError(
        f"{form.name}: {printable(str(folder))} has no file of the split {split!r}: expected "
        f"{' or '.join(form.files[split])}, or the file itself as {split}_file{hint if selecting else ''}"
    )


def _from_hub(form: TextFormat, split: str, download: bool) -> tuple[list[Line], str]:
    """The lines of a split on the hub, and what to call their source."""
    files = f"give a folder with {' or '.join(form.files[split])} as data_dir, or a file as {split}_file"
    if form.hub is None or not download:
        why = "it is on no hub" if form.hub is None else "nothing is to be downloaded"
        raise MissingSplitError(f"{form.name}: no file of the split {split!r}, and {why}: {files}")
    if importlib.util.find_spec("datasets") is None:
        raise DatasetError(
            f"{form.name}: to take {quote(form.hub.path)} from the hub, install datasets (pip install "
            f"datasets); or {files}"
        )
    from datasets import load_dataset

    place = f"{form.hub.path} {form.hub.config or ''}".strip()
    try:
        rows = load_dataset(form.hub.path, form.hub.config, split=form.hub.splits[split])
    except Exception as error:  # the hub's client has many of its own, and of the libraries below it
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise DatasetError(f"{form.name}: cannot take {place} from the hub ({reason}); {files}") from error
    name = f"{place}, {form.hub.splits[split]}"
    return [Line(f"{name}, row {index}", dict(row)) for index, row in enumerate(rows)], f"{name} of the hub"
