"""The recipe: everything that defines a training run, as one validated table.

Each field of `Recipe` is at once a YAML key, a command-line flag (`_` becomes `-`) and a line of
the help text. Whatever the source of a value, it is parsed and checked by the field's own parser;
all problems of a recipe are reported together. Nothing here imports torch, so `--help` and a
misspelt flag answer at once.
"""

# ruff: noqa: RUF009 - _setting() is dataclasses.field() with our metadata, not a shared default

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vimtune import catalog, options, parsers
from vimtune.config_files import read_config
from vimtune.strict_yaml import read_yaml
from vimtune.text import printable, quote
from vimtune.utils import atomic_write, suggest

RUN_FILES = ("recipe.yaml", "report.json", "metrics.jsonl", "adapter.safetensors", "checkpoint.safetensors")
GROUPS = ("data", "model", "method", "optimisation", "run")
_OWN_FOLDERS = ("data_dir", "output_dir", "resume")
"""Fields that name folders of the computer on which the run is."""


class RecipeError(ValueError):
    """A recipe that cannot run; `problems` lists every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [printable(problem) for problem in problems]
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems in the recipe:\n" + "\n".join(
                f"  - {problem}" for problem in self.problems
            )
        super().__init__(message)


def _methods(value: Any) -> str:
    parse = parsers.known("method, or several joined by '+'", catalog.METHODS)
    parts = [part.strip() for part in parsers.text(value).split("+")]
    for part in parts:
        parse(part)
    if len(set(parts)) < len(parts):
        raise ValueError("expected every method once")
    return "+".join(parts)


def _setting(group: str, default: Any, parse: parsers.Parser, help: str) -> Any:
    metadata = {"group": group, "parse": parse, "help": help}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run. Building one checks it; `RecipeError` lists all problems."""

    # --- data
    dataset: str = _setting(
        "data", "synthetic_flowers", parsers.known("data set", catalog.DATASETS), "data set (see --list)"
    )
    data_dir: str | None = _setting(
        "data", None, parsers.optional(parsers.absolute_path), "folder of the data set's files"
    )
    train_split: str = _setting(
        "data", "train", parsers.choice("train", "train+val"), "images to train on: train, train+val"
    )
    eval_split: str | None = _setting(
        "data",
        None,
        parsers.optional(parsers.choice("val", "test")),
        "evaluated while training: val, test (default: val if not trained on)",
    )
    dataset_kwargs: dict[str, Any] = _setting(
        "data", {}, parsers.mapping, "further options of the data set, such as species=20"
    )
    data_seed: int = _setting(
        "data", 0, parsers.integer(0, 2**63 - 1), "seed of splits that are drawn and of generated images"
    )
    download: bool = _setting("data", True, parsers.boolean, "download a data set that is not there yet")
    num_workers: int = _setting("data", 2, parsers.integer(0, 1024), "processes that prepare images")
    cache: bool = _setting("data", False, parsers.boolean, "keep decoded images in memory")
    on_corrupt: str = _setting(
        "data", "error", parsers.choice("error", "skip"), "an unreadable image: error (stop), skip (report)"
    )
    augmentation: str = _setting(
        "data", "light", parsers.choice("none", "light", "strong"), "augmentation: none, light, strong"
    )
    transforms: str = _setting(
        "data",
        "albumentations",
        parsers.choice("albumentations", "torchvision"),
        "library of the transforms: albumentations, torchvision",
    )
    mixup: float = _setting("data", 0.0, parsers.number(0), "mixup alpha, 0 = off")
    cutmix: float = _setting("data", 0.0, parsers.number(0), "cutmix alpha, 0 = off")

    # --- model
    model: str = _setting(
        "model", "vim_nano_patch8_64", parsers.known("model", catalog.MODELS), "model (see --list)"
    )
    pretrained: bool = _setting("model", True, parsers.boolean, "start from the model's published weights")
    checkpoint: str | None = _setting(
        "model",
        None,
        parsers.optional(parsers.absolute_path),
        "start from this .pth/.safetensors file instead",
    )
    img_size: int | list[int] | None = _setting(
        "model", None, parsers.optional(parsers.image_size), "image size, N or HxW (default: the model's own)"
    )
    drop_path: float = _setting("model", 0.0, parsers.number(0, 1, below=True), "stochastic depth rate")
    model_kwargs: dict[str, Any] = _setting("model", {}, parsers.mapping, "further options of the model")

    # --- method
    peft: str = _setting("method", "prodial", _methods, "method (see --list), or several: lora+bitfit")
    targets: str | list[str] | dict[str, Any] | None = _setting(
        "method",
        None,
        parsers.optional(parsers.per_method(parsers.targets)),
        "tuned: both, in_proj, out_proj, or a list; by method: lora=both,ft=D",
    )
    layers: list[int] | dict[str, Any] | None = _setting(
        "method",
        None,
        parsers.optional(parsers.per_method(parsers.layers)),
        "tuned blocks, such as 0-11 or 0,5,10 (default: all)",
    )
    rank: int | None = _setting(
        "method", None, parsers.optional(parsers.integer(1)), "rank of low-rank updates"
    )
    alpha: float | None = _setting(
        "method",
        None,
        parsers.optional(parsers.number(0, above=True)),
        "scale of low-rank updates: alpha / rank",
    )
    dropout: float | None = _setting(
        "method", None, parsers.optional(parsers.number(0, 1, below=True)), "dropout on the adapter's input"
    )
    block_size: int | None = _setting(
        "method", None, parsers.optional(parsers.integer(1)), "size of the diagonal blocks of prodial"
    )
    peft_kwargs: dict[str, Any] = _setting(
        "method", {}, parsers.mapping, "further fields of the method, such as variant=paper"
    )

    # --- optimisation
    epochs: int = _setting("optimisation", 10, parsers.integer(1), "passes over the training images")
    batch_size: int = _setting(
        "optimisation", 64, parsers.integer(1), "images per step, over all processes together"
    )
    lr: float = _setting("optimisation", 1e-3, parsers.number(0, above=True), "peak learning rate")
    min_lr: float = _setting("optimisation", 0.0, parsers.number(0), "learning rate at the end of the cosine")
    head_lr: float | None = _setting(
        "optimisation",
        None,
        parsers.optional(parsers.number(0, above=True)),
        "peak learning rate of the head (default: that of --lr)",
    )
    weight_decay: float = _setting("optimisation", 0.01, parsers.number(0), "AdamW weight decay")
    betas: list[float] = _setting("optimisation", [0.9, 0.999], parsers.betas, "AdamW betas")
    warmup_epochs: float = _setting("optimisation", 1.0, parsers.number(0), "epochs of linear warm-up")
    clip_grad: float = _setting(
        "optimisation", 1.0, parsers.number(0), "largest gradient norm, 0 = no clipping"
    )
    grad_accum: int = _setting(
        "optimisation", 1, parsers.integer(1), "batches whose gradients make one update"
    )
    label_smoothing: float = _setting(
        "optimisation", 0.0, parsers.number(0, 1, below=True), "label smoothing of the loss"
    )
    ema: float = _setting(
        "optimisation", 0.0, parsers.number(0, 1, below=True), "decay of the weights' moving average, 0 = off"
    )
    early_stop: int = _setting(
        "optimisation",
        0,
        parsers.integer(0),
        "stop after this many evaluations without a better one, 0 = off",
    )
    amp: str = _setting(
        "optimisation", "none", parsers.choice("none", "bf16", "fp16"), "mixed precision: none, bf16, fp16"
    )
    grad_checkpointing: bool = _setting(
        "optimisation", False, parsers.boolean, "recompute activations: less memory, more time"
    )
    compile: bool = _setting("optimisation", False, parsers.boolean, "use torch.compile")
    cuda_graph: str = _setting(
        "optimisation",
        "auto",
        parsers.choice("auto", "on", "off"),
        "replay batches as a CUDA graph: auto (where possible), on, off",
    )

    # --- run
    seed: int = _setting("run", 0, parsers.integer(0, 2**63 - 1), "seed of weights, order and augmentation")
    deterministic: bool = _setting("run", False, parsers.boolean, "use deterministic algorithms only")
    device: str = _setting("run", "auto", parsers.device, "auto, cpu, cuda, cuda:1, mps")
    backend: str = _setting(
        "run",
        "auto",
        parsers.choice("auto", "torch", "cpu", "nvrtc", "triton", "cuda", "reference"),
        "selective scan: auto, torch, cpu, nvrtc, triton, cuda, reference",
    )
    threads: int | None = _setting(
        "run", None, parsers.optional(parsers.integer(1, 4096)), "CPU threads (default: torch's own)"
    )
    output_dir: str | None = _setting(
        "run",
        None,
        parsers.optional(parsers.path),
        "run folder (default: runs/<dataset>-<model>-<method>-<time>)",
    )
    resume: str | None = _setting(
        "run",
        None,
        parsers.optional(parsers.path),
        "continue this run folder or checkpoint; auto: that in output_dir, or start",
    )
    force: bool = _setting(
        "run", False, parsers.boolean, "resume although images or base weights have changed"
    )
    log_interval: int = _setting("run", 10, parsers.integer(1), "steps between two log lines")
    eval_interval: int = _setting("run", 1, parsers.integer(1), "epochs between two evaluations")

    METHOD_FLAGS: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "block_size")

    def __post_init__(self) -> None:
        problems, wrong = [], set()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](value))
            except ValueError as error:
                problems.append(f"{field.name} = {quote(value)}: {error}")
                wrong.add(field.name)
        problems += self._contradictions(wrong)
        if problems:
            raise RecipeError(problems)

    def _contradictions(self, wrong: set[str]) -> list[str]:
        """Problems between fields; rules that read a field in `wrong` are left out."""
        problems = []
        if (
            not wrong & {"train_split", "eval_split"}
            and self.train_split != "train"
            and self.eval_split == "val"
        ):
            problems.append("eval_split = 'val' is trained on (train_split = 'train+val'): use test")
        if not wrong & {"dataset", "data_dir"} and self.dataset == "folder" and self.data_dir is None:
            problems.append("dataset = 'folder' needs data_dir: the folder with one subfolder per class")
        if not wrong & {"resume", "output_dir"} and self.resume == "auto" and self.output_dir is None:
            problems.append("resume = 'auto' needs output_dir: the folder to continue or start in")
        if not wrong & {"lr", "min_lr"} and self.min_lr > self.lr:
            problems.append(f"min_lr = {self.min_lr:g} is larger than lr = {self.lr:g}")
        if not wrong & {"epochs", "warmup_epochs"} and self.warmup_epochs > self.epochs:
            problems.append(
                f"warmup_epochs = {self.warmup_epochs:g} is longer than the run (epochs = {self.epochs})"
            )
        if not wrong & {"amp", "device"} and self.amp == "fp16" and self.device == "cpu":
            problems.append("amp = 'fp16' needs a GPU: use bf16 or none on the CPU")
        for key in options.RESERVED:
            if key not in wrong:
                problems += options.reserved_problems(key, getattr(self, key))
        if "model_kwargs" not in wrong:
            problems += options.model_problems(self.model_kwargs)
        if "peft" not in wrong:
            problems += self._method_problems(wrong)
        return problems

    def _method_problems(self, wrong: set[str]) -> list[str]:
        problems = []
        methods = self.peft.split("+")
        flags = {name: getattr(self, name) for name in self.METHOD_FLAGS if name not in wrong}
        flags = {name: value for name, value in flags.items() if value is not None}
        fields = options.method_fields(methods)
        problems += [
            options.not_a_field(name, flags[name], self.peft, fields) for name in flags.keys() - fields
        ]
        if "peft_kwargs" not in wrong:
            twice = flags.keys() & self.peft_kwargs.keys()
            problems += [f"{name} is given twice: as {name} and in peft_kwargs" for name in twice]
            parsed, more = options.parse_method_options(self.peft, self.peft_kwargs)
            object.__setattr__(self, "peft_kwargs", parsed)
            problems += more
        for key in {"targets", "layers"} - wrong:
            by_method = getattr(self, key)
            problems += [
                f"{key}: {quote(name)} is not one of the methods of {self.peft}.{suggest(name, methods)}"
                for name in (by_method if isinstance(by_method, dict) else ())
                if name not in methods
            ]
        return sorted(problems)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from YAML values and flag strings; all errors in one `RecipeError`."""
        names = [field.name for field in dataclasses.fields(cls)]
        problems = [
            f"unknown key {quote(key)}.{suggest(key, names) if isinstance(key, str) else ''}"
            for key in values
            if key not in names
        ]
        known = {key: value for key, value in values.items() if key in names}
        try:
            recipe = cls(**known)
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError(problems)
        return recipe

    @property
    def method_kwargs(self) -> dict[str, Any]:
        """Fields of the method as given: `peft_kwargs` and the flags rank, alpha, dropout, block_size."""
        flags = {name: getattr(self, name) for name in self.METHOD_FLAGS}
        return {**self.peft_kwargs, **{name: value for name, value in flags.items() if value is not None}}

    @property
    def selection_split(self) -> str:
        """The split evaluated during training: `eval_split`, or its default."""
        return self.eval_split or ("test" if self.train_split == "train+val" else "val")

    def run_dir(self) -> Path:
        """`output_dir`, or a new name under runs/ made of data set, model, method and the time."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        moment = time.strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{self.dataset}-{self.model}-{self.peft}-{moment}"

    def check_paths(self) -> None:
        """Raise `RecipeError` when a path of the recipe cannot be used (see `path_problems`)."""
        if problems := path_problems(self.to_dict()):
            raise RecipeError(problems)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values; `Recipe.from_values(recipe.to_dict()) == recipe`."""
        return dataclasses.asdict(self)

    def to_share(self) -> dict[str, Any]:
        """`to_dict` for a file that is passed on: no folders of this computer, of the checkpoint its name."""
        values = {name: value for name, value in self.to_dict().items() if name not in _OWN_FOLDERS}
        return values if self.checkpoint is None else {**values, "checkpoint": Path(self.checkpoint).name}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML, atomically."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        atomic_write(path, write)


def path_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems with the folders and files a recipe names, found before any heavy work.

    `data_dir` and `checkpoint` must exist; `output_dir` must be writable and, unless the run is
    resumed, must not hold the results of another run. With several processes, call it before the
    first of them writes.
    """
    checks = {"data_dir": _data_dir_problem, "checkpoint": _checkpoint_problem, "output_dir": _output_problem}
    problems = []
    for name, check in checks.items():
        try:
            path = parsers.optional(parsers.path)(values.get(name))
            problem = None if path is None else check(Path(path), values)
        except ValueError:
            continue  # no path at all: the field's own parser says it
        except OSError as error:  # a name too long, a folder that may not be searched
            problem = f": {error.strerror}"
        if problem is not None:
            problems.append(f"{name} = {quote(path)}{problem}")
    return problems


def _data_dir_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    may_come = values.get("download", True) and not path.exists()
    return None if path.is_dir() or may_come else " is not a folder"


def _checkpoint_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    return None if path.is_file() else " is not a file"


def _output_problem(path: Path, values: Mapping[str, Any]) -> str | None:
    existing = next(folder for folder in (path, *path.absolute().parents) if _is_there(folder))
    if not existing.is_dir():
        return f": {quote(str(existing))} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f": {quote(str(existing))} is not writable"
    if values.get("resume") is None and any((path / name).exists() for name in RUN_FILES):
        return f" holds another run: choose another folder, or continue that run with --resume {path}"
    return None


def _is_there(path: Path) -> bool:
    """Whether anything has this name, also a link that leads nowhere. Other failures are raised."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def complete_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of an earlier run, with the keys it lacks set to what vimtune did when it was stored."""
    return {"data_seed": values.get("seed", 0), **values}  # one seed drew everything


def load_recipe(
    config: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Recipe:
    """The recipe of a run: defaults, then the YAML file `config`, then `overrides` (flags).

    With `resume` among the values, the recipe of that run comes before `config`, and its folder is
    the output folder: `load_recipe(None, {"resume": "runs/x"})` is all it takes to continue. With
    `resume` = "auto" that run is the one in `output_dir`, if there is one. A relative path is relative
    to the working directory, in a file, too. Paths are checked as well. `variant` names one recipe of a file
    that is a grid of them (`vimtune.config_files`).

    Raises:
        RecipeError: the file, the values or the paths; it has every problem that was found.
    """
    if config is None and variant is not None:
        raise RecipeError([f"variant = {quote(variant)} needs config: the file with the grid"])
    values = {} if config is None else _read("config", config, partial(read_config, variant=variant))
    values |= overrides or {}
    problems: list[str] = []
    try:
        resumed = _resumed(values)
    except RecipeError as error:
        problems += error.problems
    else:
        values = resumed | values
    problems += path_problems(values)
    try:
        recipe = Recipe.from_values(values)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from error
    if problems:
        raise RecipeError(problems)
    return recipe


def _read(
    name: str, path: str | os.PathLike[str], read: Callable[[str], dict[str, Any]] = read_yaml
) -> dict[str, Any]:
    """What `read` finds in the YAML file that the value `name` points at."""
    try:
        path = parsers.path(path)
    except ValueError as error:
        raise RecipeError([f"{name} = {quote(path)}: {error}"]) from error
    try:
        return read(path)
    except ValueError as error:
        raise RecipeError([str(error)]) from error


def _resumed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the run states that `resume` asks to continue: its recipe, and its folder as `output_dir`."""
    try:
        resume = parsers.optional(parsers.path)(values.get("resume"))
        path = parsers.optional(parsers.path)(values.get("output_dir")) if resume == "auto" else resume
    except ValueError:
        return {}  # no path at all: the field's own parser says it
    if path is None:
        return {}
    try:
        folder = Path(path) if resume == "auto" or os.path.isdir(path) else Path(path).parent
        if not (folder / "recipe.yaml").is_file():
            if resume == "auto":
                return {}  # nothing has begun there: the run starts
            what = "is no run folder: it has no recipe.yaml" if os.path.lexists(path) else "does not exist"
            raise RecipeError([f"resume = {quote(path)} {what}"])
    except OSError as error:
        raise RecipeError([f"resume = {quote(path)}: {error.strerror}"]) from error
    return complete_stored(_read("resume", folder / "recipe.yaml")) | {"output_dir": str(folder)}
