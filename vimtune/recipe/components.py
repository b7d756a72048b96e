"""The components that the recipes of all tasks have: dataclasses of options that concern one part of a run.

Which data are used and which model is adapted belongs to the task (`Task.data_options` and
`Task.backbone_options`).

The name of a field is a YAML key, a command-line flag (`_` becomes `-`) and a line of the help text. No name
stands in two components, so files and flags give all of them side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from vimtune import parsers
from vimtune.backends import AUTO, OWN, REFERENCE, backend_names
from vimtune.fields import (
    Amount,
    Options,
    Positive,
    PositiveAmount,
    Seed,
    Share,
    Whole,
    option,
    option_of_method,
)
from vimtune.loggers import parse_loggers
from vimtune.methods import METHODS, resolve_options, sizing_options, split_options
from vimtune.methods.lora import LoRA
from vimtune.methods.prodial import ProDiaL
from vimtune.recipe.optimizers import parse_optimizer


def _method_spec(value: Any) -> str:
    names = [METHODS.parse(part.strip()) for part in parsers.text(value).split("+")]
    if len(set(names)) < len(names):
        raise ValueError("expected every method once")
    return "+".join(names)


def _backend(value: Any) -> str:
    chosen: str = parsers.choice(*backend_names())(value)
    return chosen


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Options):
    """The method by which the model is adapted, where it acts, and its options."""

    peft: str = option(
        "prodial", "method (see --list), or several: lora+bitfit", parse=_method_spec, purpose="run"
    )
    targets: str | list[str] | dict[str, Any] | None = option(
        None,
        "tuned: both, in_proj, ... (see --list), or a list; by method: lora=both,ft=D",
        parse=parsers.optional(parsers.per_method(parsers.targets)),
        purpose="run",
    )
    layers: list[int] | dict[str, Any] | None = option(
        None,
        "tuned blocks, such as 0-11 or 0,5,10 (default: all)",
        parse=parsers.optional(parsers.per_method(parsers.layers)),
        purpose="run",
    )
    rank: Any = option_of_method(LoRA, "rank")
    alpha: Any = option_of_method(LoRA, "alpha")
    dropout: Any = option_of_method(LoRA, "dropout")
    block_size: Any = option_of_method(ProDiaL, "block_size")
    budget: Any = option(
        None,
        "trained parameters beside the head, 300k or 0.5%, which choose rank or the like",
        parse=parsers.optional(parsers.parameter_budget),
        purpose="run",
    )
    peft_kwargs: dict[str, Any] = option(
        {}, "further options of the method, such as variant=paper", purpose="run"
    )
    init_adapter: str | None = option(
        None,
        "begin with this run folder or adapter, its model and its method",
        parse=parsers.optional(parsers.absolute_path),
        purpose="run",
    )

    @property
    def given_options(self) -> dict[str, Any]:
        """The options of the method as given, in `peft_kwargs` or as keys of their own."""
        own = {name: getattr(self, name) for name in OPTIONS_OF_METHODS}
        return {**self.peft_kwargs, **{name: value for name, value in own.items() if value is not None}}

    @property
    def method_kwargs(self) -> dict[str, Any]:
        """What `inject` takes besides the places: `given_options`, and the budget."""
        return {**self.given_options, **({} if self.budget is None else {"budget": self.budget})}

    @property
    def sized_by_budget(self) -> dict[str, str]:
        """The option that the budget decides, by method; empty without a budget.

        Raises:
            ValueError: as `sizing_options` raises it.
        """
        return {} if self.budget is None else sizing_options(self.peft, self.given_options)

    @property
    def unstated_options(self) -> dict[str, dict[str, Any]]:
        """Those of `all_options` that have their default, because nobody has given them."""
        stated = split_options(self.peft, self.given_options)
        unstated = {
            method: {name: value for name, value in options.items() if name not in stated[method]}
            for method, options in self.all_options.items()
        }
        return {method: options for method, options in unstated.items() if options}

    @property
    def all_options(self) -> dict[str, dict[str, Any]]:
        """Every option of each method, defaults included, but those that a budget chooses.

        Raises:
            ValueError: as `resolve_options` and `sizing_options` raise it.
        """
        chosen = self.sized_by_budget
        return {
            method: {name: value for name, value in options.items() if name != chosen.get(method)}
            for method, options in resolve_options(self.peft, self.given_options).items()
        }


OPTIONS_OF_METHODS = ("rank", "alpha", "dropout", "block_size")
"""Options of methods that are keys of their own. Each goes to every chosen method that has it.

The others are given in `peft_kwargs`. Not every option of every registered method is a key: a file has to be
readable without the packages that were imported when it was written, and some names, such as `variant`, are
flags with another meaning.
"""


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(Options):
    """How the weights are trained."""

    epochs: Positive = option(10, "passes over the training data", purpose="run")
    max_steps: Positive | None = option(
        None, "end after so many optimizer steps, before --epochs if need be", purpose="run"
    )
    batch_size: Positive = option(64, "images or texts per step, over all processes together")
    lr: PositiveAmount = option(1e-3, "peak learning rate", purpose="run")
    min_lr: Amount = option(0.0, "learning rate at the end of the cosine", purpose="run")
    head_lr: PositiveAmount | None = option(
        None, "peak learning rate of the head (default: that of --lr)", purpose="run"
    )
    opt: str = option("adamw", "optimizer (see --list)", parse=parse_optimizer, purpose="run")
    weight_decay: Amount = option(0.01, "weight decay", purpose="run")
    betas: list[float] | None = option(
        None,
        "betas of the optimizer (default: its own)",
        parse=parsers.optional(parsers.betas),
        purpose="run",
    )
    momentum: Annotated[float, Gt(0), Lt(1)] | None = option(
        None, "momentum of sgd and muon (default: its own)", purpose="run"
    )
    layer_decay: Annotated[float, Gt(0), Le(1)] = option(
        1.0, "learning rate of each block as a multiple of that of the next one", purpose="run"
    )
    warmup_epochs: Amount = option(1.0, "epochs of linear warm-up", purpose="run")
    clip_grad: Amount = option(1.0, "largest gradient norm, 0 = no clipping", purpose="run")
    grad_accum: Positive = option(1, "batches whose gradients make one update", purpose="run")
    ema: Share = option(0.0, "decay of the weights' moving average, 0 = off", purpose="run")
    early_stop: Whole = option(
        0, "stop after this many evaluations without a better one, 0 = off", purpose="run"
    )
    amp: Literal["none", "bf16", "fp16"] = option("none", "mixed precision: none, bf16, fp16")
    grad_checkpointing: bool = option(False, "recompute activations: less memory, more time", purpose="run")
    compile: bool = option(False, "use torch.compile", purpose="run")
    cuda_graph: Literal["auto", "on", "off"] = option(
        "auto", "replay batches as a CUDA graph: auto (where possible), on, off", purpose="run"
    )
    shard: bool = option(
        False, "share model and optimizer out among the processes (FSDP): less memory each", purpose="run"
    )

    def steps_of(self, batches: int) -> int:
        """How many optimizer steps so many batches make."""
        return math.ceil(batches / self.grad_accum)


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
        purpose="run",
    )
    resume: str | None = option(
        None,
        "continue this run folder or checkpoint; auto: that in output_dir, or start",
        parse=parsers.optional(parsers.path),
        purpose="run",
    )
    force: bool = option(False, "go on although data, tokenizer or base weights have changed")
    logger: list[str] = option(
        ["tensorboard"],
        "where records go besides metrics.jsonl (see --list): csv,wandb",
        parse=parse_loggers,
        purpose="run",
    )
    log_interval: Positive = option(10, "steps between two log lines", purpose="run")
    eval_interval: Positive = option(1, "epochs between two evaluations", purpose="run")
    pictures: bool = option(True, "draw the pictures of the run folder when the run has ended", purpose="run")
