"""Every command in a block of the documents, and of `--help`, does what it is written for.

What a test cannot do within seconds is replaced, and only as stated here:

- Tools of developers, examples and notebooks (`DEVELOPERS_TOOLS`) are not started, for which there are other
  tests; what they name has to exist.
- Examples of `--help` that no document has are parsed, those of plans and recipes read.
- What is to be compared is read, and nothing of it is trained.
- What is to be exported is there; a test of README's Python exports it.
- Of the analyses the quickest runs; tests/analysis has the others.
- Training lasts one epoch on a tiny model (`TINY`). It ends when the recipe is ready for data that are not at
  hand (`NOT_HERE`), and with `--config`. torchrun's processes are one. Pictures are empty files.
- Searches end when their plan is ready.
- Hubs are not asked.
"""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from document_blocks import DOCUMENTS, ROOT, commands_of
from quick_documents import HAS_TRANSFORMERS, TINY

from vimtune import cli
from vimtune.cli.parser import CommandParser
from vimtune.export.formats import FORMATS

EXAMPLES = [
    example
    for name in cli.COMMANDS
    for example in re.findall(
        r"^  (vimtune .*)",
        getattr(getattr(cli, name), "EXAMPLES", "").format(prog=f"vimtune {name}"),
        re.M,
    )
]
"""What `--help` shows of each command."""
PLANNED = [
    line for line in EXAMPLES if line.startswith(("vimtune train", "vimtune compare", "vimtune search"))
]
"""Those that say what is to be done, which is seen before it is done."""
FIRST = commands_of()
"""Commands that run as far as they can."""
COMMANDS = list(dict.fromkeys([*FIRST, *PLANNED]))
ON_TRAINING = (
    "CONTRIBUTING.md",
    "configs/README.md",
    *(f"docs/{name}.md" for name in ("training", "data", "logs")),
)
"""Pages whose flags are those of training."""
FLAGS = sorted(
    {
        re.sub(r"\s+", " ", flags)
        for page in ON_TRAINING
        for flags in re.findall(r"`(--[a-z-]+\s[^`A-Z]+)`", DOCUMENTS[page])
    }
)
"""Flags of training in the text."""
NOT_HERE = {"flowers", "hf", "csv", "--config", "--task"}
"""Arguments of training for which there are no data, or not those of the example."""
DEVELOPERS_TOOLS = (
    *("pip", "python -m venv", ".", "pre-commit", "pytest", "jupyter", "accelerate"),
    *("python tests/", "python examples/", "python notebooks/"),
)


def test_the_documents_have_what_these_tests_look_for():
    assert len(FIRST) >= 60 and len(COMMANDS) >= len(FIRST) + 8 and len(EXAMPLES) >= 25 and len(FLAGS) >= 12


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(DEVELOPERS_TOOLS)])
def test_what_the_tools_of_developers_name_exists(line):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in (name for names in re.findall(r"\[([\w,]+)\]", line) for name in names.split(",")):
        assert re.search(rf"^{extra} = \[", project, re.M)
    for path in re.findall(r"(?<![\w/])(?:tests|examples|notebooks)(?:/[\w/.*]+)?", line):
        assert list(ROOT.glob(path)), path


@pytest.mark.usefixtures("no_pictures", "each_flower_is_painted_once")
@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(DEVELOPERS_TOOLS)])
def test_commands(line, here, request, monkeypatch):
    program, command, *arguments = shlex.split(line)
    assert program == "vimtune" and command in cli.COMMANDS
    outputs = [arguments[place + 1] for place, flag in enumerate(arguments) if flag in ("--output-dir", "-o")]
    if command in ("train", "search"):  # what the others take for granted
        for output in outputs:
            shutil.rmtree(here / output)
    if command == "search":
        pytest.importorskip("optuna")
        plans: list = []
        monkeypatch.setattr("vimtune.search.search.run_search", lambda plan, *others: plans.append(plan))
        monkeypatch.setattr("vimtune.search.search.check_parts", lambda plan: [])  # it would open the data
        assert cli.main([command, *arguments]) == 0 and len(plans) == 1
        return
    if command == "compare":
        folders = [str(path) for argument in arguments for path in here.glob(argument) if "*" in argument]
        if not folders:  # Whether the plan is right is seen before anything is trained.
            monkeypatch.setattr("vimtune.compare.command.compare", lambda *_: ([], {}))
        kept = [argument for argument in arguments if "*" not in argument]
        assert cli.main([command, *kept, *folders]) == 0
        return
    if command == "export":
        given: dict = {}
        monkeypatch.setattr("vimtune.commands.export.run_export", lambda **values: given.update(values) or 0)
        assert cli.main([command, *arguments]) == 0
        assert given["source"].exists() and given["output"].suffix in FORMATS
        return
    if command in ("push", "pull"):  # They would ask for a network.
        monkeypatch.setattr(f"vimtune.exchange.hub.{command}", lambda *_, **__: here)
    if command == "analyze":
        arguments += ["--only", "cost"]  # the last one counts
    if command != "train":
        if ("--task" in arguments or "runs/my-texts" in arguments) and not HAS_TRANSFORMERS:
            pytest.skip("no transformers 5.21")
        assert cli.main([command, *arguments]) == 0
        return
    if not arguments:
        monkeypatch.setattr("vimtune.compare.quickstart.compare", lambda *_: ([], {}))
        assert cli.main([command]) == 0
    elif "--resume" in arguments:
        assert cli.main([command, *arguments, "--epochs", "2"]) == 0
    elif line not in FIRST or NOT_HERE & set(arguments):
        reached = request.getfixturevalue("recipes")
        assert cli.main([command, *arguments]) == 0 and len(reached) == 1
    else:
        small = "--dataset-kwargs species=3,train_per_species=4,val_per_species=2,test_per_species=2"
        data = [] if {"folder", "csv"} & set(arguments) else small.split()
        method = [] if "--rank" in arguments or "--peft" in arguments else ["--peft", "lora"]
        assert cli.main([command, *arguments, *TINY.split(), *data, *method]) == 0
        assert "report.json" in {path.name for path in here.glob("runs/*/*")}


class Understood(Exception):
    """A command line is one of its command."""


@pytest.mark.parametrize("line", [line for line in EXAMPLES if line not in COMMANDS])
def test_other_examples_of_help_are_understood(line, monkeypatch):
    parse = CommandParser.parse_strictly

    def parsed(parser, arguments):
        raise Understood(parse(parser, arguments))

    monkeypatch.setattr(CommandParser, "parse_strictly", parsed)
    _, name, *arguments = shlex.split(line)
    with pytest.raises(Understood):
        cli.COMMANDS[name][1].run(f"vimtune {name}", arguments)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_in_the_text(flags, here, recipes):
    arguments = flags.replace("--dataset folder", "--dataset folder --data-dir my")
    assert cli.main(["train", *shlex.split(arguments)]) == 0
