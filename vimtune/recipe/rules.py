"""What values of a recipe demand of each other.

A rule is a function whose parameters are keys of the recipe. It is asked only when all of them are right by
themselves, so that one mistake is reported once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vimtune.data.datasets import DATASETS, unread_folder
from vimtune.fields import options_of
from vimtune.recipe.optimizers import OPTIMIZERS
from vimtune.tasks import TASKS
from vimtune.text import quote, suggest

Rule = Callable[..., Iterable[str]]
"""Gives one line for each problem that it finds."""


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """The problems of all rules whose keys are among `values`, which are parsed."""
    problems: list[str] = []
    for rule in RULES:
        keys = inspect.signature(rule).parameters
        if all(key in values for key in keys):
            problems += rule(**{key: values[key] for key in keys})
    return problems


def _evaluated_split(train_split: str, eval_split: str | None) -> Iterable[str]:
    if train_split != "train" and eval_split == "val":
        yield "eval_split = 'val' is trained on (train_split = 'train+val'): use test"


def _few_examples(shots: int | None, train_size: int | None) -> Iterable[str]:
    if shots is not None and train_size is not None:
        yield f"shots = {shots} and train_size = {train_size} both say what is trained on: give one of them"


def _folds_of_few(folds: int | None, shots: int | None, train_size: int | None) -> Iterable[str]:
    if folds is not None and (shots is not None or train_size is not None):
        yield f"folds = {folds} divides all images to learn from: leave out shots and train_size"


def _folds_without_validation(folds: int | None, train_split: str, eval_split: str | None) -> Iterable[str]:
    if folds is not None and (train_split != "train" or eval_split == "test"):
        yield f"folds = {folds} holds out val: use train_split = 'train', and eval_split = 'val'"


def _evened_twice(balanced: bool, class_weights: Any) -> Iterable[str]:
    if balanced and class_weights == "balanced":
        yield "balanced and class_weights = 'balanced' both make up for unequal classes: give one of them"


def _without_test(test: bool, train_split: str, eval_split: str | None) -> Iterable[str]:
    if not test and (train_split == "train+val" or eval_split == "test"):
        yield "test = false leaves nothing to score: train on train alone and select by val"


def _folder(dataset: str, data_dir: str | None) -> Iterable[str]:
    if DATASETS.get(dataset).needs_data_dir and data_dir is None:
        yield f"dataset = {dataset!r} needs data_dir: the folder of your images"
    if (problem := unread_folder(dataset, data_dir)) is not None:
        yield problem


def _automatic_resume(resume: str | None, output_dir: str | None) -> Iterable[str]:
    if resume == "auto" and output_dir is None:
        yield "resume = 'auto' needs output_dir: the folder to continue or start in"


def _learning_rates(lr: float, min_lr: float) -> Iterable[str]:
    if min_lr > lr:
        yield f"min_lr = {min_lr:g} is larger than lr = {lr:g}"


def _warm_up(epochs: int, warmup_epochs: float) -> Iterable[str]:
    if warmup_epochs > epochs:
        yield f"warmup_epochs = {warmup_epochs:g} is longer than the run (epochs = {epochs})"


def _optimizer(
    opt: str, betas: list[float] | None, momentum: float | None, ema: float, min_lr: float
) -> Iterable[str]:
    kind = OPTIMIZERS[opt]
    if betas is not None and kind.betas is None:
        yield f"betas = {betas} does nothing with opt = {quote(opt)}, which has none: leave it out"
    if momentum is not None and kind.momentum is None:
        yield f"momentum = {momentum:g} does nothing with opt = {quote(opt)}, which has none: leave it out"
    if not kind.averages:
        return
    if betas is not None and betas[0] == 0:
        yield f"betas = {betas} leaves nothing for opt = {quote(opt)} to average: give a first one above 0"
    for name, value in {"ema": ema, "min_lr": min_lr}.items():
        if value > 0:
            yield (
                f"{name} = {value:g} does not go with opt = {quote(opt)}, which averages the weights itself "
                "at a constant learning rate: leave it out"
            )


def _half_precision(amp: str, device: str) -> Iterable[str]:
    if amp == "fp16" and device == "cpu":
        yield "amp = 'fp16' needs a GPU: use bf16 or none on the CPU"


def _sharding(shard: bool, compile: bool) -> Iterable[str]:
    if shard and compile:
        yield "shard does not go with compile: turn one of them off"


def _without_teacher(
    teacher: str | None, teacher_targets: str, teacher_weight: float, teacher_temperature: float
) -> Iterable[str]:
    given = {
        "teacher_targets": teacher_targets,
        "teacher_weight": teacher_weight,
        "teacher_temperature": teacher_temperature,
    }
    if teacher is None:
        declared = options_of(TASKS.get("classification"))
        for name, value in given.items():
            if value != declared[name].default:
                yield f"{name} = {value} does nothing without a teacher: give teacher, or leave it out"


def _hard_temperature(teacher_targets: str, teacher_temperature: float) -> Iterable[str]:
    if teacher_targets == "hard" and teacher_temperature != 1:
        yield f"teacher_temperature = {teacher_temperature:g} does nothing where teacher_targets is hard"


def _targets_of_methods(peft: str, targets: Any) -> Iterable[str]:
    return _unknown_methods("targets", targets, peft)


def _layers_of_methods(peft: str, layers: Any) -> Iterable[str]:
    return _unknown_methods("layers", layers, peft)


def _unknown_methods(key: str, by_method: Any, peft: str) -> list[str]:
    methods = peft.split("+")
    return [
        f"{key}: {quote(name)} is not one of the methods of {peft}.{suggest(name, methods)}"
        for name in (by_method if isinstance(by_method, dict) else ())
        if name not in methods
    ]


RULES: tuple[Rule, ...] = (
    _evaluated_split,
    _few_examples,
    _folds_of_few,
    _folds_without_validation,
    _evened_twice,
    _without_test,
    _folder,
    _automatic_resume,
    _learning_rates,
    _warm_up,
    _optimizer,
    _half_precision,
    _sharding,
    _without_teacher,
    _hard_temperature,
    _targets_of_methods,
    _layers_of_methods,
)
"""All rules."""
