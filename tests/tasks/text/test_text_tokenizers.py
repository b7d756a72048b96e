"""A tokenizer belongs to a run and to its adapter: another one is refused, wherever its file lies."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from text_runs import SETTINGS, write_data
from transformers import PreTrainedTokenizerFast

from vimtune import cli
from vimtune.adapters import read_adapter_info
from vimtune.language import byte_tokenizer, create_language_model, tokenizer_digest
from vimtune.recipe import Recipe
from vimtune.tasks.job import READERS
from vimtune.training import train


def lower(content):
    content["normalizer"] = {"type": "Lowercase"}


def swap_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


CHANGES = [lower, swap_tokens]


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, its tokenizer, its data, and a run of one epoch on them."""
    folder = tmp_path_factory.mktemp("trained")
    create_language_model("mamba_tiny").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    values = {
        **SETTINGS,
        "model": str(folder / "model"),
        "data_dir": str(write_data("arc_easy", folder / "data")),
    }
    train(Recipe(task="arc_easy", output_dir=str(folder / "run"), **values))
    return folder


@pytest.fixture
def changed(trained, tmp_path):
    """The arguments that name a copy of the run and a copy of its model whose tokenizer has other tokens."""
    shutil.copytree(trained / "model", tmp_path / "model")
    shutil.copytree(trained / "run", tmp_path / "run")
    rewrite(tmp_path / "model" / "tokenizer.json", swap_tokens)
    return tmp_path / "run", ["--tokenizer", str(tmp_path / "model")]


def refusal(capsys, *arguments):
    assert cli.main([*map(str, arguments), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "tokenizer" in line and "another" in line and "--force" in line, line


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_is_that_of_what_becomes_of_texts(change, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8))
    assert tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == tokenizer_digest(
        byte_tokenizer()
    )
    rewrite(path, change)
    assert tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(tmp_path)) != tokenizer_digest(
        byte_tokenizer()
    )


def test_a_run_is_not_continued_with_another_tokenizer(trained, capsys):
    path = trained / "model" / "tokenizer.json"
    before = path.read_bytes()
    rewrite(path, swap_tokens)
    try:
        resume = ["train", "--resume", trained / "run", "--epochs", 2]
        refusal(capsys, *resume)
        shutil.copytree(trained / "run", trained / "forced")
        forced = [*resume[:2], trained / "forced", *resume[3:], "--force", "--device", "cpu"]
        assert cli.main(list(map(str, forced))) == 0
        report = json.loads((trained / "forced" / "report.json").read_text())
        assert any("the tokenizer is another" in warning for warning in report["warnings"])
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("command", ["evaluate", "predict", "merge"])
def test_an_adapter_is_not_used_with_another_tokenizer(command, changed, tmp_path, capsys):
    run, tokenizer = changed
    question = write_data("arc_easy", tmp_path / "asked") / "ARC-Easy-test.jsonl"
    arguments = {
        "evaluate": ["evaluate", "--adapter", run],
        "predict": ["predict", question, "--adapter", run],
        "merge": ["merge", run, "-o", tmp_path / "merged"],
    }[command]
    refusal(capsys, *arguments, *tokenizer)
    assert not (tmp_path / "merged").exists()
    assert cli.main([*map(str, arguments), *tokenizer, "--device", "cpu", "--force"]) == 0


def test_the_adapter_file_has_the_hash(trained):
    info = read_adapter_info(trained / "run" / "adapter.safetensors")
    assert info.extra[READERS] == {"tokenizer": tokenizer_digest(byte_tokenizer())}
