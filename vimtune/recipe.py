"""The recipe: everything that defines a training run, as one validated table.

Each field of `Recipe` is at once a YAML key, a command-line flag (`_` becomes `-`) and a line of
the help text. Whatever the source of a value, it is parsed and checked by the field's own parser;
all problems of a recipe are reported together. Nothing here imports torch, so `--help` and a
misspelt flag answer at once.
"""

# ruff: noqa: RUF009 - _setting() is dataclasses.field() with our metadata, not a shared default

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vimtune import catalog
from vimtune.utils import atomic_write, suggest

RUN_FILES = ("recipe.yaml", "report.json", "metrics.jsonl", "adapter.safetensors", "checkpoint.safetensors")
GROUPS = ("data", "model", "method", "optimisation", "run")

Parser = Callable[[Any], Any]


class RecipeError(ValueError):
    """A recipe that cannot run; `problems` lists every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems in the recipe:\n" + "\n".join(
                f"  - {problem}" for problem in self.problems
            )
        super().__init__(message)


# ---------------------------------------------------------------------------------------------
# Parsers: value as it comes from Python, YAML or a flag -> value as the field holds it.
# Each raises ValueError("expected ...") and is idempotent.


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Parser:
    """Float in [low, high]; `above`/`below` make the bound an open one."""
    lower = f"> {low:g}" if above else f">= {low:g}"
    upper = f"< {high:g}" if below else f"<= {high:g}"
    expected = "a number " + " and ".join(
        text for text, bound in ((lower, low), (upper, high)) if math.isfinite(bound)
    )

    def parse(value: Any) -> float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"expected {expected}") from None
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"expected {expected}")
        if value < low or value > high or (above and value == low) or (below and value == high):
            raise ValueError(f"expected {expected}")
        return float(value)

    return parse


def _integer(low: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"expected a whole number >= {low}")
        return value

    return parse


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in {"true", "yes", "on", "false", "no", "off"}:
        return value.lower() in {"true", "yes", "on"}
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    return value


def _choice(*options: str) -> Parser:
    def parse(value: Any) -> str:
        if value is False and "none" in options:  # YAML 1.1 reads `off` and `no` as false
            return "none"
        if value not in options:
            raise ValueError(f"expected one of {', '.join(options)}.{suggest(str(value), options)}")
        return str(value)

    return parse


def _known(kind: str, table: Mapping[str, str]) -> Parser:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in table:
            raise ValueError(f"expected a known {kind}: {', '.join(table)}.{suggest(str(value), table)}")
        return value

    return parse


def _methods(value: Any) -> str:
    parse = _known("method, or several joined by '+'", catalog.METHODS)
    parts = [part.strip() for part in _text(value).split("+")]
    for part in parts:
        parse(part)
    if len(set(parts)) < len(parts):
        raise ValueError("expected every method once")
    return "+".join(parts)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and "=" in value:  # --peft-kwargs variant=paper,rank=8
        pairs = [pair.partition("=") for pair in value.split(",")]
        value = {key.strip(): yaml.safe_load(text) for key, _, text in pairs}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("expected a mapping such as '{name: value}' or name=value,name=value")
    return dict(value)


def _image_size(value: Any) -> int | list[int]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[x,\s]+", value.strip()) if part]
        value = value[0] if len(value) == 1 else value
    try:
        if isinstance(value, list | tuple):
            height, width = (_integer(1)(side) for side in value)
            return [height, width]
        return _integer(1)(value)
    except ValueError:
        raise ValueError("expected pixels such as 224, or height and width such as [64, 96]") from None


def _targets(value: Any) -> str | list[str]:
    if isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x for x in value):
        raise ValueError("expected both, in_proj, out_proj, or a list of target names")
    return list(value)


def _layers(value: Any) -> list[int]:
    expected = "expected block indices such as [0, 1, 2], or 0,1,2, or 0-11"
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        indices: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
            if match is None:
                raise ValueError(expected)
            first = int(match[1])
            indices += range(first, int(match[2] or first) + 1)
        value = indices
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(expected)
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value):
        raise ValueError(expected)
    return list(value)


def _betas(value: Any) -> list[float]:
    parts = value.split(",") if isinstance(value, str) else value
    parse = _number(0, 1, below=True)
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError("expected two numbers such as [0.9, 0.999]")
    return [parse(part) for part in parts]


def _optional(parse: Parser) -> Parser:
    def parse_optional(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in {"none", "null"}):
            return None
        return parse(value)

    return parse_optional


# ---------------------------------------------------------------------------------------------


def _setting(group: str, default: Any, parse: Parser, help: str) -> Any:
    metadata = {"group": group, "parse": parse, "help": help}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run. Building one checks it; `RecipeError` lists all problems."""

    # --- data
    dataset: str = _setting(
        "data", "synthetic_flowers", _known("data set", catalog.DATASETS), "data set (see --list)"
    )
    data_dir: str | None = _setting("data", None, _optional(_text), "folder of the data set's files")
    train_split: str = _setting(
        "data", "train", _choice("train", "train+val"), "images to train on: train, train+val"
    )
    eval_split: str | None = _setting(
        "data",
        None,
        _optional(_choice("val", "test")),
        "images evaluated during training: val, test (default: val, or test when val is trained on)",
    )
    dataset_kwargs: dict[str, Any] = _setting(
        "data", {}, _mapping, "further options of the data set, such as num_classes=20"
    )
    download: bool = _setting("data", True, _boolean, "download a data set that is not there yet")
    num_workers: int = _setting("data", 2, _integer(0), "processes that prepare images")
    cache: bool = _setting("data", False, _boolean, "keep decoded images in memory")
    on_corrupt: str = _setting(
        "data", "error", _choice("error", "skip"), "an unreadable image: error (stop), skip (report)"
    )
    augmentation: str = _setting(
        "data", "light", _choice("none", "light", "strong"), "augmentation: none, light, strong"
    )
    transforms: str = _setting(
        "data",
        "albumentations",
        _choice("albumentations", "torchvision"),
        "library of the transforms: albumentations, torchvision",
    )
    mixup: float = _setting("data", 0.0, _number(0), "mixup alpha, 0 = off")
    cutmix: float = _setting("data", 0.0, _number(0), "cutmix alpha, 0 = off")

    # --- model
    model: str = _setting(
        "model", "vim_nano_patch8_64", _known("model", catalog.MODELS), "model (see --list)"
    )
    pretrained: bool = _setting("model", True, _boolean, "start from the model's published weights")
    checkpoint: str | None = _setting(
        "model", None, _optional(_text), "start from this .pth/.safetensors file instead"
    )
    img_size: int | list[int] | None = _setting(
        "model", None, _optional(_image_size), "image size, N or HxW (default: the model's own)"
    )
    drop_path: float = _setting("model", 0.0, _number(0, 1, below=True), "stochastic depth rate")
    model_kwargs: dict[str, Any] = _setting("model", {}, _mapping, "further options of the model")

    # --- method
    peft: str = _setting("method", "prodial", _methods, "method (see --list), or several: lora+bitfit")
    targets: str | list[str] | None = _setting(
        "method", None, _optional(_targets), "tuned projectors: both, in_proj, out_proj, or a list"
    )
    layers: list[int] | None = _setting(
        "method", None, _optional(_layers), "tuned blocks, such as 0-11 or 0,5,10 (default: all)"
    )
    rank: int | None = _setting("method", None, _optional(_integer(1)), "rank of low-rank updates")
    alpha: float | None = _setting(
        "method", None, _optional(_number(0, above=True)), "scale of low-rank updates: alpha / rank"
    )
    dropout: float | None = _setting(
        "method", None, _optional(_number(0, 1, below=True)), "dropout on the adapter's input"
    )
    block_size: int | None = _setting(
        "method", None, _optional(_integer(1)), "size of the diagonal blocks of prodial"
    )
    peft_kwargs: dict[str, Any] = _setting(
        "method", {}, _mapping, "further fields of the method, such as variant=paper"
    )

    # --- optimisation
    epochs: int = _setting("optimisation", 10, _integer(1), "passes over the training images")
    batch_size: int = _setting(
        "optimisation", 64, _integer(1), "images per step, over all processes together"
    )
    lr: float = _setting("optimisation", 1e-3, _number(0, above=True), "peak learning rate")
    min_lr: float = _setting("optimisation", 0.0, _number(0), "learning rate at the end of the cosine")
    head_lr: float | None = _setting(
        "optimisation",
        None,
        _optional(_number(0, above=True)),
        "peak learning rate of the head (default: that of --lr)",
    )
    weight_decay: float = _setting("optimisation", 0.01, _number(0), "AdamW weight decay")
    betas: list[float] = _setting("optimisation", [0.9, 0.999], _betas, "AdamW betas")
    warmup_epochs: float = _setting("optimisation", 1.0, _number(0), "epochs of linear warm-up")
    clip_grad: float = _setting("optimisation", 1.0, _number(0), "largest gradient norm, 0 = no clipping")
    grad_accum: int = _setting("optimisation", 1, _integer(1), "batches whose gradients make one update")
    label_smoothing: float = _setting(
        "optimisation", 0.0, _number(0, 1, below=True), "label smoothing of the loss"
    )
    ema: float = _setting(
        "optimisation", 0.0, _number(0, 1, below=True), "decay of the weights' moving average, 0 = off"
    )
    early_stop: int = _setting(
        "optimisation", 0, _integer(0), "stop after this many evaluations without a better one, 0 = off"
    )
    amp: str = _setting(
        "optimisation", "none", _choice("none", "bf16", "fp16"), "mixed precision: none, bf16, fp16"
    )
    grad_checkpointing: bool = _setting(
        "optimisation", False, _boolean, "recompute activations: less memory, more time"
    )
    compile: bool = _setting("optimisation", False, _boolean, "use torch.compile")

    # --- run
    seed: int = _setting("run", 0, _integer(0), "seed of everything random")
    deterministic: bool = _setting("run", False, _boolean, "use deterministic algorithms only")
    device: str = _setting("run", "auto", _text, "auto, cpu, cuda, cuda:1, mps")
    backend: str = _setting(
        "run",
        "auto",
        _choice("auto", "torch", "cpu", "triton", "cuda", "reference"),
        "selective scan: auto, torch, cpu, triton, cuda, reference",
    )
    threads: int | None = _setting("run", None, _optional(_integer(1)), "CPU threads (default: torch's own)")
    output_dir: str | None = _setting(
        "run", None, _optional(_text), "run folder (default: runs/<dataset>-<model>-<method>-<time>)"
    )
    resume: str | None = _setting("run", None, _optional(_text), "continue this run folder or checkpoint")
    log_interval: int = _setting("run", 10, _integer(1), "steps between two log lines")
    eval_interval: int = _setting("run", 1, _integer(1), "epochs between two evaluations")

    METHOD_FLAGS: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "block_size")

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](value))
            except ValueError as error:
                problems.append(f"{field.name} = {value!r}: {error}")
        # Rules between fields mean something only once each field by itself is right.
        problems += [] if problems else self._contradictions()
        if problems:
            raise RecipeError(problems)

    def _contradictions(self) -> list[str]:
        problems = []
        if self.train_split == "train+val" and self.eval_split == "val":
            problems.append("eval_split = 'val' is trained on (train_split = 'train+val'): use test")
        if self.dataset == "folder" and self.data_dir is None:
            problems.append("dataset = 'folder' needs data_dir: the folder with one subfolder per class")
        if self.min_lr > self.lr:
            problems.append(f"min_lr = {self.min_lr:g} is larger than lr = {self.lr:g}")
        if self.warmup_epochs > self.epochs:
            problems.append(
                f"warmup_epochs = {self.warmup_epochs:g} is longer than the run (epochs = {self.epochs})"
            )
        if self.amp == "fp16" and self.device == "cpu":
            problems.append("amp = 'fp16' needs a GPU: use bf16 or none on the CPU")
        return problems + self._method_problems()

    def _method_problems(self) -> list[str]:
        allowed: dict[str, Any] = {}
        for method in self.peft.split("+"):
            allowed |= catalog.METHOD_FIELDS[method]
        fields = f"the fields of {self.peft} are: {', '.join(allowed) or '(none)'}"
        problems = []
        for name in self.METHOD_FLAGS:
            if getattr(self, name) is None:
                continue
            if name not in allowed:
                problems.append(f"{name} = {getattr(self, name)!r} is not used by {self.peft}; {fields}")
            elif name in self.peft_kwargs:
                problems.append(f"{name} is given twice: as {name} and in peft_kwargs")
        problems += [
            f"peft_kwargs: {name!r} is not a field of {self.peft};{suggest(name, allowed)} {fields}"
            for name in self.peft_kwargs
            if name not in allowed
        ]
        return problems

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from YAML values and flag strings; all errors in one `RecipeError`."""
        names = [field.name for field in dataclasses.fields(cls)]
        problems = [f"unknown key {key!r}.{suggest(str(key), names)}" for key in values if key not in names]
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML, atomically."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def path_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems with the folders and files a recipe names, found before any heavy work.

    `data_dir` and `checkpoint` must exist; `output_dir` must be writable and, unless the run is
    resumed, must not hold the results of another run. With several processes, call it before the
    first of them writes.
    """

    def path_of(name: str) -> Path | None:
        value = values.get(name)
        return Path(value) if isinstance(value, str | os.PathLike) and str(value) else None

    problems = []
    data_dir, checkpoint, output_dir = (path_of(name) for name in ("data_dir", "checkpoint", "output_dir"))
    if (
        data_dir is not None
        and not data_dir.is_dir()
        and (data_dir.exists() or not values.get("download", True))
    ):
        problems.append(f"data_dir = {str(data_dir)!r} is not a folder")
    if checkpoint is not None and not checkpoint.is_file():
        problems.append(f"checkpoint = {str(checkpoint)!r} is not a file")
    if output_dir is not None:
        existing = next((p for p in (output_dir, *output_dir.absolute().parents) if p.exists()), output_dir)
        if not existing.is_dir():
            problems.append(f"output_dir = {str(output_dir)!r}: {str(existing)!r} is not a folder")
        elif not os.access(existing, os.W_OK | os.X_OK):
            problems.append(f"output_dir = {str(output_dir)!r}: {str(existing)!r} is not writable")
        elif values.get("resume") is None and any((output_dir / name).exists() for name in RUN_FILES):
            problems.append(
                f"output_dir = {str(output_dir)!r} holds another run: choose another folder, "
                f"or continue that run with --resume {output_dir}"
            )
    return problems


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of silently keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds; `RecipeError` with file and line when it is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise RecipeError([f"cannot read {str(path)!r}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path} is not a YAML text file"]) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError([f"{path}{line}: {error.problem}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{path} is not valid YAML: {error}"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError([f"{path}: expected 'key: value' lines, got {type(values).__name__}"])
    return values


def load_recipe(
    config: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of a run: defaults, then the YAML file `config`, then `overrides` (flags).

    With `resume` among the values, the recipe of that run comes before `config`, and its folder is
    the output folder: `load_recipe(None, {"resume": "runs/x"})` is all it takes to continue. Paths
    are checked too. Raises `RecipeError` with every problem found.
    """
    values = {} if config is None else read_yaml(Path(config))
    values |= overrides or {}
    problems: list[str] = []
    if isinstance(values.get("resume"), str | os.PathLike):
        resume = Path(values["resume"])
        folder = resume if resume.is_dir() else resume.parent
        if not resume.exists():
            problems.append(f"resume = {str(resume)!r} does not exist")
        elif not (folder / "recipe.yaml").is_file():
            problems.append(f"resume = {str(resume)!r} is no run folder: it has no recipe.yaml")
        else:
            values = {**read_yaml(folder / "recipe.yaml"), "output_dir": str(folder), **values}
    problems += path_problems(values)
    try:
        recipe = Recipe.from_values(values)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from error
    if problems:
        raise RecipeError(problems)
    return recipe
