"""Strings, tokens, log-likelihoods and verdicts are those of lm-evaluation-harness, example by example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from language_models import END, PlainScorer, tiny_mamba, train_tokenizer
from text_files import ARC, BOOL, GOAL, SCENE, SENTENCE, write_lines

from vimtune.data import DatasetError
from vimtune.data.text import (
    ARC_CHALLENGE,
    ARC_EASY,
    BOOLQ,
    HELLASWAG,
    PIQA,
    WINOGRANDE,
    Example,
    open_text,
)
from vimtune.runtime.precision import build_autocast
from vimtune.tasks.text.batches import TextBatches
from vimtune.tasks.text.heads import LikelihoodHead
from vimtune.tasks.text.scoring import row_losses
from vimtune.tasks.text.tokens import Encoder
from vimtune.training import evaluate

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval, the oracle of the scores, is not installed")

MAX_LENGTH = 48
"""Short enough that some of the examples are cut."""


def arc(question, texts, labels, key):
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


ARC_LINES = [
    ARC,
    arc("Which of these?  ", ["one", "two", "three", "four"], list("ABCD"), "D"),
    arc("Digits\nand lines", ["1", "2", "3"], ["1", "2", "3"], "3"),
    arc("Five", ["a", "b b", "c c c", "ü€", " e "], list("ABCDE"), "E"),
    arc("Equal ones", ["same", "same", "other"], list("ABC"), "A"),
    arc("Equal ones", ["same", "same", "other"], list("ABC"), "B"),
    arc("A long question " * 20, ["yes", "no"], list("AB"), "A"),
]
LINES = {
    "arc/arc_easy": (ARC_EASY, ARC_LINES),
    "arc/arc_challenge": (ARC_CHALLENGE, ARC_LINES),
    "hellaswag/hellaswag": (
        HELLASWAG,
        [
            SCENE,
            {**SCENE, "ctx_b": "", "label": 0},
            {**SCENE, "ctx_a": " [header] How to  run. [title] Run  fast. [step] Go.", "ctx_b": "ÜBER Ann"},
            {**SCENE, "endings": ["a [b] c", "[x]", "  d", "e  f   g"], "label": 1},
            {**SCENE, "endings": ["same", "same"], "label": 1},
            {**SCENE, "label": "0"},
        ],
    ),
    "winogrande/default": (
        WINOGRANDE,
        [
            SENTENCE,
            {**SENTENCE, "sentence": "_ was near _ ."},
            {**SENTENCE, "sentence": "She is  _", "answer": "1"},
            {**SENTENCE, "sentence": "It is _, not near.", "option1": "far ", "option2": "the  end\t"},
            {**SENTENCE, "option1": "Ann", "option2": "Ann"},
            {**SENTENCE, "option1": "Ann", "option2": "Ann", "answer": "1"},
        ],
    ),
    "piqa/piqa": (PIQA, [GOAL, {**GOAL, "label": 1}, {**GOAL, "sol1": "ä\nb", "goal": "x " * 60}]),
    "super_glue/boolq/default": (
        BOOLQ,
        [BOOL, {**BOOL, "label": False}, {**BOOL, "passage": "Much text. " * 40, "question": "why? "}],
    ),
}
"""The task file of the harness, our format, and lines with everything that can go wrong."""


@pytest.fixture(scope="module")
def tokenizer():
    texts = [str(line) for _, lines in LINES.values() for line in lines]
    return train_tokenizer([*texts, "Question: What? Answer: yes no"] * 3)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_mamba(len(tokenizer))


@pytest.fixture(scope="module")
def harness(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        device="cpu",
        batch_size=3,
        max_length=MAX_LENGTH,
        dtype="float32",
    )


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def theirs(name, path, harness):
    """The harness's task on a file: its documents, requests and answers."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{name}.yaml", resolve_func=True)
    config = {key: value for key, value in config.items() if key not in ("dataset_name", "include", "tag")}
    split = config.get("test_split") or config["validation_split"]
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {split: str(path)}}}
    config |= {"training_split": None, "validation_split": None, "test_split": split}
    task = ConfigurableTask(config=config)
    for number, doc in enumerate(task.test_docs()):
        yield number, task, doc, task.construct_requests(doc, task.fewshot_context(doc, 0))


@pytest.mark.parametrize("name", LINES)
def test_everything_is_that_of_the_harness(name, model, tokenizer, harness, offline, tmp_path):
    form, lines = LINES[name]
    path = write_lines(tmp_path / "a.jsonl", lines)
    examples = open_text(form, "test", file=path).examples
    head, encoder = LikelihoodHead(), Encoder(tokenizer, MAX_LENGTH)
    items = head.scoring_items(encoder, examples)
    batches = TextBatches("test", "", "", len(examples), items, head.batch, batch_size=5, shuffle=False)
    tally = head.tally(examples, items, form.per_character)
    cpu = torch.device("cpu")
    found = evaluate(PlainScorer(model), batches, tally, device=cpu, autocast=build_autocast("none", cpu))
    rows = iter(items)
    totals = {"acc": 0.0, "acc_norm": 0.0}
    for number, task, doc, requests in theirs(name, path, harness):
        example, judged = examples[number], found.judged[number]
        assert [request.args for request in requests] == list(
            zip(example.contexts, example.continuations, strict=True)
        )
        for context, continuation in (request.args for request in requests):
            first, second = harness._encode_pair(context, continuation)
            (row,) = next(rows).rows
            assert list(row.tokens) == [*first, *second][-MAX_LENGTH - 1 :] and row.scored == len(second)
        answers = harness.loglikelihood(requests, disable_tqdm=True)
        assert judged.log_likelihoods == pytest.approx([value for value, _ in answers], abs=1e-4)
        verdict = task.process_results(doc, answers)
        assert (judged.predicted == judged.answer) == verdict["acc"]
        totals["acc"] += verdict["acc"]
        if form.per_character:
            assert (judged.predicted_per_character == judged.answer) == verdict["acc_norm"]
            totals["acc_norm"] += verdict["acc_norm"]
        else:
            assert judged.predicted_per_character is None and "acc_norm" not in verdict
    assert number + 1 == len(examples) == found.count
    assert found.scores["acc"] == pytest.approx(100 * totals["acc"] / len(examples))
    if form.per_character:
        assert found.scores["acc_norm"] == pytest.approx(100 * totals["acc_norm"] / len(examples))
    assert encoder.cut > 0 or name.startswith(("hella", "wino"))


@pytest.mark.parametrize("text", ["a text", END, f"{END}a text", " x", "\n"])
def test_texts_without_a_context_are_those_of_the_harness(text, model, tokenizer, harness):
    from lm_eval.api.instance import Instance

    example = Example(("",), (text,), (text,), 0, "", text)
    head, encoder = LikelihoodHead(), Encoder(tokenizer, MAX_LENGTH)
    if text == END:  # the harness itself cannot score it: nothing is left after the first token
        with pytest.raises(DatasetError, match="nothing is left to score"):
            head.scoring_items(encoder, [example])
        return
    batch = head.batch(head.scoring_items(encoder, [example]))
    request = Instance("loglikelihood", {}, ("", text), 0)
    ((expected, _),) = harness.loglikelihood([request], disable_tqdm=True)
    with torch.no_grad():
        (loss,) = row_losses(PlainScorer(model), batch.tensors).tolist()
    assert -loss == pytest.approx(expected, abs=1e-4)
