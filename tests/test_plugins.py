"""A package of a user's own: what it registers works on the command line like what vimtune brings."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vimtune import cli, plugins
from vimtune.data.datasets import DATASETS
from vimtune.methods import METHODS
from vimtune.models.registry import MODELS, check_model_name
from vimtune.tasks import TASKS

PACKAGE = {
    "__init__.py": "from mine import data, method, model, task\n",
    "method.py": '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import nn

from vimtune.adapters import Method, WeightRule, register_method
from vimtune.fields import option


@register_method("shift")
@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """W' = W + times * d, a number for each row."""

    summary = "one trained number for each row of a weight"
    default_targets = "out_proj"
    times: Annotated[int, Ge(1)] = option(1, "how often the number is added")

    def build_rule(self, site):
        return ShiftRule(site.weight, self.times)


class ShiftRule(WeightRule):
    def __init__(self, weight, times):
        super().__init__()
        self.times = times
        self.shift = nn.Parameter(torch.zeros(len(weight), 1))

    def effective_weight(self, weight):
        return weight + self.times * self.shift
''',
    "data.py": '''
from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from PIL import Image

from vimtune.data import ImageDataset, register_dataset


@register_dataset("shades")
class Shades(ImageDataset):
    """Two classes: dark and light."""

    summary = "dark or light"

    def __init__(self, split, data_dir, *, seed, img_size, download, images: Annotated[int, Ge(1)] = 8):
        self.split, self.img_size, self.classes = split, img_size, ["dark", "light"]
        self.targets = [index % 2 for index in range(images)]
        self.source = f"shades, {split} split"

    def load(self, index):
        return Image.new("RGB", self.img_size[::-1], (200 * self.targets[index] + index,) * 3)

    def describe(self, index):
        return f"shade {index}"
''',
}

PACKAGE["model.py"] = """
from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn

from vimtune.models import register_model
from vimtune.schema import STRICT


class Net(nn.Module):
    def __init__(self, num_classes=10, in_chans=3, width=8, img_size=32, drop_path_rate=0.0):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_chans, width, 3, 2, 1)
        self.out_proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, num_classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(torch.nn.functional.gelu(self.out_proj(self.stem(x).mean((2, 3)))))


default_cfgs = timm.models.generate_default_cfgs(
    {"small_net": {"num_classes": 10, "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
                   "classifier": "fc"}}
)


@timm.models.register_model
def small_net(pretrained=False, **options):
    return timm.models.build_model_with_cfg(Net, "small_net", pretrained, **options)


@dataclass(frozen=True, kw_only=True)
class NetOptions:
    __pydantic_config__ = STRICT
    num_classes: int = 10
    width: int = 8
    img_size: int = 32
    drop_path_rate: float = 0.0


register_model("small_net", summary="a small net", options=NetOptions)
"""

PACKAGE["task.py"] = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vimtune.fields import option
from vimtune.tasks import register_task
from vimtune.tasks.classification import Classification


@register_task("calm")
@dataclass(frozen=True, kw_only=True)
class Calm(Classification):
    summary = "classification whose best epoch is that of the lowest loss"
    steepness: Annotated[float, Ge(0)] = option(1.0, "how much the loss counts")

    def rank(self, loss, scores):
        return (-self.steepness * loss,)
"""

TINY = (
    "--model small_net --no-pretrained --epochs 1 --warmup-epochs 0 --batch-size 4 --device cpu "
    "--transforms torchvision --no-pictures"
)
COMMAND = "import sys; sys.path.remove(''); from vimtune.cli import main; sys.exit(main())"
"""What the installed command `vimtune` does."""
MINE = (
    "--dataset shades --dataset-kwargs images=6 --peft shift --peft-kwargs times=2 --task calm --steepness 3"
)


# timm, too, keeps what it has registered; its registry warns when the package is imported again.
pytestmark = pytest.mark.filterwarnings("ignore:Overwriting small_net in registry")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with the package in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "mine").mkdir()
    for name, text in PACKAGE.items():
        (folder / "mine" / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def run_folder(folder) -> Path:
    """A run that was made with the package, by a process that reads images in another one.

    `folder` is on the path of none of them. The other tests do in this process what such a command does.
    """
    arguments = f"train --import mine {TINY} {MINE} --num-workers 1 --output-dir run"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def vimtune(folder, monkeypatch, capsys) -> Iterator[Callable[[str], Ended]]:
    """Runs commands in `folder`. Each begins without the package: what was imported before is forgotten."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    path, registries = [entry for entry in sys.path if entry], (METHODS, MODELS, DATASETS, TASKS)
    before = [dict(registry._things) for registry in registries]

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in ("mine", "broken")]:
            del sys.modules[name]
        for registry, things in zip(registries, before, strict=True):
            monkeypatch.setattr(registry, "_things", dict(things))
        monkeypatch.setattr(sys, "path", list(path))
        monkeypatch.setattr(plugins, "_failures", None)
        monkeypatch.setattr(plugins, "_imported", [])  # each command is a process of its own
        importlib.invalidate_caches()

    def run(arguments: str, installed: bool = False) -> Ended:
        forget()
        if installed:
            sys.path.insert(0, str(folder))
        code = cli.main(arguments.split())
        return Ended(code, *capsys.readouterr())

    yield run
    forget()


@pytest.mark.parametrize(
    "flags", ["--import mine --list", "--list --import=mine", "train --list --import mine"]
)
def test_a_list_shows_what_the_package_adds(vimtune, flags):
    done = vimtune(flags)
    assert done.code == 0, done.stderr
    for words in ("shift", "one trained number", "times=1", "shades", "images=8", "small_net", "calm"):
        assert words in done.stdout


def test_a_run_of_the_package_is_like_any_other(run_folder):
    report = json.loads((run_folder / "report.json").read_text())
    assert report["method"] == "shift" and report["recipe"]["peft_kwargs"] == {"times": 2}
    assert report["recipe"]["task"] == "calm" and report["recipe"]["steepness"] == 3.0


def test_a_run_of_the_package_is_continued(vimtune, run_folder):
    done = vimtune("train --resume run --import mine --epochs 2 --num-workers 0")
    assert done.code == 0, done.stderr
    assert json.loads((run_folder / "report.json").read_text())["recipe"]["epochs"] == 2


def test_files_of_the_package_are_used_by_the_other_commands(vimtune, folder, run_folder):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "dark.png")
    done = vimtune("predict dark.png --adapter run --import mine")
    assert done.code == 0, done.stderr
    assert "dark" in done.stdout
    done = vimtune("merge run -o merged.safetensors --import mine")
    assert done.code == 0, done.stderr


def test_a_stopped_run_says_how_to_continue_with_the_package(vimtune, folder):
    (folder / "gone.py").write_text(
        "import errno\n"
        "from mine.data import Shades\n"
        "def load(self, index):\n"
        "    raise OSError(errno.EIO, 'Input/output error')\n"
        "Shades.load = load\n"
    )
    done = vimtune(f"train --import mine --import gone {TINY} {MINE} --num-workers 0 --output-dir stopped")
    assert done.code == 2
    _, _, command = done.stderr.strip().partition("continue with: ")
    assert command == "vimtune train --resume stopped --import mine,gone"
    assert vimtune(command.removeprefix("vimtune ").replace(",gone", "")).code == 0


def test_a_model_of_a_package_that_is_not_imported():
    """A file's model may be one of a package, such as a teacher's."""
    with pytest.raises(ValueError, match=r"found 'a_net'.*is known once it is imported \(--import\)"):
        check_model_name("a_net")


@pytest.mark.parametrize("command", ["train --resume run --epochs 3", "predict dark.png --adapter run"])
def test_without_the_import_the_reason_is_given(vimtune, run_folder, command):
    done = vimtune(command)
    assert done.code == 2
    assert "'shift'" in done.stderr and "import" in done.stderr


def test_values_of_the_package_are_checked_with_the_others(vimtune):
    done = vimtune(
        f"train --import mine {TINY} --dataset shades --dataset-kwargs images=0 --peft shift "
        "--peft-kwargs times=0 --lr -1",
    )
    assert done.code == 2
    for words in ("error: 3 problems", "images=0", "times = 0: expected a whole number >= 1", "lr = '-1'"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --import nothing_here", "package 'nothing_here' cannot be imported (ModuleNotFoundError"),
        (
            "predict x.png --adapter a --import mine,broken",
            "package 'broken' cannot be imported (ZeroDivision",
        ),
        ("train --import", "--import: expected one argument"),
    ],
)
def test_packages_that_cannot_be_imported(vimtune, folder, arguments, words):
    (folder / "broken.py").write_text("1 / 0\n")
    done = vimtune(arguments)
    assert done.code == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_installed_package_needs_no_flag(vimtune, folder):
    """An entry point in the group of plugins is imported; one that fails is named and stops nobody else."""
    metadata = folder / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    points = "[vimtune.plugins]\nmine = mine\nbad = nothing_here\n"
    (metadata / "entry_points.txt").write_text(points)
    done = vimtune("--list", installed=True)
    assert done.code == 0, done.stderr
    assert "shift" in done.stdout and "shades" in done.stdout and "small_net" in done.stdout
    assert "nothing_here cannot be loaded" in done.stderr
    done = vimtune("train --peft shfit", installed=True)
    assert done.code == 2
    assert "Did you mean 'shift'" in done.stderr and "Package bad cannot be loaded" in done.stderr
    shutil.rmtree(metadata)


def test_a_file_does_not_import(vimtune, folder):
    (folder / "recipe.yaml").write_text("import: mine\npackages: mine\nepochs: 1\n")
    done = vimtune("train --config recipe.yaml")
    assert done.code == 2
    assert "unknown key 'import'" in done.stderr and "unknown key 'packages'" in done.stderr
