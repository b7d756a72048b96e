"""The command line: what it prints, how it fails, and that it answers at once."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import types

import pytest

from vimtune import __version__, catalog, cli
from vimtune.recipe import Recipe

HEAVY = ("torch", "timm", "albumentations", "matplotlib", "numpy")


@pytest.fixture
def trained(monkeypatch):
    """Recipes that reached the trainer, which is replaced: the command line alone is tested here."""
    recipes: list[Recipe] = []
    trainer = types.ModuleType("vimtune.train")
    trainer.train = recipes.append
    monkeypatch.setitem(sys.modules, "vimtune.train", trainer)
    return recipes


def failure(capsys, *arguments: str) -> str:
    """Run a command that must fail as the user's mistake; return its message."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


def test_every_field_of_the_recipe_is_a_flag(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        flag = field.name.replace("_", "-")
        assert f"--{flag} " in text or f"--[no-]{flag}" in text
        assert field.metadata["help"].split()[0] in text


@pytest.mark.parametrize("columns", [60, 80, 120, 300])
def test_help_and_list_fit_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for flag in ("--help", "--list"):
        cli.main(["train", flag])
        body = capsys.readouterr().out
        body = body.partition("examples:")[0]  # commands are not wrapped
        widest = max(body.splitlines(), key=len)
        assert len(widest) <= max(columns, 76), widest


def test_help_and_list_import_nothing_heavy():
    code = (
        "import sys\nfrom vimtune.cli import main, train_main\n"
        "assert train_main(['--help']) == main(['--list']) == main([]) == 0\n"
        "assert main(['predict', '--help']) == main(['merge', '--help']) == main(['doctor', '--help']) == 0\n"
        "assert main(['train', '--epochs', '0', '--lrr', '1']) == 2\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules], sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_script_passes_flags_and_exit_code_on():
    script = os.path.join(os.path.dirname(__file__), "..", "train_vim.py")
    done = subprocess.run([sys.executable, script, "--epoch", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --epoch. Did you mean '--epochs'?\n"


def test_list_shows_everything_there_is(capsys):
    assert cli.train_main(["--list"]) == 0
    text = capsys.readouterr().out
    words = re.findall(r"[\w+]+", text)
    for table in (catalog.MODELS, catalog.METHODS, catalog.DATASETS):
        assert set(table) <= set(words)
    for fields in catalog.METHOD_FIELDS.values():
        for name in fields:
            assert f"{name}=" in text


def test_without_arguments_the_default_recipe_is_trained(trained):
    assert cli.train_main([]) == 0
    assert trained == [Recipe()]


def test_flags_reach_the_recipe(trained, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("lr: 0.5\nepochs: 7\npretrained: true\n")
    flags = (
        "--epochs 3 --no-pretrained --cache --peft lora+bitfit --rank=4 --layers 0-1 --peft-kwargs alpha=2"
    )
    assert cli.main(["train", "--config", str(config), *flags.split()]) == 0
    (recipe,) = trained
    assert recipe == Recipe(
        lr=0.5,
        epochs=3,
        pretrained=False,
        cache=True,
        peft="lora+bitfit",
        rank=4,
        layers=[0, 1],
        peft_kwargs={"alpha": 2},
    )


def test_all_mistakes_of_a_command_line_at_once(capsys, tmp_path, trained):
    config = tmp_path / "recipe.yaml"
    config.write_text("epoch: 3\nlr: 0.1\n")
    flags = f"--config {config} --dataste flowers --batch-size 0 --no-pretraind --model vim_tiny_patch16"
    message = failure(capsys, "train", *flags.split())
    assert message.startswith("error: 5 problems")
    for part in (
        "'--dataset'",
        "'--no-pretrained'",
        "'epochs'",
        "batch_size = '0'",
        "'vim_tiny_patch16_224'",
    ):
        assert part in message
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "stray"], "unexpected argument 'stray'"),
        (["train", "--lr"], "--lr: expected one argument"),
        (["train", "--config", "none.yaml"], "none.yaml"),
        (["train", "--pretrained=maybe"], "pretrained"),
        (["predict"], "required"),
        (["predict", "x.jpg"], "--adapter"),
        (["predict", "x.jpg", "--adapter", "a", "--topk", "3"], "Did you mean '--top-k'?"),
        (["predict", "x.jpg", "--adapter", "a", "--top-k", "many"], "many"),
        (["merge", "a.safetensors"], "--output"),
        (["doctor", "--all"], "unknown flag --all"),
    ],
)
def test_wrong_commands(capsys, arguments, words):
    message = failure(capsys, *arguments)
    assert words in message
    assert len(message.splitlines()) == 1


def test_overview_and_version(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in text
    for arguments in (["--version"], ["train", "--version"], ["doctor", "--version"]):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == f"vimtune {__version__}\n"


def raise_error(error: BaseException):
    def train(recipe):
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("no such thing"), 2, "error: no such thing"),
        (OSError(28, "No space left on device", "runs/x"), 2, "error: No space left on device: runs/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (type("OutOfMemoryError", (RuntimeError,), {})("tried 2 GiB"), 2, "--batch-size"),
    ],
)
def test_what_the_user_can_mend_is_no_traceback(capsys, trained, monkeypatch, error, code, words):
    monkeypatch.setattr(sys.modules["vimtune.train"], "train", raise_error(error))
    assert cli.main(["train"]) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_traceback_on_request_and_always_for_our_own_faults(capsys, trained, monkeypatch):
    monkeypatch.setattr(sys.modules["vimtune.train"], "train", raise_error(ValueError("no such thing")))
    assert cli.main(["train", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("\nerror: no such thing\n")
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: no such thing\n(--traceback shows where this arose)\n"
    monkeypatch.setattr(sys.modules["vimtune.train"], "train", raise_error(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["train"])
