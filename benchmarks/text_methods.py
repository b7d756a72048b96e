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
import statistics
import tempfile
import time
from collections import defaultdict
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
    wanted = [
        Case(Path(model).name, data, method, lr, 0)
        for data in options.data
        for method in options.methods
        for model in options.models
        for lr in METHODS[method][1]
    ]
    results = run_all(wanted, results, options)
    others = [replace(case, seed=seed) for case in best_cases(results) for seed in range(1, options.seeds)]
    results = run_all(others, results, options)
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


def run_all(wanted: list[Case], results: list[Result], options: argparse.Namespace) -> list[Result]:
    """Do the runs that have not been done, and write each of them down at once."""
    done = {case_of(result) for result in results}
    left = [case for case in wanted if case not in done]
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(options.workers):
        numbers.put(number)
    new = not options.output.exists()
    with (
        open(options.output, "a", newline="", encoding="utf-8") as file,
        context.Pool(options.workers, prepare_worker, (numbers, options.gpus)) as pool,
    ):
        writer = csv.writer(file)
        if new:
            writer.writerow(field.name for field in fields(Result))
        for result in pool.imap_unordered(run, [(case, options) for case in left]):
            if result is None:
                continue
            results = [*results, result]
            writer.writerow(asdict(result).values())
            file.flush()
            print(f"{len(results)}: {result}", flush=True)
    return results


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


def best_cases(results: list[Result]) -> list[Case]:
    """Of each model, set and method the case of seed 0 with the best score on the validation split."""
    groups = defaultdict(list)
    for result in results:
        if result.seed == 0:
            groups[result.model, result.data, result.method].append(result)
    return [case_of(max(group, key=lambda result: result.val_acc)) for group in groups.values()]


def print_tables(results: list[Result]) -> None:
    """For each model a table: methods by sets, mean and standard deviation over the seeds."""
    chosen = {(case.model, case.data, case.method): case.lr for case in best_cases(results)}
    groups = defaultdict(list)
    for result in results:
        key = result.model, result.data, result.method
        if result.lr == chosen.get(key):
            groups[key].append(result)
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
