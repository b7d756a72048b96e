"""Compare methods on language tasks, each with the learning rate that a validation split chooses for it.

    python benchmarks/text_sets.py DOWNLOADS sets
    python benchmarks/text_methods.py --models small_mamba small_mamba2 --tokenizer corpus/tokenizer.json \\
        --sets sets --workers 12 --output results.csv

Each model is adapted to each set by each method, first with every learning rate of the method's grid and seed
0. The one with the best score on the validation split, which is a tenth of the training texts, is then used
with the other seeds, too. The scores in the table are those of the test split. A row of the output is a run;
runs that it has already are not repeated, so that the command can be called again after a break.

The sets with choices are learnt as in the papers, by the likelihood of the right answer, and by a linear head
on the last token in the row `linear`. Those with classes are learnt by such a head with every method.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

BASE = {"max_length": 256, "batch_size": 32, "epochs": 10, "amp": "bf16", "weight_decay": 0.01}
SETS: dict[str, dict[str, Any]] = {
    "arc_easy": {"task": "arc_easy"},
    "arc_challenge": {"task": "arc_challenge"},
    "winogrande": {"task": "winogrande"},
    "piqa": {"task": "piqa"},
    "questions": {"task": "text", "head": "classifier"},
    "polarity": {"task": "text", "head": "classifier", "epochs": 5},
    "subjectivity": {"task": "text", "head": "classifier", "epochs": 5},
}
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "linear": ({"peft": "linear", "head": "classifier"}, (1e-3, 3e-3, 1e-2)),
    "bitfit": ({"peft": "bitfit"}, (1e-3, 3e-3, 1e-2)),
    "lora": ({"peft": "lora", "targets": "both", "rank": 8}, (3e-4, 1e-3, 3e-3)),
    "dora": ({"peft": "dora", "targets": "both", "rank": 8}, (3e-4, 1e-3, 3e-3)),
    "prodial": ({"peft": "prodial", "targets": "both", "rank": 8, "block_size": 1}, (3e-4, 1e-3, 3e-3)),
    "full": ({"peft": "full"}, (3e-5, 1e-4, 3e-4)),
}
"""Of each method its settings, and the learning rates that are tried."""


@dataclass(frozen=True)
class Case:
    """A run."""

    model: str
    data: str
    method: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Result(Case):
    """What has come out of it. Scores are percentages; empty where a set has none of that kind."""

    val_acc: float
    acc: float
    acc_norm: float | None
    trained: int
    seconds: float


def main() -> None:
    options = parse_options()
    results = read_results(options.output)
    grids = [
        [Case(Path(model).name, data, method, lr, 0) for lr in METHODS[method][1]]
        for data in options.data
        for method in options.methods
        for model in options.models
    ]
    with Writer(options.output) as writer:
        for result in Runs(grids, results, options):
            results.append(result)
            writer.write(result)
            print(f"{len(results)}: {result}", flush=True)
    print_tables(results)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, help="folders with the models")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--sets", type=Path, required=True, help="folder that text_sets.py has written")
    parser.add_argument("--data", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs among which they are spread")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, help="instead of those of each set, for a trial")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--output", type=Path, required=True, help="CSV, continued if it is there")
    options = parser.parse_args()
    options.until = time.time() + options.seconds
    return options


def read_results(path: Path) -> list[Result]:
    """The runs that have been done."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [parse(row) for row in csv.DictReader(file)]


def parse(row: dict[str, str]) -> Result:
    texts = {name: row[name] for name in ("model", "data", "method")}
    numbers = {name: float(row[name]) for name in ("lr", "val_acc", "acc", "seconds")}
    norm = float(row["acc_norm"]) if row["acc_norm"] else None
    return Result(**texts, **numbers, acc_norm=norm, seed=int(row["seed"]), trained=int(row["trained"]))


class Writer:
    """Writes results into a file, each at once; behind those that it has already."""

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, not path.exists()

    def __enter__(self) -> Writer:
        self._file = open(self._path, "a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if self._new:
            self._rows.writerow(field.name for field in fields(Result))
        return self

    def write(self, result: Result) -> None:
        self._rows.writerow(asdict(result).values())
        self._file.flush()

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Runs:
    """Does the runs that have not been done, several at a time.

    As soon as the grid of a method has been tried, its other seeds come before everything else.
    """

    def __init__(self, grids: list[list[Case]], results: list[Result], options: argparse.Namespace) -> None:
        self._grids, self._options = grids, options
        self._found = {case_of(result): result for result in results}
        self._asked = set(self._found)
        self._finished: queue.Queue[Result | BaseException | None] = queue.Queue()

    def __iter__(self) -> Iterator[Result]:
        """Yield the results as they come."""
        options, context = self._options, multiprocessing.get_context("spawn")
        numbers = context.Queue()
        for number in range(options.workers):
            numbers.put(number)
        with context.Pool(options.workers, prepare_worker, (numbers, options.gpus)) as pool:
            running = 0
            while True:
                while running < options.workers and (case := self._next()) is not None:
                    put = self._finished.put
                    pool.apply_async(run, ((case, options),), callback=put, error_callback=put)
                    running += 1
                if running == 0:
                    return
                result = self._finished.get()
                running -= 1
                if isinstance(result, BaseException):
                    raise result
                if result is not None:
                    self._found[case_of(result)] = result
                    yield result

    def _next(self) -> Case | None:
        """The next case, which is then taken for asked; None if there is none at present."""
        for case in [*self._other_seeds(), *(case for grid in self._grids for case in grid)]:
            if case not in self._asked:
                self._asked.add(case)
                return case
        return None

    def _other_seeds(self) -> Iterator[Case]:
        """The cases of further seeds, of the grids that have been tried."""
        for grid in self._grids:
            if all(case in self._found for case in grid):
                best = case_of(best_of([self._found[case] for case in grid]))
                yield from (replace(best, seed=seed) for seed in range(1, self._options.seeds))


def case_of(result: Result) -> Case:
    return Case(*(getattr(result, field.name) for field in fields(Case)))


def prepare_worker(numbers: Any, gpus: int) -> None:
    """Give a worker its GPU, and one thread."""
    number = numbers.get()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % gpus]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def run(job: tuple[Case, argparse.Namespace]) -> Result | None:
    """Train, and score the test split; None if the time for that is over."""
    import vimtune
    from vimtune.recipe import Recipe

    case, options = job
    if time.time() > options.until:
        return None
    settings, _ = METHODS[case.method]
    values = BASE | SETS[case.data] | settings
    if options.epochs:
        values["epochs"] = options.epochs
    if options.device == "cpu":
        values["amp"] = "none"
    model = next(model for model in options.models if Path(model).name == case.model)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        recipe = Recipe(
            **values,
            model=model,
            tokenizer=options.tokenizer,
            data_dir=str(options.sets / case.data),
            lr=case.lr,
            seed=case.seed,
            device=options.device,
            threads=1,
            output_dir=os.path.join(folder, "run"),
        )
        report: Any = vimtune.train(recipe)
    scores, best = report.scores, report.best_scores
    return Result(
        **asdict(case),
        val_acc=best["acc"],
        acc=scores["acc"],
        acc_norm=scores["acc_norm"],
        trained=report.trainable_parameters,
        seconds=time.monotonic() - begun,
    )


def best_of(results: list[Result]) -> Result:
    """The one with the best score on the validation split, the first of several."""
    return max(results, key=lambda result: result.val_acc)


def print_tables(results: list[Result]) -> None:
    """For each model a table: methods by sets, mean and standard deviation over the seeds."""
    tried, groups = defaultdict(list), {}
    for result in results:
        tried[result.model, result.data, result.method].append(result)
    for key, runs in tried.items():
        lr = best_of([result for result in runs if result.seed == 0]).lr
        groups[key] = [result for result in runs if result.lr == lr]
    for model in dict.fromkeys(model for model, _, _ in groups):
        sets = [data for data in SETS if any(key[:2] == (model, data) for key in groups)]
        print(f"\n{model}\n\n| method | {' | '.join(sets)} |\n|---|{'---|' * len(sets)}")
        for method in METHODS:
            cells = [cell(groups.get((model, data, method), [])) for data in sets]
            if any(cells):
                print(f"| {method} | {' | '.join(cells)} |")


def cell(runs: list[Result]) -> str:
    """Mean accuracy, its deviation over seeds, and the numbers that say how it came about."""
    if not runs:
        return ""
    values = [result.acc for result in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} (n {len(values)}, lr {runs[0].lr:g}, {runs[0].trained:,})"


if __name__ == "__main__":
    main()
