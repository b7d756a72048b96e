"""The components of a recipe: each a dataclass of options that concern one part of a run.

The name of a field is a YAML key, a command-line flag (`_` becomes `-`) and a line of the help text. No name
stands in two components, so files and flags give all of them side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from vimtune import parsers
from vimtune.backends import AUTO, OWN, REFERENCE, backend_names
from vimtune.data.datasets import DATASETS
from vimtune.fields import Options, option, option_of_method
from vimtune.methods import METHODS
from vimtune.methods.lora import LoRA
from vimtune.methods.prodial import ProDiaL
from vimtune.models.registry import MODELS

Whole = Annotated[int, Ge(0)]
"""A whole number from 0."""
Positive = Annotated[int, Ge(1)]
"""A whole number from 1."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
"""A seed of random numbers."""
Amount = Annotated[float, Ge(0)]
"""A number that is not negative."""
PositiveAmount = Annotated[float, Gt(0)]
"""A number above 0."""
Share = Annotated[float, Ge(0), Lt(1)]
"""A number from 0 to below 1."""


def _method_spec(value: Any) -> str:
    names = [METHODS.parse(part.strip()) for part in parsers.text(value).split("+")]
    if len(set(names)) < len(names):
        raise ValueError("expected every method once")
    return "+".join(names)


def _backend(value: Any) -> str:
    chosen: str = parsers.choice(*backend_names())(value)
    return chosen


@dataclass(frozen=True, kw_only=True)
class DataSettings(Options):
    """Which data are used, and how they are read."""

    dataset: str = option("synthetic_flowers", "data set (see --list)", parse=DATASETS.parse)
    data_dir: str | None = option(
        None, "folder of the data set's files", parse=parsers.optional(parsers.absolute_path)
    )
    train_split: Literal["train", "train+val"] = option("train", "images to train on: train, train+val")
    eval_split: Literal["val", "test"] | None = option(
        None, "evaluated while training: val, test (default: val if not trained on)"
    )
    dataset_kwargs: dict[str, Any] = option({}, "further options of the data set, such as species=20")
    data_seed: Seed = option(0, "seed of splits that are drawn and of generated images")
    download: bool = option(True, "download a data set that is not there yet")
    num_workers: Annotated[int, Ge(0), Le(1024)] = option(2, "processes that prepare images")
    cache: bool = option(False, "keep decoded images in memory")
    on_corrupt: Literal["error", "skip"] = option("error", "an unreadable image: error (stop), skip (report)")

    @property
    def selection_split(self) -> str:
        """The split evaluated during training: `eval_split`, or its default."""
        return self.eval_split or ("test" if self.train_split == "train+val" else "val")


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(Options):
    """The model that is adapted, and the weights from which it starts."""

    model: str = option("vim_nano_patch8_64", "model (see --list)", parse=MODELS.parse)
    pretrained: bool = option(True, "start from the model's published weights")
    checkpoint: str | None = option(
        None, "start from this .pth/.safetensors file instead", parse=parsers.optional(parsers.absolute_path)
    )
    img_size: int | list[int] | None = option(
        None,
        "image size, N or HxW (default: the model's own)",
        parse=parsers.optional(parsers.image_size),
    )
    drop_path: Share = option(0.0, "stochastic depth rate")
    model_kwargs: dict[str, Any] = option({}, "further options of the model")


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Options):
    """The method by which the model is adapted, where it acts, and its options."""

    peft: str = option("prodial", "method (see --list), or several: lora+bitfit", parse=_method_spec)
    targets: str | list[str] | dict[str, Any] | None = option(
        None,
        "tuned: both, in_proj, out_proj, or a list; by method: lora=both,ft=D",
        parse=parsers.optional(parsers.per_method(parsers.targets)),
    )
    layers: list[int] | dict[str, Any] | None = option(
        None,
        "tuned blocks, such as 0-11 or 0,5,10 (default: all)",
        parse=parsers.optional(parsers.per_method(parsers.layers)),
    )
    rank: Any = option_of_method(LoRA, "rank")
    alpha: Any = option_of_method(LoRA, "alpha")
    dropout: Any = option_of_method(LoRA, "dropout")
    block_size: Any = option_of_method(ProDiaL, "block_size")
    peft_kwargs: dict[str, Any] = option({}, "further options of the method, such as variant=paper")

    @property
    def method_kwargs(self) -> dict[str, Any]:
        """Options of the method as given: `peft_kwargs`, and those that are keys of their own."""
        own = {name: getattr(self, name) for name in OPTIONS_OF_METHODS}
        return {**self.peft_kwargs, **{name: value for name, value in own.items() if value is not None}}


OPTIONS_OF_METHODS = ("rank", "alpha", "dropout", "block_size")
"""Options of methods that are keys of their own. Each goes to every chosen method that has it.

The others are given in `peft_kwargs`. Not every option of every registered method is a key: a file has to be
readable without the packages that were imported when it was written, and some names, such as `variant`, are
flags with another meaning.
"""


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(Options):
    """How the weights are trained."""

    epochs: Positive = option(10, "passes over the training images")
    batch_size: Positive = option(64, "images per step, over all processes together")
    lr: PositiveAmount = option(1e-3, "peak learning rate")
    min_lr: Amount = option(0.0, "learning rate at the end of the cosine")
    head_lr: PositiveAmount | None = option(None, "peak learning rate of the head (default: that of --lr)")
    weight_decay: Amount = option(0.01, "AdamW weight decay")
    betas: list[float] = option([0.9, 0.999], "AdamW betas", parse=parsers.betas)
    warmup_epochs: Amount = option(1.0, "epochs of linear warm-up")
    clip_grad: Amount = option(1.0, "largest gradient norm, 0 = no clipping")
    grad_accum: Positive = option(1, "batches whose gradients make one update")
    ema: Share = option(0.0, "decay of the weights' moving average, 0 = off")
    early_stop: Whole = option(0, "stop after this many evaluations without a better one, 0 = off")
    amp: Literal["none", "bf16", "fp16"] = option("none", "mixed precision: none, bf16, fp16")
    grad_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    compile: bool = option(False, "use torch.compile")
    cuda_graph: Literal["auto", "on", "off"] = option(
        "auto", "replay batches as a CUDA graph: auto (where possible), on, off"
    )
    shard: bool = option(False, "share model and optimizer out among the processes (FSDP): less memory each")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Options):
    """Where and on what a run computes, what it writes, and what it continues."""

    seed: Seed = option(0, "seed of weights, order and augmentation")
    deterministic: bool = option(False, "use deterministic algorithms only")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", parse=parsers.device)
    backend: str = option(AUTO, f"selective scan: {', '.join((AUTO, *OWN, REFERENCE))}", parse=_backend)
    threads: Annotated[int, Ge(1), Le(4096)] | None = option(None, "CPU threads (default: torch's own)")
    output_dir: str | None = option(
        None,
        "run folder (default: runs/<dataset>-<model>-<method>-<time>)",
        parse=parsers.optional(parsers.path),
    )
    resume: str | None = option(
        None,
        "continue this run folder or checkpoint; auto: that in output_dir, or start",
        parse=parsers.optional(parsers.path),
    )
    force: bool = option(False, "resume although images or base weights have changed")
    log_interval: Positive = option(10, "steps between two log lines")
    eval_interval: Positive = option(1, "epochs between two evaluations")
