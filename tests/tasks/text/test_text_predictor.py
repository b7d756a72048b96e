"""predict for texts: the answers are those of the evaluation, whichever way a text comes in."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from text_files import write_lines
from text_runs import LINES, PROMPTED, SETTINGS, write_data

import vimtune
from vimtune import cli
from vimtune.language import create_language_model, load_tokenizer
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.tasks import TASKS
from vimtune.tasks.text.predictor import ChoicePredictor, CompletionPredictor

ANSWERS = ("answerKey", "label", "answer")
"""Fields in which a line of one of the data sets has its answer."""
HEADS = [(name, "likelihood") for name, task in TASKS.items() if task.examples == "texts"]
HEADS += [("text", "classifier"), ("boolq", "classifier"), ("piqa", "classifier")]


def make_adapter(folder: Path, **values):
    """Write an adapter file with random values, as a run on these texts would; returns the job."""
    recipe = Recipe(**{**SETTINGS, "output_dir": str(folder), **values})
    job = recipe.task.open(recipe, Processes())
    torch.manual_seed(1)
    for parameter in job.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(exist_ok=True)
    shared = {"recipe": recipe.to_share()}
    vimtune.save_adapter(job.model, folder / "adapter.safetensors", extra=shared, **job.saved_with_adapter)
    recipe.save(folder / "recipe.yaml")
    return job


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """The folder of a run that says of which class a text is."""
    folder = tmp_path_factory.mktemp("labelled")
    data = write_data("text", folder / "data")
    make_adapter(folder / "run", task="text", head="classifier", data_dir=str(data))
    return folder / "run"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> Path:
    """The folder of a run that completes prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    file = write_lines(folder / "train.jsonl", [PROMPTED] * 4)
    make_adapter(folder / "run", task="text", train_file=str(file))
    return folder / "run"


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def error(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(("task", "head"), HEADS)
def test_choices_are_those_of_the_evaluation(task, head, tmp_path):
    data = write_data(task, tmp_path / "data")
    job = make_adapter(tmp_path / "run", task=task, head=head, data_dir=str(data))
    tally = job.start_tally(job.final)
    with torch.no_grad():
        for batch in job.final:
            tally.add(job.model.eval(), batch.tensors)
    predictor = vimtune.load_predictor(tmp_path / "run", device="cpu")
    assert isinstance(predictor, ChoicePredictor)
    unanswered = [{key: line[key] for key in line if key not in ANSWERS} for line in LINES[task]]
    for lines in (LINES[task], unanswered):
        found = list(predictor.predict(lines, top_k=9, batch_size=1))
        for judged, choice in zip(tally.judged(), found, strict=True):
            assert choice.indices[0] == judged.predicted
            expected = torch.tensor(judged.log_likelihoods, dtype=torch.float64).softmax(0)
            probabilities = torch.zeros_like(expected)
            probabilities[choice.indices] = torch.tensor(choice.probabilities, dtype=torch.float64)
            torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)
    (warm, *_) = predictor.predict(LINES[task], top_k=9, temperature=2)
    expected = torch.tensor(found[0].probabilities).log().div(2).softmax(0)
    torch.testing.assert_close(torch.tensor(warm.probabilities), expected, rtol=1e-4, atol=1e-6)
    together = list(predictor.predict(LINES[task]))
    assert [one.classes for one in together] == [one.classes[:3] for one in found]


def test_texts_come_from_arguments_files_and_standard_input(labelled, tmp_path, monkeypatch, capsys):
    texts = ["warm and bright", 'cold, "wet"\nand dark', "=1+1"]
    jsonl = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    table = tmp_path / "texts.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["number", "text"], *enumerate(texts)])
    one_line = texts[0::2]
    stream = SimpleNamespace(buffer=io.BytesIO("\n\n".join(one_line).encode()))
    ways = [texts, [jsonl], [table], ["-"]]
    records = []
    for number, arguments in enumerate(ways):
        output = tmp_path / f"{number}.json"
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", stream)
            assert predict(*arguments, "--adapter", labelled, "-o", output, "--top-k", 1) == 0
        records.append(json.loads(output.read_text()))
    assert [record["text"] for record in records[0]] == texts
    assert records[0] == records[1] == records[2]
    assert [record["text"] for record in records[3]] == one_line
    assert {record["predictions"][0]["class"] for record in records[0]} <= {"summer", "winter"}
    output = tmp_path / "classes.csv"
    capsys.readouterr()
    assert predict(jsonl, "--adapter", labelled, "-o", output) == 0
    assert "summer" in capsys.readouterr().out
    header, *rows = csv.reader(output.open(newline=""))
    assert header == ["text", "class1", "probability1", "class2", "probability2"]
    assert [row[0] for row in rows] == [*texts[:2], "'=1+1"]


def test_completions_are_what_the_model_generates(prompted, tmp_path):
    predictor = vimtune.load_predictor(prompted, device="cpu")
    assert isinstance(predictor, CompletionPredictor)
    model = create_language_model("mamba_tiny", hidden_size=32)
    model.load_state_dict(vimtune.merge(vimtune.load_predictor(prompted, device="cpu").model).state_dict())
    tokenizer = load_tokenizer("mamba_tiny")
    prompts = ["Two and two is", "Ä", "a much longer prompt than the others are"]
    found = list(predictor.predict(prompts, max_new_tokens=5))
    for prompt, completion in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert completion.input == prompt and completion.completion == tokenizer.decode(written)
        assert not completion.ended
    output = tmp_path / "completions.json"
    assert predict(*prompts, "--adapter", prompted, "--max-new-tokens", 5, "-o", output) == 0
    records = json.loads(output.read_text())
    assert [record["completion"] for record in records] == [one.completion for one in found]
    assert list(records[0]) == ["prompt", "completion", "ended"]
    with pytest.raises(ValueError, match="temperature = 2: a completion takes the likeliest token"):
        predictor.predict(prompts, temperature=2)


class Writes:
    """Generates certain tokens."""

    def __init__(self, *texts: str) -> None:
        tokens = load_tokenizer("mamba_tiny")(list(texts)).input_ids
        self.tokens = torch.tensor([each + [256] * (9 - len(each)) for each in tokens])

    def generate(self, input_ids, attention_mask, **options):
        self.asked = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, self.tokens], dim=1)


def test_blanks_after_a_prompt_are_written_by_the_model_and_not_shown_twice(prompted):
    predictor = vimtune.load_predictor(prompted, device="cpu")
    predictor.model = Writes(" four", " five", "six", "nine tokn")
    found = list(predictor.predict(["2 + 2 = ", "2 + 3 =", {"prompt": " "}, "x"]))
    assert [one.completion for one in found] == ["four", " five", "six", "nine tokn"]
    assert [one.ended for one in found] == [True, True, True, False]
    tokens = load_tokenizer("mamba_tiny")
    assert predictor.model.asked == [tokens(text).input_ids for text in ("2 + 2 =", "2 + 3 =")] + [
        [256],
        tokens("x").input_ids,
    ]


def test_classes_of_a_model_without_a_head_are_known(tmp_path):
    data = write_data("text", tmp_path / "data")
    make_adapter(tmp_path / "run", task="text", data_dir=str(data))
    (found,) = vimtune.load_predictor(tmp_path / "run", device="cpu").predict(["warm"])
    assert set(found.classes) == {"summer", "winter"}


def test_what_was_cut_is_said(tmp_path, caplog):
    data = write_data("text", tmp_path / "data")
    make_adapter(tmp_path / "run", task="text", head="classifier", data_dir=str(data), max_length=8)
    assert predict("much longer than that", "short", "--adapter", tmp_path / "run") == 0
    assert "beginnings of 1 sequence cut off, which had more than 8 tokens" in caplog.text


def test_long_texts_are_no_names_of_files(labelled, tmp_path):
    output = tmp_path / "classes.csv"
    output.write_text("before")
    assert predict("long " * 500, "--adapter", labelled, "-o", output) == 0
    assert output.read_text().startswith("text,class1")


def test_a_file_that_is_passed_on_does_not_say_where_its_model_was(tmp_path, capsys):
    base = tmp_path / "secret" / "base"
    create_language_model("mamba_tiny").save_pretrained(base)
    load_tokenizer("mamba_tiny").save_pretrained(base)
    file = write_lines(tmp_path / "train.jsonl", [PROMPTED] * 4)
    make_adapter(tmp_path / "run", task="text", train_file=str(file), model=str(base))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "run" / "adapter.safetensors").read_bytes())
    assert b"secret" not in alone.read_bytes()
    assert predict("x", "--adapter", tmp_path / "run", "--max-new-tokens", 1) == 0
    assert predict("x", "--adapter", alone) == 2
    assert "model = 'base': expected one of" in error(capsys)
    assert predict("x", "--adapter", alone, "--model", base, "--max-new-tokens", 1) == 0
    elsewhere = ("--model", "mamba_tiny", "--checkpoint", base, "--max-new-tokens", 1)
    assert predict("x", "--adapter", alone, *elsewhere) == 0


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["none.jsonl"], "cannot read none.jsonl: No such file"),
        (["{folder}"], "expected a file whose name ends in .jsonl, .json, .csv, .tsv"),
        (["{lines}"], "lines.jsonl, line 2 does not have the expected form: text"),
        (["{table}"], "table.csv, line 3 has 1 cells: expected 2"),
        ([" "], "expected a text that is not empty"),
        (["x", "--top-k", "0"], "top_k = '0': expected a whole number >= 1"),
        (["x", "--on-corrupt", "skip"], "on_corrupt = 'skip' is not a field of predictions of task 'text'"),
        (["x", "--model", "mamba2_tiny"], "adapter"),
        (["x", "--model", "nothing"], "model = 'nothing': expected one of"),
        (["{lines}", "-o", "{lines}"], "expected a name ending in .csv or .json"),
        (["{table}", "-o", "{table}"], "it is read as input"),
    ],
)
def test_mistakes_are_one_line(inputs, expected, labelled, tmp_path, capsys):
    places = {"folder": tmp_path, "lines": tmp_path / "lines.jsonl", "table": tmp_path / "table.csv"}
    write_lines(places["lines"], [{"text": "right"}, {"txt": "wrong"}])
    places["table"].write_text("text,more\na,b\nc\n")
    before = places["table"].read_text()
    assert predict(*(each.format(**places) for each in inputs), "--adapter", labelled) == 2
    assert expected in error(capsys) and places["table"].read_text() == before


def test_a_question_needs_its_choices(tmp_path, capsys):
    data = write_data("arc_easy", tmp_path / "data")
    make_adapter(tmp_path / "run", task="arc_easy", data_dir=str(data))
    assert predict("What is hot?", "--adapter", tmp_path / "run") == 2
    assert "ARC-Easy has questions with choices: give a file of them" in error(capsys)
    assert predict('{"question": "What is hot?"}', "--adapter", tmp_path / "run") == 2
    assert "input 1 does not have the expected form: choices" in error(capsys)
    assert predict('{"question": "?", "choices": {"text": ["a", "b"]}}', "--adapter", tmp_path / "run") == 2
    assert "choices.label" in error(capsys)


@pytest.mark.parametrize("value", [0, True, "3"], ids=repr)
@pytest.mark.parametrize("name", ["top_k", "batch_size", "max_new_tokens"])
def test_counts_of_texts_are_whole_numbers(labelled, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*whole number >= 1"):
        vimtune.load_predictor(labelled, device="cpu").predict(["x"], **{name: value})


def test_one_text_may_stand_alone_and_what_is_none_is_refused(labelled):
    predictor = vimtune.load_predictor(labelled, device="cpu")
    assert list(predictor.predict("cold")) == list(predictor.predict(["cold"]))
    assert list(predictor.predict({"text": "cold"})) == list(predictor.predict([{"text": "cold"}]))
    for wrong, told in (
        (None, "inputs = None: expected texts"),
        ([b"cold"], r"inputs\[0\] = b'cold': expected"),
    ):
        with pytest.raises(ValueError, match=told):
            predictor.predict(wrong)


def test_outputs_that_are_not_finite_are_an_error_naming_the_text(labelled):
    predictor = vimtune.load_predictor(labelled, device="cpu")
    predictor.model = lambda ids, attention_mask: torch.full((len(ids), 2), torch.nan)
    with pytest.raises(ValueError, match="outputs for 'cold' are not finite"):
        list(predictor.predict(["cold"]))
