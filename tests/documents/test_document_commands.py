"""Every command and code block of README, CONTRIBUTING and --help runs as it is written.

What a test cannot do within seconds is replaced, and only as stated here:

- Tools of developers (`DEVELOPERS_TOOLS`) are not started; what they name has to exist.
- What is to be compared is read, and nothing of it is trained.
- Of the analyses the quickest runs; tests/analysis has the others.
- Training lasts one epoch on a tiny model (`TINY`); `--dataset flowers`, whose images are not at hand, and
  everything with `--config` end when the recipe is ready; torchrun's processes are one.
- Searches end when their plan is ready.
- The README's Python starts from random weights instead of downloaded ones, of a tiny language model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

import vimtune
from vimtune import cli, language
from vimtune.cli import compare
from vimtune.cli.train import EXAMPLES
from vimtune.data import build_transform, load_image
from vimtune.methods import METHODS
from vimtune.recipe import Recipe
from vimtune.search.plan import Plan
from vimtune.testing import check_method

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
BLOCKS = [
    (name, language, body)
    for name, text in DOCUMENTS.items()
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
]
COMMANDS = [
    *(line for _, language, body in BLOCKS if not language for line in body.splitlines() if line.strip()),
    *re.findall(r"^  (vimtune .*)", EXAMPLES.format(prog="vimtune train"), re.M),
    *re.findall(r"^  (vimtune .*)", compare.EXAMPLES.format(prog="vimtune compare"), re.M),
]
FLAGS = sorted({flags for text in DOCUMENTS.values() for flags in re.findall(r"`(--[a-z-]+ [^`]+)`", text)})
DEVELOPERS_TOOLS = ("pip", "python -m venv", ".", "pre-commit", "pytest", "python tests/")
TINY = (
    "--model test_vim --model-kwargs depth=1 --no-pretrained --epochs 1 --warmup-epochs 0 --num-workers 0 "
    "--device cpu"
)

TINY_TEXTS = "--model mamba_tiny --peft lora --rank 2 --epochs 1 --device cpu"
try:
    language.require_transformers()
    HAS_TRANSFORMERS = True
except ValueError:
    HAS_TRANSFORMERS = False


def image(path: Path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), color).save(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the commands take for granted: images, a recipe, a run."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my-recipe.yaml").write_text("lr: 0.01\n")
    (space,) = (body for _, language, body in BLOCKS if language == "yaml")
    (folder / "my-space.yaml").write_text(space)
    (folder / "runs" / "my-search").mkdir(parents=True)
    Plan("my", Recipe(), yaml.safe_load(space), trials=1, seed=0, prune=True).save(
        folder / "runs" / "my-search" / "search.yaml"
    )
    Recipe().save(folder / "runs" / "my-search" / "best.yaml")
    for plan in ("my-plan.yaml", "runs/equal/plan.yaml"):
        (folder / plan).parent.mkdir(parents=True, exist_ok=True)
        (folder / plan).write_text("methods: lora\n")
    image(folder / "photo.jpg", "red")
    for name, color in (("rose", "red"), ("violet", "blue")):
        for index in range(8):
            image(folder / "my" / "images" / name / f"{index}.png", color)
            image(folder / "my" / "photos" / f"{name}{index}.png", color)
    rows = [f"{name}{index}.png,{name}" for name in ("rose", "violet") for index in range(8)]
    (folder / "my" / "photos" / "labels.csv").write_text("\n".join(["path,label", *rows]))
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    question = {"id": "1", "question": "Which is a colour of roses?", "choices": choices, "answerKey": "A"}
    for split in ("train", "test"):
        path = folder / "my" / "arc" / f"ARC-Easy-{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{json.dumps(question)}\n" * 4, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = f"train --dataset folder --data-dir my/images --output-dir runs/my-run --peft lora {TINY}"
        assert cli.main(command.split()) == 0
        shutil.copytree("runs/my-run", "runs/my-other-run")
        assert (
            cli.main(
                ["embed", "my/images", "--adapter", "runs/my-run", "--device", "cpu", "-o", "images.npz"]
            )
            == 0
        )
        if HAS_TRANSFORMERS:
            texts = [{"text": "warm", "label": "summer"}, {"text": "cold", "label": "winter"}] * 2
            for split in ("train", "test"):
                path = folder / "my" / "texts" / f"{split}.jsonl"
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
            command = "train --task text --data-dir my/texts --output-dir runs/my-texts --head classifier"
            assert cli.main([*command.split(), *TINY_TEXTS.split()]) == 0
    return folder


@pytest.fixture
def here(workplace, monkeypatch, tmp_path) -> Path:
    """A copy of the workplace as the working directory."""
    shutil.copytree(workplace, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def recipes(monkeypatch) -> list:
    """The recipes that reached the trainer, which is replaced."""
    reached: list = []
    monkeypatch.setattr("vimtune.training.train", reached.append)
    return reached


def without_comment(line: str) -> str:
    return re.sub(r"\s{2,}#.*", "", line)


def test_the_documents_have_what_this_test_looks_for():
    assert len(COMMANDS) >= 18 and len(FLAGS) >= 3
    assert [(name, language) for name, language, _ in BLOCKS if language] == [
        ("README.md", "python"),
        ("README.md", "python"),
        ("README.md", "python"),
        ("README.md", "yaml"),
        ("README.md", "python"),
        ("CONTRIBUTING.md", "python"),
        ("CONTRIBUTING.md", "python"),
    ]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(DEVELOPERS_TOOLS)])
def test_what_the_tools_of_developers_name_exists(line):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[(\w+)\]", line):
        assert re.search(rf"^{extra} = \[", project, re.M)
    for path in re.findall(r"(?<![\w/])tests/[\w/.*]+", line):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(DEVELOPERS_TOOLS)])
def test_commands(line, here, request, monkeypatch):
    line = re.sub(r"^torchrun .*?(?=train_vim)", "python ", without_comment(line))
    line = re.sub(r"^python train_vim\.py", "vimtune train", line)
    program, command, *arguments = shlex.split(line)
    assert program == "vimtune" and command in cli.COMMANDS
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
        pytest.skip("test_the_onnxruntime_of_the_readme runs it")
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
    elif "flowers" in arguments or "--config" in arguments or "--task" in arguments:
        reached = request.getfixturevalue("recipes")
        assert cli.main([command, *arguments]) == 0 and len(reached) == 1
    else:
        small = "--dataset-kwargs species=3,train_per_species=4,val_per_species=2,test_per_species=2"
        data = [] if {"folder", "csv"} & set(arguments) else small.split()
        method = [] if "--rank" in arguments or "--peft" in arguments else ["--peft", "lora"]
        assert cli.main([command, *arguments, *TINY.split(), *data, *method]) == 0
        assert "report.json" in {path.name for path in here.glob("runs/*/*")}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_in_the_text(flags, here, recipes):
    assert (
        cli.main(["train", *shlex.split(flags.replace("--dataset folder", "--dataset folder --data-dir my"))])
        == 0
    )


def python_with(part: str) -> str:
    """The block of Python in README that has `part` in it."""
    (body,) = (
        body
        for name, language, body in BLOCKS
        if (name, language) == ("README.md", "python") and part in body
    )
    return body


def test_the_python_of_the_readme(here):
    body = python_with("timm.create_model")
    body = body.replace("pretrained=True", "pretrained=False")
    before, save, after = body.partition("vimtune.save_adapter")
    assert save
    namespace: dict = {}
    torch.manual_seed(0)
    exec(before, namespace)
    # "Pets" were trained on the same base weights.
    namespace["vimtune"].save_adapter(namespace["model"], "pets.safetensors")
    exec(save + after, namespace)
    assert namespace["vimtune"].list_adapters(namespace["model"]) == []
    (call,) = re.findall(r"`(vimtune\.inject\([^`]+\))`", DOCUMENTS["README.md"])
    exec(call, namespace)
    assert namespace["vimtune"].list_adapters(namespace["model"]) == ["default"]


def test_many_adapters_of_the_readme(here):
    body = python_with("forward_mixed")
    model = timm.create_model("test_vim", num_classes=5)
    for name in ("flowers", "pets"):
        vimtune.inject(model, "lora", name=name, rank=2)
    namespace = {"vimtune": vimtune, "model": model.eval(), "images": torch.randn(3, 3, 32, 32)}
    exec(body, namespace)
    assert [len(row) for row in namespace["logits"]] == [5, 5, 5]
    names = ["flowers", "pets", "both", "without_pets", "from_peft"]
    assert vimtune.list_adapters(model) == names


def test_the_language_models_of_the_readme(here):
    transformers = pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    body = python_with("create_language_model")
    changed = body.replace("state-spaces/mamba-130m-hf", "mamba_tiny")
    assert changed != body
    exec(changed, {"vimtune": vimtune})
    assert type(transformers.AutoModelForCausalLM.from_pretrained("merged")).__name__ == "MambaForCausalLM"


def test_the_onnxruntime_of_the_readme(here, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    (line,) = (without_comment(line) for line in COMMANDS if line.startswith("vimtune export"))
    assert cli.main(shlex.split(line)[1:]) == 0
    body = python_with("onnxruntime")
    for name, (width, height) in {"wide": (90, 61), "tall": (57, 200)}.items():
        coarse = Image.effect_noise((7, 5), 90).convert("RGB")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(f"{name}.png")
    predictor = vimtune.load_predictor("runs/my-run")
    capsys.readouterr()
    exec(body, {})
    (found,) = predictor.predict(["photo.jpg"])
    assert capsys.readouterr().out.strip() == found.classes[0]

    file = onnx.load("flowers.onnx")
    (stated,) = (each for each in file.metadata_props if each.key == "preprocessing")
    for change in ({}, {"crop_mode": "center", "crop_pct": 0.875, "interpolation": "bilinear"}):
        how = json.loads(stated.value) | change
        stated.value = json.dumps(how)
        onnx.save(file, "flowers.onnx")
        for name in ("wide.png", "tall.png"):
            namespace: dict = {}
            exec(body.replace("photo.jpg", name), namespace)
            expected = build_transform(**how)(load_image(name))
            # Pillow rounds once for each of two steps where one step would do.
            torch.testing.assert_close(torch.from_numpy(namespace["images"])[0], expected, rtol=0, atol=0.03)


@pytest.fixture
def method_of_contributing(monkeypatch, tmp_path) -> Path:
    """A copy of the package with the two files of CONTRIBUTING.md; this process knows their method."""
    rule, options = (b for name, language, b in BLOCKS if (name, language) == ("CONTRIBUTING.md", "python"))
    ignored = shutil.ignore_patterns("__pycache__", "fixtures")
    shutil.copytree(ROOT / "vimtune", tmp_path / "vimtune", ignore=ignored)
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    for name, text in {"adapters.rules.gain": rule, "methods.gain": options}.items():
        path = tmp_path / "vimtune" / f"{name.replace('.', '/')}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"vimtune.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"vimtune.{name}", module)
        spec.loader.exec_module(module)
    package = tmp_path / "vimtune" / "methods" / "__init__.py"
    text = package.read_text(encoding="utf-8")
    changed = re.sub(
        r"^(from vimtune\.methods import .*?)(, \w+)(  # noqa)", r"\1\2, gain\3", text, flags=re.M
    )
    assert changed != text
    package.write_text(changed, encoding="utf-8")
    return tmp_path


def test_the_method_of_contributing_is_listed_without_torch(method_of_contributing):
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vimtune", "--list"],
        cwd=method_of_contributing,
        env={**os.environ, "PYTHONPATH": str(method_of_contributing)},
        capture_output=True,
        text=True,
    )
    assert "vimtune.methods.gain" in listing.stderr and "torch" not in listing.stderr
    assert "one free factor per output channel" in listing.stdout and "start=1.0" in listing.stdout


@pytest.mark.usefixtures("method_of_contributing")
def test_the_method_of_contributing_passes_the_checks_of_every_method():
    check_method("gain")


@pytest.mark.usefixtures("method_of_contributing")
@pytest.mark.parametrize("name", ["adapters/test_methods.py", "test_configs.py"])
def test_the_generic_tests_take_the_method_of_contributing(name, monkeypatch):
    """They go over the methods that are registered when they are collected."""
    if name == "adapters/test_methods.py":
        monkeypatch.syspath_prepend(ROOT / "tests" / "adapters")
        monkeypatch.setitem(sys.modules, "method_cases", None)  # what is there now comes back in the end
        del sys.modules["method_cases"]
    spec = importlib.util.spec_from_file_location("collected_anew", ROOT / "tests" / name)
    collected = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collected)
    if name == "test_configs.py":
        collected.test_one_step_of_every_method_setting_moves_all_it_trains(collected.distinct()["gain"])
    else:
        assert ("gain", {}) in collected.CASES


def test_links_work_wherever_the_readme_is_shown():
    targets = re.findall(r"\]\(([^)]+)\)", DOCUMENTS["README.md"])
    assert targets and all(target.startswith("https://") for target in targets)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_that_are_named_exist(name):
    paths = re.findall(r"`((?:vimtune|tests|configs|benchmarks|notebooks|\.ci)/[\w/.*]*)`", DOCUMENTS[name])
    assert paths
    for path in paths:
        assert list(ROOT.glob(path)) or path.endswith("/gain.py"), path
