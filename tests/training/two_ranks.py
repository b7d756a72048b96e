"""Two processes of one run without a launcher, which would end one of them when the other fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from quick_runs import NO_PICTURES, painting_once, replace_in_process

from vimtune.data import ImageReadError
from vimtune.data.synthetic import SyntheticFlowers
from vimtune.models import VisionMamba
from vimtune.recipe import Recipe
from vimtune.runtime import distributed
from vimtune.tasks.images import job as images_job
from vimtune.training import train, trained, trainer
from vimtune.training.prefetch import WindowReader
from vimtune.training.stepper import Stepper

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vimtune.training"])  # torch is imported once for all tests
SECONDS = 60


def die_in_step_3() -> None:
    compute, calls = Stepper._compute_gradients, []

    def counted(stepper: Stepper, window: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(stepper, window)

    Stepper._compute_gradients = counted  # type: ignore[method-assign]


def die_in_a_pass() -> None:
    """In the middle of the third pass, where the other process waits for its piece of the model."""
    forward_head, calls = VisionMamba.forward_head, []

    def counted(model: VisionMamba, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_head(model, *arguments)

    VisionMamba.forward_head = counted  # type: ignore[method-assign]


def _unreadable(split: str, turn: int) -> None:
    load, calls = SyntheticFlowers.load, []

    def counted(dataset: SyntheticFlowers, index: int) -> Any:
        calls.extend([1] * (dataset.split == split))
        if dataset.split == split and len(calls) == turn:
            raise ImageReadError("disk/picture.png", "Input/output error")
        return load(dataset, index)

    SyntheticFlowers.load = counted  # type: ignore[method-assign]


def cannot_read_in_step_3() -> None:
    _unreadable("train", 10)


def cannot_read_in_evaluation() -> None:
    _unreadable("val", 2)


def as_on_gpus(folder: str) -> None:
    """Steps overlap, and the main process opens the data for longer than a collective waits.

    When the passes of a step are launched and when its numbers are read goes to the file `folder`/rank.
    """
    distributed.TIMEOUT = timedelta(seconds=8)
    build, opened, order = trained.build_optimizer, images_job.open_dataset, []

    def fused(*arguments: Any, **options: Any) -> Any:
        optimizer = build(*arguments, **options)
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings["fused"] = True
        return optimizer

    class Ahead(WindowReader):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.ahead = True

    def slowly(data: Any, split: str, size: Any) -> Any:
        if os.environ["RANK"] == "0" and split == "train":
            time.sleep(10)
        return opened(data, split, size)

    trained.build_optimizer, trainer.WindowReader, images_job.open_dataset = fused, Ahead, slowly
    compute, require = Stepper._compute_gradients, Stepper._require_finite

    def note(what: str, number: int) -> None:
        order.append(f"{what} {number}")
        Path(folder, os.environ["RANK"]).write_text(", ".join(order))

    def computed(stepper: Stepper, window: Any) -> Any:
        note("passes", stepper.number)
        return compute(stepper, window)

    def required(stepper: Stepper, step: Any, epoch: int) -> None:
        note("read", step.number)
        require(stepper, step, epoch)

    Stepper._compute_gradients, Stepper._require_finite = computed, required  # type: ignore[method-assign]


def register_toy_task() -> None:
    import toy_task  # noqa: F401  (registers itself)


def quickly() -> None:
    """Leave the drawing out, and paint images once for all runs."""
    replace_in_process({**NO_PICTURES, **painting_once()})


def print_to(folder: str) -> None:
    """What a process prints goes to the file `folder`/rank."""
    sys.stdout = open(os.path.join(folder, os.environ["RANK"]), "w")  # noqa: SIM115  (until the process ends)


def _run(
    rank: int, port: int, runs: Sequence[Mapping[str, Any]], sabotage: Any, prepare: Any, answers: Any
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if prepare is not None:
        prepare()
    if sabotage is not None and rank == 1:
        sabotage()
    if len(runs) > 1:  # they share one group
        dist.init_process_group("gloo")
    try:
        for values in runs:
            train(Recipe(**values))
        answers.put((rank, ""))
    except ValueError as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))


def run_two(
    *recipes: Recipe, changes: Mapping[str, Any] | None = None, sabotage: Any = None, prepare: Any = None
) -> list[str | None]:
    """What came of processes 0 and 1: "" for success, an error's class and message, None for a killed one.

    They train one recipe after the other, until one fails. `changes` are those of process 1's recipes;
    `sabotage` is called in it before, `prepare` in both.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = _CONTEXT.Queue()
    processes = []
    for rank in (0, 1):
        runs = [recipe.to_dict() | (changes or {} if rank == 1 else {}) for recipe in recipes]
        processes.append(_CONTEXT.Process(target=_run, args=(rank, port, runs, sabotage, prepare, answers)))
        processes[-1].start()
    for process in processes:
        process.join(SECONDS + 5 * len(recipes))
        assert process.exitcode is not None, "a process waits for ever"
    found = {}
    while len(found) < sum(process.exitcode == 0 for process in processes):
        rank, answer = answers.get(timeout=SECONDS)
        found[rank] = answer
    return [found.get(0), found.get(1)]
