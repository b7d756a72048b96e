"""The command line: what it prints, how it fails, and that it answers at once."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Annotated

import pytest
from annotated_types import Ge
from bad_input import TEXTS, at_once

from vimtune import __version__, cli, training
from vimtune.data import DATASETS
from vimtune.exits import EXIT_CODES
from vimtune.fields import option, options_of
from vimtune.methods import METHODS
from vimtune.models import MODELS
from vimtune.recipe import Recipe, keys_of
from vimtune.tasks import TASKS, Task
from vimtune.text import printable

KEYS = keys_of("classification")
HEAVY = ("torch", "timm", "albumentations", "matplotlib", "numpy", "pydantic")


@pytest.fixture
def trained(monkeypatch):
    """Recipes that reached the trainer, which is replaced: the command line alone is tested here.

    The name is put into the package as if it had been imported, because asking for it would import the
    trainer with its libraries for plots. Other modules of the package stay: a recipe may need them.
    """
    recipes: list[Recipe] = []
    monkeypatch.setitem(vars(training), "train", recipes.append)
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
    for field in KEYS.values():
        flag = field.name.replace("_", "-")
        assert f"--{flag} " in text or f"--[no-]{flag}" in text
        assert field.help.split()[0] in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_a_command_writes_is_named_by_the_same_short_flag(capsys, command):
    assert cli.main([command, "--help"]) == 0
    for line in re.findall(r"^ +--output.*", capsys.readouterr().out, re.M):
        assert re.match(r" +--output(-dir)? \w+, -o \w+", line)


def test_the_short_flag_is_the_folder_of_a_run(trained, tmp_path):
    assert cli.main(["train", "-o", str(tmp_path / "run")]) == 0
    assert trained[0].run.output_dir == str(tmp_path / "run")


@pytest.mark.parametrize("columns", [50, 60, 80, 120, 300])
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
        "assert main(['compare', '--help']) == 0 and main(['compare', '--methods', 'lroa']) == 2\n"
        "assert main(['analyze', '--help']) == 0 and main(['analyze', 'x', '--only', 'csot']) == 2\n"
        "assert main(['train', '--epochs', '0', '--lrr', '1']) == 2\n"
        "assert main(['predict', 'x', '--adapter', 'a', '--lr', '1']) == 2\n"
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
    words = re.split(r"[\s,]+", text)
    for table in (MODELS, METHODS, DATASETS, TASKS):
        assert set(table) <= set(words)
    for cls in (*(method for _, method in METHODS.items()), *(task for _, task in TASKS.items())):
        for name in options_of(cls):
            assert f"{name}=" in text


def test_with_a_flag_the_rest_of_the_recipe_is_the_default(trained):
    assert cli.train_main(["--epochs", "10"]) == 0
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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--cache", "host"), ("--no-cache", "none"), ("--cache device", "device"), ("--cache=auto", "auto")],
)
def test_a_flag_that_is_a_switch_takes_values_too(trained, flags, expected):
    assert cli.train_main([*flags.split(), "--epochs", "3"]) == 0
    assert trained[0].data.cache == expected and trained[0].optimisation.epochs == 3


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
        (["merge", "a.safetensors"], "--output"),
        (["doctor", "--all"], "unknown flag --all. See"),  # flags share their dashes, which is no likeness
        (["predict", "x.jpg", "--adapter", "a", "--csv", "b.csv"], "unknown flag --csv. See"),
        (
            ["predict", "x.jpg", "--adapter", "a", "--lr", "3"],
            "unknown flag --lr. It belongs to vimtune train, compare and search. See vimtune predict --help",
        ),
        (["train", "--among=x"], "unknown flag --among. It belongs to vimtune embed.\n"),
        (
            ["train", "--adapter", "x"],
            "It belongs to vimtune evaluate, predict and embed. Did you mean '--init-ad",
        ),
        (
            ["doctor", "--no-pretrained"],
            "It belongs to vimtune train, compare, search, evaluate and others. See",
        ),
        (["predict", "--adapter", "a", "--data-dir", "b"], "without a flag: vimtune predict FOLDER See"),
        (["embed", "--adapter", "a", "--data-dir=b", "c"], "without a flag: vimtune embed FOLDER See"),
    ],
)
def test_wrong_commands(capsys, arguments, words):
    message = failure(capsys, *arguments)
    assert words in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_flags_of_other_commands_are_told_from_unknown_ones(command):
    parsers = {name: module.build_parser(f"vimtune {name}") for name, (_, module) in cli.COMMANDS.items()}
    own = parsers.pop(command)
    for flag in ("--lr", "--top-k", "--mistakes", "--revision", "--only", "--private", "-o"):
        owners = [name for name, parser in parsers.items() if parser.has(flag)]
        (told,) = own.unknown_arguments([flag])
        if not own.has(flag) and flag.lstrip("-").replace("-", "_") not in own.left_out:
            assert f"unknown flag {flag}. It belongs to vimtune {owners[0]}" in told
    (told,) = own.unknown_arguments(["--no-such-flag"])
    assert "belongs" not in told


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
        (BrokenPipeError(32, "Broken pipe"), 2, "error: Broken pipe"),  # of a worker, not of our output
        (KeyboardInterrupt(), 130, "interrupted"),
        (type("OutOfMemoryError", (RuntimeError,), {})("tried 2 GiB"), 2, "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
        (MemoryError(), 2, "--batch-size"),
        (ValueError("rose\x1b[2J\nerror: lie"), 2, "error: rose\\x1b[2J error: lie"),
        (ValueError("saved:\n  vimtune train --resume x"), 2, "error: saved: vimtune train --resume x"),
    ],
)
def test_what_the_user_can_mend_is_no_traceback(capsys, trained, monkeypatch, error, code, words):
    monkeypatch.setattr(training, "train", raise_error(error))
    assert cli.main(["train", "--seed", "0"]) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and err.count("\n") == 1


def test_a_dependency_that_was_left_out_is_named(capsys, trained, monkeypatch):
    lacking = ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot")
    monkeypatch.setattr(sys.modules["vimtune.training"], "train", raise_error(lacking))
    assert cli.main(["train", "--seed", "0"]) == 2
    err = capsys.readouterr().err
    assert "the package matplotlib is not installed" in err and "pip install matplotlib" in err
    assert "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize("fault", ["raise ImportError('broken needs NumPy 2')", "import broken_too.lost"])
def test_a_package_that_cannot_be_imported_is_named(capsys, trained, monkeypatch, tmp_path, fault):
    for path, text in {
        "broken/__init__.py": fault,
        "broken-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken\nVersion: 1\n",
        "broken-1.dist-info/top_level.txt": "broken\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(training, "train", lambda recipe: importlib.import_module("broken"))
    assert cli.main(["train", "--seed", "0"]) == 2
    err = capsys.readouterr().err
    assert "error: the package broken is installed but cannot be used: " in err
    assert "NumPy 2" in err or "No module named 'broken_too'" in err
    assert "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["vimtune.lost", "matplot", "optuna", None])
def test_other_modules_that_are_missing_are_faults(capsys, trained, monkeypatch, tmp_path, name):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error = ModuleNotFoundError("gone", name=name)
    monkeypatch.setattr(sys.modules["vimtune.training"], "train", raise_error(error))
    assert cli.main(["train", "--seed", "0"]) == 70


@pytest.mark.parametrize(
    "command",
    [
        "train --data-dir {0}",
        "train --config {0}/recipe.yaml",
        "train --config {0}/recipe.yaml --dataset synthetic_flowers",
        "train --task multilabel --data-dir {0}",
        "evaluate --data-dir {0}",
        "search --space mambapeft --data-dir {0}",
        "compare --methods lora --data-dir {0} -o {0}/out",
        "compare --methods lora --data synthetic_flowers --data-dir {0} -o {0}/out",
    ],
)
def test_a_folder_without_a_data_set_is_refused(capsys, tmp_path, command):
    # The data set of the defaults reads no files: the photos would be left out for generated flowers.
    (tmp_path / "recipe.yaml").write_text(f"data_dir: {tmp_path}\n")
    assert cli.main(command.format(tmp_path).split()) == 2
    assert capsys.readouterr().err == (
        f"error: data_dir = '{tmp_path}' would not be read: the images of dataset = 'synthetic_flowers' "
        "are generated. Say what lies there, --dataset folder (a folder for each class) or --dataset csv (a "
        "table of labels), or leave data_dir out\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_flag_is_recognised(capsys):
    assert cli.main(["evaluate", "runs/x"]) == 2
    message = (
        "unexpected argument 'runs/x': an adapter or a run is given as --adapter runs/x. See vimtune evaluate"
    )
    assert message in capsys.readouterr().err


def test_a_traceback_on_request(capsys, trained, monkeypatch):
    monkeypatch.setattr(training, "train", raise_error(ValueError("no such thing")))
    assert cli.main(["train", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("\nerror: no such thing\n")
    assert cli.main(["train", "--seed", "0"]) == 2
    assert capsys.readouterr().err == "error: no such thing (--traceback shows where this arose)\n"


FAULTS = [
    RuntimeError("bug"),
    TypeError("bug"),
    KeyError("bug"),
    AssertionError(),
    RecursionError("bug\nbug"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_of_ours_is_one_line_with_a_file_to_report(capsys, trained, monkeypatch, tmp_path, error):
    monkeypatch.setattr(training, "train", raise_error(error))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["train", "--seed", "0"]) == cli.main(["train", "--seed", "0"]) == 70
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    files = list(tmp_path.iterdir())
    assert len(files) == 2  # a file of its own each time
    for line in err.splitlines():
        assert line.startswith(f"error: {type(error).__name__}: ") and "fault of vimtune" in line
        (path,) = (path for path in files if str(path) in line)
        assert "Traceback" in path.read_text() and __version__ in path.read_text()

    assert cli.main(["train", "--traceback"]) == 70
    assert "Traceback" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_a_fault_with_no_room_for_a_file_is_shown(capsys, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "train", raise_error(RuntimeError("bug")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    assert cli.main(["train", "--seed", "0"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def two_tasks(monkeypatch):
    """Tasks that declare one name in different ways: a switch, a number, a word."""

    class Base(Task):
        def open(self, recipe, processes):
            raise NotImplementedError

    @dataclass(frozen=True, kw_only=True)
    class Switch(Base):
        summary = "a switch"
        sharp: bool = option(False, "sharp at once")
        label_smoothing: Annotated[float, Ge(0)] = option(0.25, "smoothing of the tokens")

    @dataclass(frozen=True, kw_only=True)
    class Number(Base):
        summary = "a number"
        sharp: Annotated[int, Ge(1)] = option(3, "how sharp")

    Switch.name, Number.name = "switch", "number"
    monkeypatch.setattr(TASKS, "_things", {**TASKS._things, "switch": Switch, "number": Number})


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--task switch --sharp", "sharp", True),
        ("--task switch --no-sharp", "sharp", False),
        ("--task switch", "sharp", False),
        ("--task switch --label-smoothing 2", "label_smoothing", 2.0),
        ("--task number --sharp 5", "sharp", 5),
        ("--task number --sharp=5", "sharp", 5),
        ("--task number", "sharp", 3),
    ],
)
def test_tasks_that_declare_a_name_in_different_ways(two_tasks, trained, flags, name, value):
    assert cli.main(["train", *flags.split()]) == 0
    assert getattr(trained[0].task, name) == value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task number --sharp", "sharp = 'true': expected a whole number >= 1"),
        ("--task switch --sharp 5", "sharp = '5': expected true or false"),
        ("--sharp 5", "sharp = '5' is an option of task switch and number, and task is classification"),
        ("--label-smoothing 2", "label_smoothing = '2': expected a number >= 0 and < 1"),
    ],
)
def test_values_that_another_task_takes(two_tasks, capsys, trained, flags, words):
    assert words in failure(capsys, "train", *flags.split())


def test_help_of_a_name_that_tasks_declare_in_different_ways(two_tasks, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "task switch: sharp at once [off]; task number: how sharp [3]" in text
    assert (
        "task classification: label smoothing of the loss [0]; task switch: smoothing of the tokens" in text
    )


# --- nasty input


def assert_harmless(message: str) -> None:
    lines = message.splitlines()
    assert len(lines) == 1 or re.fullmatch(r"error: \d+ problems in the recipe:", lines[0])
    assert all(printable(line) == line and len(line) < 800 for line in lines)


@pytest.mark.parametrize("nasty", TEXTS)
def test_nasty_texts_of_all_flags(capsys, trained, nasty):
    booleans = [field.name for field in KEYS.values() if isinstance(field.default, bool)]
    flags = {field.name: "--" + field.name.replace("_", "-") for field in KEYS.values()}
    others = [f"{flag}={TEXTS[nasty]}" for name, flag in flags.items() if name not in booleans]
    with at_once():
        assert_harmless(failure(capsys, "train", *others))
        assert_harmless(failure(capsys, "train", f"{flags[booleans[0]]}={TEXTS[nasty]}"))


COMMANDS_OF_WORDS = [
    "{}",
    "train {}",
    "train --{}",
    "train --config={}/x",
    "predict x.jpg --adapter={}\0",
    "merge {}\0 -o x.safetensors",
    "merge x -o {}\0",
    "merge x --checkpoint {}\0 -o x.safetensors",
    "doctor {}",
    "doctor --{}",
]


@pytest.mark.parametrize("command", COMMANDS_OF_WORDS)
def test_nasty_words_of_every_command(capsys, trained, command):
    for text in TEXTS.values():
        if text.strip():
            assert_harmless(failure(capsys, *(part.format(text) for part in command.split(" "))))


@pytest.mark.parametrize("option", ["--adapter", "--checkpoint", "--output", "-o"])
def test_paths_of_predict_have_a_home_folder(monkeypatch, tmp_path, option):
    given = {}
    module = types.ModuleType("vimtune.commands.predict")
    module.run_predict = lambda **options: given.update(options) or 0
    monkeypatch.setitem(sys.modules, "vimtune.commands.predict", module)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        cli.main(["predict", "~/photo.jpg", "--adapter", "~/a", "--checkpoint=~/b", option, "~/x.csv"]) == 0
    )
    assert given["inputs"] == ["~/photo.jpg"]  # it may be a text; the task decides
    places = {"--adapter": [given["adapter"]], "--checkpoint": [given["base"]["checkpoint"]]}
    assert places.get(option, given["outputs"]) == [tmp_path / "x.csv"]


# --- streams


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run([sys.executable, "-m", "vimtune", *arguments], **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_streams_that_cannot_show_every_character(encoding, tmp_path):
    code = "import vimtune.cli, sys; sys.exit(vimtune.cli.main(sys.argv[1:]))"
    name = os.fsdecode(b"caf\xe9-\xe2\x82\xac\xf0\x9f\x8c\xb8.yaml")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config", name], capture_output=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: cannot read 'caf\\udce9-") and done.stderr.count(b"\n") == 1


def test_what_is_printed_in_a_run_may_have_any_character(trained, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(training, "train", lambda recipe: print("rose \u2192 \udce9"))
    assert cli.main(["train", "--seed", "0"]) == 0
    assert stream.buffer.getvalue() == b"rose \\u2192 \\udce9\n"


def test_log_lines_are_harmless():
    cli.main(["--version"])  # starts the log
    (handler, *_) = logging.getLogger("vimtune").handlers
    record = logging.LogRecord("vimtune", logging.INFO, "", 0, "loaded %s", ("\x1b[2J\nerror: lie",), None)
    assert handler.format(record) == "loaded \\x1b[2J\\nerror: lie"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("--help", 0), ("--list", 0), ("train --help", 0), ("train --epochs 0", 2), ("nonsense", 2)],
)
def test_closed_streams(arguments, code):
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        line = f"{sys.executable} -m vimtune {arguments} {closed}"
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == code, line
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["--help", "--list", "train --help"])
def test_a_full_disk_under_stdout(arguments):
    done = subprocess.run(
        f"{sys.executable} -m vimtune {arguments} > /dev/full", shell=True, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_reader_that_has_gone():
    script = f"{sys.executable} -m vimtune --list; echo $? >&2"
    done = subprocess.run(["bash", "-c", f"({script}) | true"], capture_output=True, text=True)
    assert done.stderr in ("141\n", "0\n")  # 0 where all of it fits the pipe's buffer


@pytest.mark.parametrize("columns", ["0", "1", "10", "40"])
def test_narrow_terminals(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in (["--list"], ["train", "--help"], ["predict", "--help"], ["merge", "--help"]):
        assert cli.main(arguments) == 0
        stdout, stderr = capsys.readouterr()
        assert stdout and stderr == ""


def test_help_names_the_exit_codes(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", text, re.M)
    assert max(map(len, text.splitlines())) <= 80
