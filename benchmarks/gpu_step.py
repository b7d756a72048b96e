"""Time forward passes and training steps side by side: our backends, mamba-ssm's kernels, a timm ViT.

    python benchmarks/gpu_step.py --output results             # tiny, four image sizes, all that runs here
    python benchmarks/gpu_step.py --scale small --sizes 224:128
    python benchmarks/gpu_step.py --backends triton cuda --methods forward lora prodial full --vit no

A step is forward, backward and AdamW on resident random images, under bf16 autocast on a GPU and in fp32
elsewhere. On a GPU it is timed eagerly and as a replayed CUDA graph, which counts where it can be recorded.
Each backend has a process of its own: what fails costs its own rows. The cases of an image size are prepared
one by one and then timed in turns, round by round, so that a change of the clock meets all of them; ratios
are medians over the rounds. `--output` gets gpu_step.json, rewritten after every case: step_tables.py prints
its tables again, step_plot.py draws it. The last table holds the measured times against what counts.py says
must be done and ceilings.py says the machine can do.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ceilings import Machine
from step_cases import METHODS, PAIRS, VIT, Case, StepRunner, parse_size
from step_tables import growth_table, ratio_table, roofline_table, size_table
from workers import Worker, WorkerFailed

from vimtune.backends import REFERENCE, backend_names

GPU_SIZES = ("224:128", "64:1024", "448:32", "896:8")
CPU_SIZES = ("224:4", "64:16", "448:1")
START_SECONDS, CASE_SECONDS = 180, 120
"""Limits for the start of a process with its first compilations, and for one case."""
VISIT_SECONDS = 0.05
CASE_BUDGET = 2.0
"""Rounds after which a slow case stops taking part: when it has used this many seconds, but not before 3."""
LEAST_ROUNDS = 3


def main() -> None:
    options = parse_options()
    run = Comparison(options)
    try:
        run.start()
        for img_size, batch_size in options.sizes:
            run.measure(img_size, batch_size)
        print(growth_table(run.rows))
        print(roofline_table(run.rows, run.report["ceilings"]))
    finally:
        run.stop()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in backend_names() if name not in ("auto", REFERENCE)]
    parser.add_argument("--scale", choices=PAIRS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=parse_size, nargs="+", help="pixels:batch, in this order")
    parser.add_argument("--backends", choices=known, nargs="*", default=known)
    parser.add_argument("--vit", choices=("yes", "no"), default="yes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=20.0, help="start no new case after this time")
    parser.add_argument(
        "--slow-ms",
        type=float,
        help="a backend with a slower step leaves out its other methods at this size and all larger ones; "
        "1000 on a GPU, 20000 elsewhere",
    )
    parser.add_argument("--output", type=Path, help="folder for gpu_step.json")
    options = parser.parse_args()
    options.device = "cuda:0" if options.device == "cuda" else options.device
    on_gpu = options.device.startswith("cuda")
    if options.slow_ms is None:
        options.slow_ms = 1000.0 if on_gpu else 20000.0
    if options.sizes is None:
        options.sizes = [parse_size(text) for text in (GPU_SIZES if on_gpu else CPU_SIZES)]
    return options


class Comparison:
    """The whole run: its processes, its rows, its report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {"scale": options.scale, "rows": self.rows}
        self.workers: dict[str, Worker] = {}
        self.uncaptured: set[str] = set()
        """Kernels whose steps could not be recorded in a CUDA graph."""
        self.slow: dict[str, int] = {}
        """Kernels too slow for the whole comparison -> the image size where they were found so."""

    def start(self) -> None:
        """Start all processes at once, let them compile, then measure the machine."""
        options = self.options
        names = [*options.backends, *([VIT] if options.vit == "yes" else [])]
        machine = Worker(Machine, options.device)
        self.workers = {name: Worker(StepRunner, name, options.device) for name in names}
        self.report["machine"] = machine.call("describe", seconds=START_SECONDS)
        print(", ".join(f"{key} {value}" for key, value in self.report["machine"].items()))
        for name, worker in list(self.workers.items()):
            try:
                worker.receive(START_SECONDS)
            except WorkerFailed as failure:
                print(f"{name} left out: {failure}")
                self.report.setdefault("left_out", {})[name] = str(failure)
                del self.workers[name]
        self._compile()
        try:
            self.report["ceilings"] = machine.call("measure", seconds=CASE_SECONDS)
        except WorkerFailed as failure:
            print(f"ceilings not measured: {failure}")
            self.report["ceilings"] = {}
        machine.stop()
        print(", ".join(f"{key} {value:.4g}" for key, value in self.report["ceilings"].items()))
        print(f"ready after {self._elapsed():.0f} s")
        self.save()

    def _compile(self) -> None:
        """Have all processes run small steps at once; what fails here will say so in its row."""
        options = self.options
        img_size, batch_size = options.sizes[0]
        for name, worker in self.workers.items():
            # Triton compiles anew for batches that 16 does not divide.
            cases = [
                Case(options.scale, name, method, img_size, min(batch_size, 16))
                for method in ("forward", "prodial", "full")
                if method in options.methods
            ]
            worker.send("warm", cases)
        for name, worker in self.workers.items():
            try:
                worker.receive(START_SECONDS)
            except WorkerFailed as failure:
                print(f"{name}: warming up failed: {failure}")
                self._recover(worker)

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.stop()

    def measure(self, img_size: int, batch_size: int) -> None:
        """All cases of one image size."""
        live: list[tuple[Case, dict[str, Any], int]] = []
        left_out = 0
        for kernels, worker in self.workers.items():
            for method in METHODS:
                if method not in self.options.methods or self._skips(kernels, img_size):
                    continue
                if self._elapsed() > 60 * self.options.minutes:
                    left_out += 1
                    continue
                case = Case(self.options.scale, kernels, method, img_size, batch_size)
                row: dict[str, Any] = asdict(case)
                self.rows.append(row)
                if self._prepare(worker, case, row):
                    live.append((case, row, worker.generation))
                self.save()
        if left_out:
            print(f"time is up: {left_out} cases at {img_size} px left out")
        for turn in range(self.options.rounds):
            for case, row, generation in live:
                worker = self.workers[case.kernels]
                used = sum(row["samples"]) / 1e3
                gone = worker.generation != generation or "lost" in row
                if gone or (turn >= LEAST_ROUNDS and used > CASE_BUDGET):
                    continue
                try:
                    sample = worker.call("visit", case, VISIT_SECONDS, seconds=CASE_SECONDS)
                    row["samples"].append(sample)
                except WorkerFailed as failure:
                    row["lost"] = str(failure)
                    print(f"{case.kernels} {case.method} lost in round {turn + 1}: {failure}")
                    self._recover(worker)
            self.save()
        rows = [row for row in self.rows if row["img_size"] == img_size]
        print(f"\n{self.options.scale}, {img_size} px, batch {batch_size} (after {self._elapsed():.0f} s)")
        print(size_table(rows))
        print(ratio_table(rows))
        for worker in self.workers.values():
            self._recover(worker, "drop")

    def save(self) -> None:
        if self.options.output is None:
            return
        self.options.output.mkdir(parents=True, exist_ok=True)
        partial = self.options.output / "gpu_step.json.partial"
        partial.write_text(json.dumps(self.report, indent=1))
        partial.replace(self.options.output / "gpu_step.json")

    def _elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def _skips(self, kernels: str, img_size: int) -> bool:
        return kernels in self.slow and img_size >= self.slow[kernels]

    def _prepare(self, worker: Worker, case: Case, row: dict[str, Any]) -> bool:
        """Fill in the facts of a row; False, the reason being printed, if it is not for the rounds."""
        try:
            facts = self._prepare_once(worker, case)
        except WorkerFailed as failure:
            row["error"] = str(failure)
            print(f"{case.kernels} {case.method} at {case.img_size} px failed: {failure}")
            self._recover(worker)
            return False
        row |= facts
        row["samples"] = []
        if not row["kept"]:
            print(f"{case.kernels}: a step takes {min(row['eager_ms']):.0f} ms, the rest is left out")
            self.slow[case.kernels] = min(case.img_size, self.slow.get(case.kernels, case.img_size))
        return row["kept"]

    def _prepare_once(self, worker: Worker, case: Case) -> dict[str, Any]:
        capture, slow = case.kernels not in self.uncaptured, self.options.slow_ms / 1e3
        try:
            return worker.call("prepare", case, capture, slow, seconds=CASE_SECONDS)
        except WorkerFailed as failure:
            if failure.kind != "CaptureFailed":
                raise
            print(f"{case.kernels}: no CUDA graph, eager steps count ({failure})")
            self.report.setdefault("uncaptured", {})[case.kernels] = str(failure)
            self.uncaptured.add(case.kernels)
            worker.stop()  # a broken recording may leave the process unusable
        return worker.call("prepare", case, False, slow, seconds=CASE_SECONDS)

    def _recover(self, worker: Worker, method: str = "recover") -> None:
        try:
            worker.call(method, seconds=CASE_SECONDS)
        except WorkerFailed:
            worker.stop()  # the next call starts it anew


if __name__ == "__main__":
    main()
