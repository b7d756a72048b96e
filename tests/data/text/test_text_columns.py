"""Columns of a user's own texts: found by usual names or named, said in the source, and none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_files import write_lines

from vimtune.data import DatasetError
from vimtune.data.columns import LABELS
from vimtune.data.text import OWN, Line, TextFormat, TextSplit, open_text, own_texts, read_asked
from vimtune.data.text.columns import TEXTS


def table(path: Path, header: str, *rows: str) -> Path:
    """Write a table."""
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def opened(path: Path, form: TextFormat = OWN, **options: object) -> TextSplit:
    """A training file, unless it is given classes."""
    return open_text(form, "train", file=path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [
        ("text,label", "text", "label"),
        ("text,labels", "text", "labels"),
        ("text,category", "text", "category"),
        ("sentence,label", "sentence", "label"),
        ("sentence,sentiment", "sentence", "sentiment"),
        ("Review, Class", "Review", " Class"),
        ("content\ttarget", "content", "target"),
    ],
)
def test_usual_names_of_texts_and_labels(header: str, text: str, label: str, tmp_path: Path) -> None:
    sign = "\t" if "\t" in header else ","
    split = opened(table(tmp_path / "a.csv", header, f"warm{sign}good", f"cold{sign}bad"))
    assert split.classes == ("bad", "good") and [example.answer for example in split.examples] == [1, 0]
    assert split.source.endswith(f" (texts in column {text!r} with 2 labels in column {label!r}), 2 examples")
    lines = [{text: "warm", label: "good"}, {text: "cold", label: "bad"}]
    assert opened(write_lines(tmp_path / "a.jsonl", lines)).examples == split.examples


def test_every_usual_name_of_texts_and_labels_is_taken(tmp_path: Path) -> None:
    for name in TEXTS:
        assert opened(table(tmp_path / "a.csv", f"id,{name},label", "1,x,a", "2,y,b")).classes == ("a", "b")
    for name in LABELS:
        assert opened(table(tmp_path / "a.csv", f"id,text,{name}", "1,x,a", "2,y,b")).classes == ("a", "b")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("id,text,n", "plain texts in column 'text', no labels; columns not used: 'id', 'n'"),
        ("text,label,tags", "2 labels in column 'label'; columns not used: 'tags'"),
        ("prompt,text,n", "plain texts in column 'text', no labels; columns not used: 'prompt', 'n'"),
        ("prompt,completion,category", "prompts and completions; columns not used: 'category'"),
        ("prompt,completion,text", "prompts and completions; columns not used: 'text'"),
        ("text,completion,label", "2 labels in column 'label'; columns not used: 'completion'"),
    ],
)
def test_what_is_not_used_is_said(header: str, said: str, tmp_path: Path) -> None:
    assert f"{said}), 2 examples" in opened(table(tmp_path / "a.csv", header, "a,b,c", "d,e,f")).source


def test_prompts_and_texts_may_stand_in_one_file(tmp_path: Path) -> None:
    split = opened(write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"text": "c"}]))
    assert [example.completion for example in split.examples] == ["b", "c"]
    assert split.source.endswith("(prompts and completions), 2 examples")


def test_columns_that_the_user_names(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "text,label,remark,mood", "1,2,warm,good", "3,4,cold,bad")
    split = opened(path, own_texts("remark", "mood"))
    assert split.classes == ("bad", "good") and split.examples[0].prompt == "warm"
    assert split.source.endswith("columns not used: 'text', 'label'), 2 examples")
    assert opened(path, own_texts("label", None)).examples[0].prompt == ""  # It is no column of labels then.
    for names, expected in {
        ("remarks", None): r"text_column = 'remarks': .*a\.csv has 'text', 'label', 'remark', 'mood'",
        (None, "moods"): r"label_column = 'moods': .*a\.csv has 'text'",
        ("mood", "mood"): "text_column and label_column are both 'mood'",
    }.items():
        with pytest.raises(DatasetError, match=expected):
            opened(path, own_texts(*names))


def test_a_table_without_texts_names_what_it_has_and_what_is_expected(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "utterances,label", "x,a", "y,b")
    expected = (
        r"no column of texts: found 'utterances', 'label'. .*prompt and completion, or text \(or sentence"
    )
    with pytest.raises(DatasetError, match=expected + r".*label \(or labels, .*text_column=\.\.\."):
        opened(path)


def test_messages_name_the_column_of_the_file(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "sentence,mood", "warm,good", ",bad")
    with pytest.raises(
        DatasetError, match=r"line 3 \(text is column 'sentence', label is column 'mood'\) .*"
    ):
        opened(path, own_texts(None, "mood"))
    train = opened(table(tmp_path / "a.csv", "sentence,mood", "x,a", "y,b"), own_texts(None, "mood"))
    test = table(tmp_path / "b.csv", "text,category", "x,c")
    with pytest.raises(DatasetError, match=r"line 2 \(label is column 'category'\): label: expected one of"):
        opened(test, classes=train.classes)
    with pytest.raises(DatasetError, match=r"line 2 has no label, .*label, labels, .*label_column=\.\.\."):
        opened(table(tmp_path / "b.csv", "text,n", "x,1"), classes=train.classes)


def test_labels_beside_a_training_file_without_any_are_not_used(tmp_path: Path) -> None:
    split = opened(table(tmp_path / "a.csv", "text,label", "x,a"), classes=())
    assert "(plain texts in column 'text', no labels; columns not used: 'label')" in split.source


def test_who_asks_may_have_other_columns_than_the_run(tmp_path: Path) -> None:
    form = own_texts("remark", "mood")
    for header in ("id,remark,text", "id,sentence,n", "id,text,remarks"):
        (line,) = read_asked(form, [str(table(tmp_path / "a.csv", header, "1,warm,x"))])
        assert form.question(line, ("bad", "good")).prompt == "warm"
    (line,) = read_asked(form, ["warm"])
    assert form.question(line, ("bad", "good")).prompt == "warm"
    with pytest.raises(DatasetError, match="input 1 has no column of texts: found 'n'"):
        form.ask_about([Line("input 1", {"n": 1})])
    (line,) = form.ask_about([Line("input 1", {"prompt": "ask", "text": "not"})])
    assert form.asked([line], ()) == ["ask"]
