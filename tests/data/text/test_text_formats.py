"""Files of the language tasks: what their lines become, and what is said of a line that is wrong."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys

import pytest
from text_files import ARC, BOOL, GOAL, SCENE, SENTENCE, write_lines

from vimtune.data import DatasetError, MissingSplitError
from vimtune.data.text import (
    ARC_CHALLENGE,
    ARC_EASY,
    BOOLQ,
    HELLASWAG,
    OWN,
    PIQA,
    WINOGRANDE,
    open_text,
    split_off,
)

LINES = {
    "arc": (ARC_EASY, ARC),
    "hellaswag": (HELLASWAG, SCENE),
    "winogrande": (WINOGRANDE, SENTENCE),
    "piqa": (PIQA, GOAL),
    "boolq": (BOOLQ, BOOL),
    "prompt": (OWN, {"prompt": "Two and two is", "completion": " four"}),
}
"""A format and a right line of it, without anything that is not needed."""


def read(form, path, **options):
    return open_text(form, "test", file=path, **options)


@pytest.mark.parametrize("name", LINES)
def test_what_a_line_stands_for(name, tmp_path):
    form, line = LINES[name]
    split = read(form, write_lines(tmp_path / "a.jsonl", [line, {**line, "more": [1]}]))
    first, second = split.examples
    assert first == second and "2 examples" in split.source and "a.jsonl" in split.source
    counts = {len(first.contexts), len(first.continuations), len(first.choices)}
    assert len(counts) == 1 and 0 <= first.answer < counts.pop()


def test_contexts_continuations_and_training_texts(tmp_path):
    def only(form, line):
        return read(form, write_lines(tmp_path / "a.jsonl", [line])).examples[0]

    arc = only(ARC_EASY, ARC)
    assert arc.contexts == ("Question: What is hot?\nAnswer:",) * 3
    assert arc.continuations == (" ice", " fire", " snow") and arc.answer == 1
    assert arc.prompt + arc.completion == "Question: What is hot?\nAnswer: fire"
    scene = only(HELLASWAG, SCENE)
    assert scene.contexts[0] == "Roof work: A man climbs. Oh. The tall man"  # Tall becomes tall
    assert scene.choices == ("sits down.", " flies.")  # the blank after the mark stays
    assert scene.continuations[1] == "  flies."
    assert scene.prompt + scene.completion == (
        "Context: Roof work A man climbs. Oh. the Tall man\nAnswer:  flies."
    )
    sentence = only(WINOGRANDE, SENTENCE)
    assert sentence.contexts == ("Ann saw Eva because Ann", "Ann saw Eva because Eva")
    assert sentence.continuations == (" was near.",) * 2
    assert sentence.prompt + sentence.completion == "Sentence: Ann saw Eva because Eva was near."
    assert sentence.completion == "Eva was near."
    assert only(PIQA, GOAL).contexts[0] == "Question: open a door\nAnswer:"
    bool_example = only(BOOLQ, BOOL)
    assert bool_example.contexts[0] == "Ice is cold.\nQuestion: is ice cold?\nAnswer:"
    assert bool_example.continuations == (" no", " yes") and bool_example.completion == " yes"


WRONG = [
    ("arc", {"question": ...}, "question", "Field required"),
    ("arc", {"answerKey": "E"}, "answerKey", "expected one of the labels A, B, C"),
    ("arc", {"answerKey": 1}, "answerKey", "valid string"),
    ("arc", {"choices": {"text": ["a", "b"], "label": ["B", "B"]}}, "label", "each label once (found 'B'"),
    ("arc", {"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "choices.text.1", "not empty"),
    ("arc", {"choices": {"text": ["a"], "label": ["A"]}}, "choices.text", "at least 2 items"),
    ("arc", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "choices", "as many labels as texts"),
    ("hellaswag", {"ctx_a": ...}, "ctx_a", "Field required"),
    ("hellaswag", {"endings": ["a", " "]}, "endings.1", "not empty"),
    ("hellaswag", {"label": 2}, "label", "0 to 1"),
    ("hellaswag", {"label": ""}, "label", "use the validation file"),
    ("hellaswag", {"label": None}, "label", "label: Input should be a valid integer or a valid string (f"),
    ("winogrande", {"sentence": "no gap"}, "sentence", "expected a gap"),
    ("winogrande", {"answer": ...}, "answer", "use dev"),
    ("winogrande", {"option1": "\t"}, "option1", "not empty"),
    ("piqa", {"label": 2}, "label", "less than or equal to 1"),
    ("piqa", {"label": ...}, "label", "Field required"),
    ("boolq", {"label": -1}, "label", "expected true, false, 1 or 0"),
    ("boolq", {"passage": None}, "passage", "valid string"),
    (
        "boolq",
        {"label": "x"},
        "label",
        "label: Input should be a valid boolean or a valid integer (found 'x'",
    ),
    ("prompt", {"completion": ""}, "completion", "not empty"),
    ("prompt", {"prompt": 3}, "prompt", "valid string"),
]


@pytest.mark.parametrize(("name", "change", "field", "expected"), WRONG)
def test_a_wrong_line_is_named_with_file_line_and_field(name, change, field, expected, tmp_path):
    form, line = LINES[name]
    wrong = {**copy.deepcopy(line), **change}
    wrong = {key: value for key, value in wrong.items() if value is not ...}
    path = write_lines(tmp_path / "a.jsonl", [line, wrong])
    with pytest.raises(DatasetError) as caught:
        read(form, path)
    message = str(caught.value)
    assert f"{path}, line 2" in message and f"{field}: " in message and expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty: expected one example per line"),
        (b"\n\n", "is empty"),
        (b'{"completion": "a"}\n{"completion": \n', r"line 2 is not valid JSON: .* \(column 16\)$"),
        (b'{"completion": ' + b"9" * 5000 + b"}", "line 1 .* a whole number has more than 4,300 digits$"),
        (b'{"completion": "a"}\n[1]\n', "line 2"),
        (b'{"completion": NaN}', "NaN is not allowed"),
        (b'{"completion": "a", "completion": "b"}', "given twice"),
        (b'{"completion": "a"}\n\xff\xfe', "line 2 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_json_lines(content, expected, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=expected) as caught:
        read(OWN, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,completion\na\n", r"line 2 has 1 cells: expected 2"),
        ("prompt,prompt\na,b\n", "line 1: the header names a column twice"),
        ("prompt,completion\na,\n", r"line 2 .*completion: expected a text that is not empty"),
        ('prompt,completion\n"a,b\n', "line 2 is not CSV"),
        ("prompt,completion\ra,b\r", "line 1: lines end with carriage returns"),
        ("prompt,completion\n", "is empty"),
        ("prompt\na\n", r"line 2 .*completion: Field required"),
    ],
)
def test_a_csv_that_is_wrong(content, expected, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    with pytest.raises(DatasetError, match=expected):
        read(OWN, path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_and_json_lines_say_the_same(delimiter, tmp_path):
    rows = [{"text": 'good, "very"\ngood', "label": "yes"}, {"text": "bad", "label": "no"}]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    by_csv = open_text(OWN, "train", file=tmp_path / "a.csv")
    by_json = open_text(OWN, "train", file=write_lines(tmp_path / "a.jsonl", rows))
    assert by_csv.examples == by_json.examples and by_csv.classes == ("no", "yes")
    assert by_csv.fingerprint() == by_json.fingerprint()
    assert [example.answer for example in by_csv.examples] == [1, 0]
    assert by_csv.examples[0].continuations == (" no", " yes")


def test_tabs_alone_stand_between_the_cells_of_tsv(tmp_path):
    """Not the commas of a text, also where the header has more of them."""
    (tmp_path / "train.tsv").write_text("text\tlabel\tnot, read, here\nbad, worse\tno\t\ngood\tyes\t\n")
    found = open_text(OWN, "train", folder=tmp_path)
    assert found.classes == ("no", "yes") and found.examples[0].prompt == "bad, worse"
    (tmp_path / "plain.tsv").write_text("text\none, two\n")
    assert open_text(OWN, "test", file=tmp_path / "plain.tsv").examples[0].completion == "one, two"
    (tmp_path / "broken.TSV").write_text('text\tlabel\n"a\tb')
    with pytest.raises(DatasetError, match="line 2 is not TSV"):
        read(OWN, tmp_path / "broken.TSV")
    with pytest.raises(DatasetError, match=r"ends in .jsonl, .json, .csv, .tsv$"):
        read(OWN, tmp_path / "texts.xlsx")


def test_labels_are_those_of_the_training_file(tmp_path):
    def write(*labels):
        return write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels])

    train = open_text(OWN, "train", file=write(2, 10, "b"))
    assert train.classes == ("10", "2", "b")
    test = open_text(OWN, "test", file=write(10), classes=train.classes)
    assert test.classes == train.classes and test.examples[0].answer == 0
    with pytest.raises(DatasetError, match=r"line 1: label: expected one of .*'10', '2', 'b'.*\(found 'c'\)"):
        open_text(OWN, "test", file=write("c"), classes=train.classes)
    with pytest.raises(DatasetError, match="two labels at least"):
        open_text(OWN, "train", file=write("c", "c"))


def test_plain_texts_are_learnt_as_a_whole(tmp_path):
    (example,) = open_text(OWN, "train", file=write_lines(tmp_path / "a.jsonl", [{"text": "x y"}])).examples
    assert (example.prompt, example.completion) == ("", "x y")


def test_other_forms_of_the_official_files(tmp_path):
    stem = {
        "stem": "What is hot?",
        "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
    }
    original = read(ARC_CHALLENGE, write_lines(tmp_path / "a.jsonl", [{"question": stem, "answerKey": "2"}]))
    assert original.examples[0].choices == ("ice", "fire") and original.examples[0].answer == 1
    first = {"passage": "Ice is cold.", "question": "is ice cold", "answer": True}
    assert read(BOOLQ, write_lines(tmp_path / "b.jsonl", [first])).examples[0].answer == 1
    goal = {key: value for key, value in GOAL.items() if key != "label"}
    path = write_lines(tmp_path / "valid.jsonl", [goal, goal])
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    assert [example.answer for example in read(PIQA, path).examples] == [0, 1]
    for labels, expected in {"0\n": "has 1 labels: expected 2", "0\n2\n": r"line 2: expected 0 or 1"}.items():
        (tmp_path / "valid-labels.lst").write_text(labels)
        with pytest.raises(DatasetError, match=expected):
            read(PIQA, path)


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ("A man sits. he", "A man sits. He"),
        ("A man sits. Then he stands up.", "A man sits. Then he stands up."),
        ("a man", " A man"),
    ],
)
def test_joined_scenes_are_taken_apart_and_the_source_says_so(text, context, tmp_path):
    line = {"activity_label": "Sit", "ctx": text, "endings": ["a", "b"], "label": 0}
    split = read(HELLASWAG, write_lines(tmp_path / "a.jsonl", [line]))
    assert split.examples[0].contexts[0].split() == f"Sit: {context}".split()
    assert "rebuilt from ctx" in split.source
    official = read(HELLASWAG, write_lines(tmp_path / "b.jsonl", [SCENE]))
    assert "rebuilt" not in official.source and "endings" not in official.source


def test_endings_of_which_nothing_is_left_are_counted(tmp_path):
    lines = [SCENE, {**SCENE, "endings": ["a", "[step] "]}, {**SCENE, "endings": ["[a]", "[b] [c]"]}]
    split = read(HELLASWAG, write_lines(tmp_path / "a.jsonl", lines))
    assert "3 endings are marks in square brackets alone" in split.source


def test_files_are_found_by_their_official_names(tmp_path):
    with pytest.raises(MissingSplitError, match=r"no file of the split 'train': expected train_xl\.jsonl or"):
        open_text(WINOGRANDE, "train", folder=tmp_path)
    write_lines(tmp_path / "train_s.jsonl", [SENTENCE])
    write_lines(tmp_path / "train_m.jsonl", [SENTENCE, SENTENCE])
    split = open_text(WINOGRANDE, "train", folder=tmp_path)
    assert len(split.examples) == 2 and "train_m.jsonl (not used: train_s.jsonl beside it)" in split.source


def test_a_file_of_ones_own_that_is_not_used_is_named(tmp_path):
    write_lines(tmp_path / "test.jsonl", [{"text": "a b"}])
    (tmp_path / "test.csv").write_text("text\na b\n")
    assert "test.jsonl (not used: test.csv beside it)" in open_text(OWN, "test", folder=tmp_path).source
    (tmp_path / "test.jsonl").unlink()
    assert "not used" not in open_text(OWN, "test", folder=tmp_path).source


@pytest.mark.parametrize("name", ["val.csv", "valid.tsv", "validation.jsonl", "dev.csv"])
def test_an_own_validation_file_is_no_test_file(name, tmp_path):
    """Those of official data sets are, because the answers of their test files are not public."""
    (tmp_path / name).write_text('{"text": "a"}\n' if name.endswith("jsonl") else "text\na\n")
    assert open_text(OWN, "val", folder=tmp_path).examples[0].completion == "a"
    with pytest.raises(MissingSplitError, match=rf"'{name}' selects the best epoch, and is scored if it is"):
        open_text(OWN, "test", folder=tmp_path)
    write_lines(tmp_path / "val.jsonl", [SCENE])
    assert open_text(HELLASWAG, "test", folder=tmp_path).name == "test"


def test_a_cell_that_is_too_long_for_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a" * 140_000 + "\n")
    with pytest.raises(DatasetError, match=r"a\.csv, line 2 has a cell of more than 131,072 .*JSON Lines"):
        read(OWN, path)


def test_without_files_the_hub_is_asked_or_the_files_are_named(monkeypatch):
    with pytest.raises(MissingSplitError, match=r"nothing is to be downloaded: give a .*data_dir"):
        open_text(ARC_EASY, "train", download=False)
    with pytest.raises(MissingSplitError, match=r"it is on no hub: give a folder with train\.jsonl"):
        open_text(OWN, "train")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r"install datasets \(pip install datasets\)"):
        open_text(ARC_EASY, "train")


def test_the_hub_gives_rows_and_its_errors_become_one_line(monkeypatch):
    class Hub:
        answer: object = None

        @staticmethod
        def load_dataset(path, name, split):
            if isinstance(Hub.answer, Exception):
                raise Hub.answer
            assert (path, name, split) == ("allenai/ai2_arc", "ARC-Easy", "test")
            return Hub.answer

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    Hub.answer = [ARC, {**ARC, "answerKey": "Z"}]
    with pytest.raises(DatasetError, match=r"allenai/ai2_arc ARC-Easy, test, row 1 .*answerKey"):
        open_text(ARC_EASY, "test")
    Hub.answer = [ARC]
    assert "of the hub" in open_text(ARC_EASY, "test").source
    Hub.answer = ConnectionError("no network\nmore")
    with pytest.raises(
        DatasetError, match=r"cannot take allenai/ai2_arc ARC-Easy from the hub \(no network\)"
    ):
        open_text(ARC_EASY, "test")


def test_a_folder_or_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    for name, expected in {
        "a.jsonl": "no regular file|not a regular",
        "b.jsonl": "No such file",
        "c.txt": "name ends in",
    }.items():
        with pytest.raises(DatasetError, match=expected):
            read(OWN, tmp_path / name)


@pytest.mark.parametrize(
    ("number", "share", "count"), [(2, 0.5, 1), (10, 0.2, 2), (10, 0.001, 1), (3, 0.999, 2)]
)
def test_the_part_for_selection_is_drawn_by_seed(number, share, count, tmp_path):
    lines = [{"completion": f"text {index}"} for index in range(number)]
    whole = open_text(OWN, "train", file=write_lines(tmp_path / "a.jsonl", lines))
    train, val = split_off(whole, share, seed=3)
    assert (train.name, val.name) == ("train", "val") and len(val.examples) == count
    assert sorted([*train.examples, *val.examples], key=repr) == sorted(whole.examples, key=repr)
    assert split_off(whole, share, seed=3) == (train, val)
    if number == 10 and count == 2:
        assert any(split_off(whole, share, seed=seed)[1] != val for seed in range(4, 9))
    with pytest.raises(ValueError, match="two examples at least"):
        split_off(open_text(OWN, "train", file=write_lines(tmp_path / "b.jsonl", lines[:1])), share, seed=0)


def test_lists_read_no_files_and_import_neither_torch_nor_pydantic():
    heavy = ("torch", "pydantic", "datasets")
    code = f"import sys, vimtune.data.text; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
