"""Language tasks from a recipe to a report, with small models and made-up texts."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from language_models import PlainScorer, train_tokenizer
from text_files import write_lines
from text_runs import LINES, PROMPTED, SETTINGS, write_data

import vimtune
from vimtune import cli
from vimtune.adapters import check_gradients, read_adapter_info
from vimtune.language import create_language_model, load_tokenizer
from vimtune.recipe import Recipe, RecipeError
from vimtune.runtime.distributed import Processes
from vimtune.tasks import TASKS
from vimtune.tasks.text.models import SequenceScorer
from vimtune.training import train

TEXT_TASKS = [name for name, task in TASKS.items() if task.examples == "texts"]


def recipe(task, tmp_path, **changes):
    folder = write_data(task, tmp_path / "data")
    values = {**SETTINGS, "task": task, "data_dir": str(folder), "output_dir": str(tmp_path / "run")}
    return Recipe(**{**values, **changes})


def open_job(recipe):
    return recipe.task.open(recipe, Processes())


@pytest.mark.parametrize(
    ("task", "head"),
    # One output for each of the named classes, of the fixed ones, and for each choice.
    [*((task, "likelihood") for task in TEXT_TASKS), *((t, "classifier") for t in ("text", "boolq", "piqa"))],
)
def test_every_task_gives_loss_gradients_and_scores(task, head, tmp_path):
    job = open_job(recipe(task, tmp_path, head=head))
    assert [loader.split for loader in job.loaders] == ["train", "val", "test"]
    assert [loader.num_examples for loader in job.loaders] == [9, 3, 2]
    batch = next(iter(job.train))
    for entry in job.model.parameters():
        if entry.requires_grad:  # off the start, where B = 0 hides the gradient of A
            torch.nn.init.normal_(entry, std=0.05)
    loss = job.loss(job.model, batch.tensors)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    loss.backward()
    check_gradients(job.model)
    tally = job.start_tally(job.final)
    with torch.no_grad():
        for batch in job.final:
            tally.add(job.model, batch.tensors)
    found = tally.evaluation()
    assert found.count == 2 and set(found.scores) == {score.name for score in TASKS.get(task).scores}
    assert found.scores["acc"] in (0, 50, 100) and found.loss > 0
    with_norm = head == "likelihood" and TASKS.get(task).form.per_character
    assert (found.scores["acc_norm"] is not None) == with_norm


@pytest.mark.parametrize("head", ["likelihood", "classifier"])
def test_the_model_without_an_adapter_is_that_of_a_run(head, tmp_path):
    data = write_data("text" if head == "classifier" else "arc_easy", tmp_path)
    recipe = Recipe(
        **SETTINGS, task="text" if head == "classifier" else "arc_easy", head=head, data_dir=str(data)
    )
    plain = recipe.task.open_base(recipe, Processes())
    adapted = recipe.task.open(recipe, Processes()).model
    vimtune.delete_adapter(adapted, "default")
    assert list(plain.state_dict()) == list(adapted.state_dict()) and not vimtune.list_adapters(plain)
    assert all(torch.equal(own, adapted.state_dict()[name]) for name, own in plain.state_dict().items())
    # Whether the texts are there can be asked without a model.
    recipe.task.check_data(recipe, Processes())
    gone = recipe.replace(data_dir=str(tmp_path / "gone"), download=False)
    with pytest.raises(ValueError, match="gone"):
        gone.task.check_data(gone, Processes())


def test_a_run_leaves_a_report_an_adapter_and_the_best_epoch_by_accuracy(tmp_path):
    report = train(recipe("arc_easy", tmp_path, epochs=2))
    assert report.task == "arc_easy" and report.num_examples == 2 and report.rate_unit == "tok"
    assert (report.split, report.selection_split) == ("test", "val")
    assert "of which 9 drawn" in report.data["train"] and "of which 3 drawn" in report.data["val"]
    best = max(report.history, key=lambda epoch: epoch["acc"])
    assert report.best_scores["acc"] == best["acc"]
    assert report.speed().endswith(" tok/s")
    assert set(report.versions) == {"vimtune", "python", "torch", "transformers", "tokenizers"}


def test_weights_of_a_file_in_bf16_are_trained_in_fp32(tmp_path):
    """An update of 1e-4 of a weight is lost in bf16. The adapter belongs to the file all the same."""
    plain = create_language_model("mamba_tiny", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "tokenizer": "mamba_tiny"}
    job = open_job(recipe("arc_easy", tmp_path, **settings))
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}
    train(recipe("arc_easy", tmp_path, **settings))
    model = create_language_model(str(tmp_path / "model"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    vimtune.load_adapter(model, tmp_path / "run" / "adapter.safetensors")


@pytest.mark.usefixtures("no_pictures")
def test_a_classifier_keeps_the_names_of_its_classes(tmp_path):
    report = train(recipe("text", tmp_path, head="classifier", pooling="mean", epochs=8, lr=1e-2))
    assert [name for name, _ in report.rows()][:2] == ["accuracy (test)", "loss (test)"]  # no other score
    assert read_adapter_info(tmp_path / "run" / "adapter.safetensors").classes == ["summer", "winter"]
    assert report.scores == {"acc": 100.0, "acc_norm": None} and report.rate_unit == "ex"


@pytest.mark.usefixtures("no_pictures")
def test_prompts_and_plain_texts_are_judged_by_their_loss(tmp_path):
    for name, line in {"prompted": PROMPTED, "plain": {"text": "x y z " * 30}}.items():
        path = write_lines(tmp_path / f"{name}.jsonl", [line] * 6)
        folder = tmp_path / name
        report = train(
            Recipe(
                task="text", train_file=str(path), output_dir=str(folder), **{**SETTINGS, "max_length": 64}
            )
        )
        assert report.scores == {"acc": None, "acc_norm": None} and report.split == "val"
        assert report.loss > 0 and "lost their beginning" not in report.data["train"]


def test_the_loss_is_that_of_the_answers_and_the_end_alone(tmp_path):
    job = open_job(recipe("arc_easy", tmp_path))
    batch = next(iter(job.train))
    labelled = batch.tensors["labels"] != -100
    assert batch.count == int(labelled.sum())
    tokenizer = load_tokenizer("mamba_tiny")
    rows = zip(batch.tensors["labels"], labelled, strict=True)
    answers = {tokenizer.decode(row[mask]) for row, mask in rows}
    assert answers <= {" fire<|endoftext|>", " snow<|endoftext|>"}


def test_the_scorer_is_the_language_model(tmp_path):
    model = create_language_model("mamba_tiny")
    job = open_job(recipe("arc_easy", tmp_path))
    for batch in job.final:
        chunked = SequenceScorer(model)(batch.tensors["input_ids"], batch.tensors["labels"])
        plain = PlainScorer(model)(batch.tensors["input_ids"], batch.tensors["labels"])
        assert torch.allclose(chunked, plain, atol=1e-4)
    names = {name for name, _ in SequenceScorer(model).named_parameters()}
    assert names <= {name for name, _ in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        ("arc_easy", {"model": "mamba_tinny"}, "Did you mean 'mamba_tiny'"),
        (
            "arc_easy",
            {"img_size": 64},
            r"img_size = 64 is an option of task classification and multilabel( and continuation)?",
        ),
        ("classification", {"max_length": 64}, "max_length = 64 is an option of task arc_easy"),
        ("arc_easy", {"head": "linear"}, "expected one of likelihood, classifier"),
        ("arc_easy", {"max_length": 3}, "max_length = 3: expected"),
        ("arc_easy", {"val_share": 0}, "val_share = 0: expected"),
        ("arc_easy", {"train_file": "there/is/none.jsonl"}, "none.jsonl' is not a file"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_opened(task, changes, expected):
    with pytest.raises(RecipeError, match=expected):
        built = Recipe.from_values({"task": task, **changes})
        built.check_paths()


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        ("hellaswag", {"data_dir": "empty"}, "no file of the split 'train'"),
        ("text", {"train_file": "prompted", "head": "classifier"}, "needs texts with a label"),
        ("arc_easy", {"tokenizer": "large"}, "a vocabulary of 264: give the tokenizer"),
        ("arc_easy", {"train_file": "one"}, "two examples at least"),
        ("arc_easy", {"train_file": "wrong"}, r"line 3 .*answerKey: expected one of the labels A, B, C"),
        ("arc_easy", {"peft": "linear"}, "would train nothing"),
        ("arc_easy", {"model": "nobody/nothing"}, "language model 'nobody/nothing' could not be downloaded"),
        ("arc_easy", {"checkpoint": "no.bin"}, r"no\.bin.*(not a file|does not exist)"),
    ],
)
def test_what_does_not_fit_is_one_line_and_no_folder_is_left(
    task, changes, expected, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = {
        "empty": tmp_path / "empty",
        "prompted": tmp_path / "prompted.jsonl",
        "one": tmp_path / "one.jsonl",
        "wrong": tmp_path / "wrong.jsonl",
        "large": tmp_path / "large",
    }
    files["empty"].mkdir()
    write_lines(files["prompted"], [PROMPTED] * 3)
    write_lines(files["one"], LINES["arc_easy"][:1])
    write_lines(files["wrong"], [*LINES["arc_easy"], {**LINES["arc_easy"][0], "answerKey": "Z"}])
    if changes.get("tokenizer"):
        train_tokenizer([str(list(range(500)))], size=330).save_pretrained(files["large"])
    changes = {key: str(files.get(value, value)) for key, value in changes.items()}
    values = {**SETTINGS, "task": task, "data_dir": str(write_data(task, tmp_path / "data")), **changes}
    if values["peft"] == "linear":
        del values["rank"]
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.train_main([*flags, "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()


def test_cut_sequences_are_counted_in_the_report(tmp_path):
    report = train(recipe("arc_easy", tmp_path, max_length=16))
    assert "beginnings of 9 sequences cut off, which had more than 16 tokens" in report.data["train"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["data"] == report.data


def test_gradient_checkpointing_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        job = open_job(recipe("arc_easy", tmp_path, grad_checkpointing=True))
    assert job.model.backbone.gradient_checkpointing or job.model.backbone.layers[0].gradient_checkpointing
