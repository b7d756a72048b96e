"""Time all registered methods side by side: a training step, its memory, its count, inference afterwards.

    python benchmarks/methods.py --output results          # Vim-tiny, 224 px, batch 128 on a GPU
    python benchmarks/methods.py --methods lora oft lora+sdt --rounds 9

Methods have their default places and options; several may be joined by "+". A step is forward, backward and
AdamW on resident random images, under bf16 autocast on a GPU, where it is replayed as a CUDA graph if it can
be recorded, and in fp32 elsewhere, on a small model. Inference is the forward pass in evaluation after
`vimtune.merge`, or with the adapter in place where no plain weights can express it. All cases are prepared
one by one and then timed in turns, round by round, so that a change of the clock meets all of them; ratios,
to the step of LoRA and to the forward pass of the plain model, are medians over the rounds. `--output` gets
methods.csv and methods.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from ceilings import Machine
from step_cases import NUM_CLASSES, PAIRS, SMALL_IMAGE, Case, StepRunner, parse_size
from torch import nn
from workers import Worker, WorkerFailed

import vimtune
from vimtune.adapters import active_adapter
from vimtune.backends import backend_names
from vimtune.methods import get_method, list_methods, method_names

PLAIN, YARDSTICK = "plain", "lora"
"""The model without an adapter, whose inference all others are compared with, and the method whose training
step is."""
CASE_SECONDS, VISIT_SECONDS = 180, 0.05
COLUMNS = {
    "method": "method",
    "trained": "trained without head",
    "starts_alike": "identity at the start",
    "step_ms": "step, ms",
    "step_ratio": f"to {YARDSTICK}",
    "peak_gib": "GiB",
    "graph": "CUDA graph",
    "served": "served",
    "inference_ms": "inference, ms",
    "inference_ratio": f"to {PLAIN}",
    "problem": "problem",
}
"""Key of a row -> heading of its column."""


@dataclass(frozen=True)
class MethodCase(Case):
    """A method's training step, or the inference that follows."""

    inference: bool


class MethodRunner(StepRunner):
    """Builds and times the steps of methods with their default options."""

    def build_model(self, case: Case) -> nn.Module:
        sizes = {"patch_size": 8 if case.img_size <= SMALL_IMAGE else 16, "num_classes": NUM_CLASSES}
        model = timm.create_model(PAIRS[case.scale][0], img_size=case.img_size, **sizes)
        if case.method != PLAIN:
            vimtune.inject(model, case.method)
            if self.infers(case):
                merge_if_possible(model)
        return model

    def infers(self, case: Case) -> bool:
        return isinstance(case, MethodCase) and case.inference

    def further_facts(self, case: Case, model: nn.Module, trained: int) -> dict[str, Any]:
        report = vimtune.summary(model)
        adapted = active_adapter(model) is not None
        return {
            "without_head": report.trainable - report.head if adapted else 0,
            "served": "as it is" if adapted else "plain" if case.method == PLAIN else "merged",
        }


def merge_if_possible(model: nn.Module) -> None:
    """Fold the adapter into the weights; leave it where no plain weights can express it."""
    try:
        vimtune.merge(model)
    except ValueError as error:
        if "nothing was merged" not in str(error):
            raise


def main() -> None:
    options = parse_options()
    machine = Worker(Machine, options.device)
    facts = machine.call("describe", seconds=CASE_SECONDS)
    machine.stop()
    pixels, batch = options.size
    heading = f"{PAIRS[options.scale][0]}, {pixels} px, batch {batch}, {options.rounds} rounds; " + ", ".join(
        f"{key} {value}" for key, value in facts.items()
    )
    print(heading)
    rows = Measurement(options).measure()
    print(table(rows))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "methods.md").write_text(f"{heading}\n\n{table(rows)}\n", encoding="utf-8")
        with (options.output / "methods.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", type=_method, default=list_methods(), metavar="METHOD")
    parser.add_argument("--scale", choices=PAIRS, help="default: tiny on a GPU, test elsewhere")
    parser.add_argument(
        "--size", type=parse_size, help="pixels:batch; default 224:128 on a GPU, 32:4 elsewhere"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=backend_names(), default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="folder for methods.csv and methods.md")
    options = parser.parse_args()
    options.device = "cuda:0" if options.device == "cuda" else options.device
    on_gpu = options.device.startswith("cuda")
    options.scale = options.scale or ("tiny" if on_gpu else "test")
    options.size = options.size or ((224, 128) if on_gpu else (32, 4))
    return options


def _method(text: str) -> str:
    try:
        return "+".join(method_names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Measurement:
    """All cases in one process; one that fails costs its own row."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.worker = Worker(MethodRunner, options.backend, options.device)
        self.samples: dict[MethodCase, list[float]] = {}
        """Milliseconds of a step in each round, by the cases that could be prepared."""
        self.facts: dict[MethodCase, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}
        """What went wrong with a method."""

    def measure(self) -> list[dict[str, Any]]:
        """Prepare and time everything; a row for the plain model and one for each method."""
        methods = list(dict.fromkeys([PLAIN, YARDSTICK, *self.options.methods]))
        try:
            for method in methods:
                for inference in (False, True):
                    if method != PLAIN or inference:
                        self._prepare(self._case(method, inference))
            for _ in range(self.options.rounds):
                for case in list(self.samples):
                    self._visit(case)
        finally:
            self.worker.stop()
        return [self._row(method) for method in methods]

    def _case(self, method: str, inference: bool) -> MethodCase:
        pixels, batch = self.options.size
        return MethodCase(self.options.scale, self.options.backend, method, pixels, batch, inference)

    def _prepare(self, case: MethodCase) -> None:
        """Build and record a case; without a CUDA graph where it cannot be recorded."""
        for capture in (True, False):
            try:
                self.facts[case] = self.worker.call("prepare", case, capture, seconds=CASE_SECONDS)
            except WorkerFailed as failure:
                self._note(case.method, failure)
                if failure.kind == "CaptureFailed":
                    continue
                return
            self.samples[case] = []
            return

    def _visit(self, case: MethodCase) -> None:
        try:
            self.samples[case].append(self.worker.call("visit", case, VISIT_SECONDS, seconds=CASE_SECONDS))
        except WorkerFailed as failure:
            self._note(case.method, failure)
            del self.samples[case]

    def _note(self, method: str, failure: WorkerFailed) -> None:
        self.problems[method] = str(failure)
        print(f"{method}: {failure}")

    def _row(self, method: str) -> dict[str, Any]:
        step, inference = self._case(method, False), self._case(method, True)
        own, served = self.facts.get(step, {}), self.facts.get(inference, {})
        plain, yardstick = self._case(PLAIN, True), self._case(YARDSTICK, False)
        alike = method == PLAIN or not any(get_method(name).changes_at_start for name in method.split("+"))
        return {
            "method": method,
            "trained": own.get("without_head", 0),
            "starts_alike": alike,
            "step_ms": self._median(step),
            "step_ratio": self._ratio(step, yardstick),
            "peak_gib": own.get("peak_gib"),
            "graph": own.get("graph"),
            "served": served.get("served"),
            "inference_ms": self._median(inference),
            "inference_ratio": self._ratio(inference, plain),
            "problem": self.problems.get(method),
        }

    def _median(self, case: MethodCase) -> float | None:
        samples = self.samples.get(case)
        return statistics.median(samples) if samples else None

    def _ratio(self, case: MethodCase, other: MethodCase) -> float | None:
        """Median over the rounds of one case's time to that of another in the same round."""
        pairs = list(zip(self.samples.get(case, []), self.samples.get(other, []), strict=False))
        return statistics.median(own / theirs for own, theirs in pairs) if pairs else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows in Markdown; columns in which nothing stands are left out."""
    columns = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    lines = [[COLUMNS[key] for key in columns], ["---"] * len(columns)]
    lines += [[_cell(row[key]) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


if __name__ == "__main__":
    main()
