"""Searches: they score on validation images alone, go on where they were stopped, and end with a recipe."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from search_runs import SPACE, flags, tiny_plan

from vimtune import cli, plugins
from vimtune.data.synthetic import SyntheticFlowers
from vimtune.recipe import Recipe, load_recipe
from vimtune.search import study as studies
from vimtune.search.plan import Plan
from vimtune.search.search import Step, begin, run_search
from vimtune.search.study import Study
from vimtune.search.trial import TrialOutcome, value_of
from vimtune.tasks.classification import Classification
from vimtune.training import train


class Killed(BaseException):
    """Ends a search where it is, as SIGKILL does."""


def search(plan, folder: Path, workers: int = 1):
    """A new search in `folder`."""
    begin(plan, folder)
    return run_search(plan, folder, workers)


def rows(folder: Path) -> dict[int, dict[str, str]]:
    """The table of trials by their number, without what depends on the clock."""
    with open(folder / "trials.csv", newline="") as file:
        found = {int(row.pop("trial")): row for row in csv.DictReader(file)}
    for row in found.values():
        row.pop("seconds")
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a search of three trials that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "search"
    search(tiny_plan(), folder)
    return folder


def test_a_search_leaves_a_table_a_picture_and_a_recipe_that_trains(finished, tmp_path) -> None:
    table = rows(finished)
    assert sorted(table) == [0, 1, 2] and {row["state"] for row in table.values()} == {"complete"}
    scores = [float(row["score"]) for row in table.values()]
    assert scores == sorted(scores, reverse=True), "the best one comes first"
    best = next(iter(table.values()))
    recipe = load_recipe(finished / "best.yaml", {"output_dir": str(tmp_path / "run"), "epochs": 1})
    assert recipe.optimisation.lr == pytest.approx(float(best["lr"]))
    assert (
        recipe.method.peft
        == "+".join(
            method for method, part in (("lora", "proj"), ("bitfit", "biases")) if best[part] == "True"
        )
        or recipe.method.peft == "linear"
    )
    report = train(recipe)
    assert report.split == "test" and report.selection_split == "val"
    markdown = (finished / "trials.md").read_text()
    assert markdown.startswith("| trial | state | val top-1 | epoch |") and markdown.count("\n") == 5
    assert (finished / "trials.png").stat().st_size > 0
    assert sorted(path.name for path in (finished / "trials" / "00000").iterdir()) == [
        "log.txt",
        "metrics.jsonl",
        "recipe.yaml",
        "report.json",
    ]


def test_the_test_split_is_never_opened(tmp_path, monkeypatch) -> None:
    opened = []
    original = SyntheticFlowers.__init__

    @functools.wraps(original)
    def init(self, split, *args, **kwargs):
        opened.append(split)
        original(self, split, *args, **kwargs)

    monkeypatch.setattr(SyntheticFlowers, "__init__", init)
    # The recipe would train on val and select by test: no trial does.
    recipe = search(tiny_plan(trials=1, train_split="train+val", train_size=10), tmp_path / "search")
    assert set(opened) == {"train", "val"}
    report = json.loads((tmp_path / "search/trials/00000/report.json").read_text())
    assert report["split"] == report["selection_split"] == "val"
    assert "8 images" in report["data"]["train"] and "2 images" in report["data"]["val"]
    assert recipe.data.train_split == "train+val" and recipe.data.test, "found: all 10, tested once"
    assert recipe.data.evaluated_once


def test_a_killed_search_goes_on_as_if_nothing_had_been(finished, tmp_path, monkeypatch) -> None:
    folder, calls = tmp_path / "search", []
    keep_on = Step.keep_on

    def dying(self, number: int, epoch: int, score: float) -> bool:
        calls.append((number, epoch))
        if calls[-1] == (1, 1):
            raise Killed
        return keep_on(self, number, epoch, score)

    monkeypatch.setattr(Step, "keep_on", dying)
    with pytest.raises(Killed):
        search(tiny_plan(), folder)
    monkeypatch.setattr(Step, "keep_on", lambda *args: calls.append(args[1:3]) or keep_on(*args))
    journal = folder / "study.journal"
    with open(journal, "a") as file:
        file.write('{"op_code": 4, "worker')  # a line of which the end is missing
    journal.with_name("study.journal.lock").symlink_to(journal)
    assert cli.main(["search", "--resume", str(folder)]) == 0
    assert calls == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)], "no epoch is trained twice"
    assert rows(folder) == rows(finished)
    assert (folder / "best.yaml").read_text() == (finished / "best.yaml").read_text()
    shutil.rmtree(folder / "trials")
    assert cli.main(["search", "--resume", str(folder)]) == 0, "a finished search only tells its result"
    assert not (folder / "trials").exists()


def test_two_workers_find_the_same(finished, tmp_path, monkeypatch) -> None:
    """Their processes import the packages that this one was told to import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "noted.py").write_text(
        "import os, pathlib\npathlib.Path(__file__).with_name(f'noted-{os.getpid()}').touch()\n"
    )
    plugins.import_package("noted")
    search(tiny_plan(), tmp_path / "search", workers=2)
    assert rows(tmp_path / "search") == rows(finished)
    assert len(list(tmp_path.glob("noted-*"))) == 3


def test_two_steps_refine_what_the_first_one_has_found(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(plugins, "_imported", ["mine"])
    space = {
        "parts": {
            "proj": {
                "method": "lora",
                "optional": False,
                "options": {"rank": 1},
                "refine": {"rank": {"low": 2, "high": 3}},
            }
        },
        "refine": {"keys": {"lr": {"low": 2.0, "high": 3.0, "times": "lr"}}},
    }
    recipe = search(tiny_plan(trials=1, space=space, epochs=1, lr=0.01), tmp_path / "search")
    assert [len(rows(tmp_path / "search" / step)) for step in ("step-1", "step-2")] == [1, 1]
    assert recipe.method.peft_kwargs["lora"]["rank"] in (2, 3)
    assert 0.02 <= recipe.optimisation.lr <= 0.03
    out = capsys.readouterr().out
    assert "small, step 1: 1 trials in" in out and "train it with:" in out
    assert out.endswith(f"vimtune train --config {tmp_path / 'search' / 'best.yaml'} --import mine\n")


def test_texts_without_classes_are_compared_by_their_loss(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    texts = [{"text": f"{word} is a word"} for word in ("one", "two", "three", "four", "five", "six")]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    opened = []
    monkeypatch.setattr("vimtune.tasks.text.job.open_test", lambda *args: opened.append(args))
    space = {"parts": {"low": {"method": "lora", "options": {"rank": {"low": 1, "high": 2}}}}}
    settings = {"task": "text", "data_dir": str(tmp_path), "model": "mamba_tiny", "train_size": 5}
    recipe = Recipe(**settings, epochs=1, warmup_epochs=0, device="cpu", threads=1)
    search(Plan("texts", recipe, space, trials=1, seed=0, prune=True), tmp_path / "search")
    assert not opened
    out = capsys.readouterr().out
    assert "trial 0: complete; val loss " in out and "val loss -" not in out
    assert float(rows(tmp_path / "search")[0]["score"]) > 0


def test_trials_that_cannot_run_are_told_and_a_hopeless_search_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vimtune.search.search.check_parts", lambda plan: [])
    parts = {"nowhere": {"method": "lora", "targets": "nowhere", "optional": False}}
    with pytest.raises(ValueError, match=r"the first 3 trials have failed, the last one so: .*'nowhere'"):
        search(tiny_plan(trials=5, space={"parts": parts}), tmp_path / "search")
    assert "unknown target 'nowhere'" in (tmp_path / "search/trials.md").read_text()
    assert {row["state"] for row in rows(tmp_path / "search").values()} == {"failed"}


# --- the journal


def study(path: Path, **changes: Any) -> Study:
    return Study(path, **{"seed": 1, "prune": True, "epochs": 10, **changes})


def test_trials_that_lag_behind_are_ended(tmp_path) -> None:
    found = study(tmp_path / "j")
    for number in range(5):
        trial = found.ask()
        trial.suggest_float("lr", 0.0, 1.0)
        assert all(found.keep_on(trial, epoch, number + epoch) for epoch in range(1, 4))
        found.finish(trial, TrialOutcome("complete", value=float(number), epoch=3, parameters=number))
    bad = found.ask()
    assert found.keep_on(bad, 1, -9.0), "not in the first tenth"
    assert not found.keep_on(bad, 2, -10.0)
    found.finish(bad, TrialOutcome("pruned"))
    ended = found.trials()[5].outcome
    assert ended is not None and (ended.value, ended.epoch) == (-9.0, 1)
    assert [trial.number for trial in found.ranked()] == [4, 3, 2, 1, 0]
    never = study(tmp_path / "k", prune=False)
    assert never.keep_on(never.ask(), 2, -9.0)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"loss": 1.5, "top1": 40.0, "top5": None}, (40.0, "top1")),
        ({"loss": 1.5, "top1": None, "top5": None}, (-1.5, "loss")),
    ],
)
def test_trials_are_compared_by_the_first_score_or_by_the_loss(record, expected) -> None:
    assert value_of(Classification(), record) == expected


def test_what_a_trial_draws_depends_on_the_seed_and_the_trials_before_it(tmp_path) -> None:
    def draws(path: Path, seed: int, reopen: bool) -> list[float]:
        values, found = [], study(path, seed=seed)
        for _ in range(14):  # more than those that are drawn at random
            trial = found.ask()
            values.append(trial.suggest_float("lr", 0.0, 1.0))
            found.finish(trial, TrialOutcome("complete", value=-((values[-1] - 0.3) ** 2)))
            found = study(path, seed=seed) if reopen else found
        return values

    assert draws(tmp_path / "a", 1, False) == draws(tmp_path / "b", 1, True)
    assert draws(tmp_path / "c", 1, False) != draws(tmp_path / "d", 2, False)


@pytest.mark.parametrize(
    "content", [b"{}\n", b"[1, 2]\n", b"no json\n{}\n", b"\xff\xfe\n\n", b'{"op_code": 99}\n']
)
def test_a_damaged_journal_is_one_line(tmp_path, content) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"study\.journal is damaged \(\w+\): start the search anew"
    ) as error:
        study(path)
    assert "\n" not in str(error.value)


def test_an_outcome_of_somebody_else_is_compared_with_a_schema(tmp_path) -> None:
    found = study(tmp_path / "j")
    trial = found.ask()
    trial.set_user_attr("outcome", {"state": "won", "value": "high"})
    found._study.tell(trial, 1.0)
    with pytest.raises(ValueError, match="the journal: trial 0 does not have the expected form: state"):
        found.trials()


def test_journals_that_are_too_long_are_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(studies, "MAX_BYTES", 10)
    (tmp_path / "j").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="has 11 bytes; at most 10 are read"):
        study(tmp_path / "j")


# --- the command


def fails(capsys, *arguments: str) -> str:
    assert cli.main(["search", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    return err


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys, monkeypatch) -> None:
    space, folder = tmp_path / "space.yaml", tmp_path / "search"
    given = flags(folder, space)
    assert "--space is missing: expected a YAML file or one of mambapeft" in fails(capsys)
    assert "--trials '0': expected a whole number >= 1" in fails(capsys, *given, "--trials", "0")
    reason = "the space says how trials adapt the model"
    assert f"unknown flag --peft: {reason}. See" in fails(capsys, *given, "--peft", "lora")
    assert "unknown flag --force: trials go on with the data" in fails(capsys, *given, "--force")
    assert "is no folder of a search: it has no search.yaml" in fails(capsys, "--resume", str(tmp_path))
    assert "lr = 'x': expected" in fails(capsys, *given, "--lr", "x")
    space.write_text(yaml.safe_dump(SPACE))
    for key in ("train-split train+val", "eval-split test"):
        assert "a search trains on train and scores on val" in fails(capsys, *given, *f"--{key}".split())
    ignored = fails(capsys, *given, "--lr", "0.1")
    assert "--lr '0.1' would have no effect: the space draws lr in every trial. Leave the flag out" in ignored
    space.write_text(yaml.safe_dump({**SPACE, "more": 1}))
    assert "the space: unknown key 'more'" in fails(capsys, *given)
    assert not folder.exists(), "nothing is left behind"
    space.write_text(yaml.safe_dump(SPACE))
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert "is not empty: give the name of a new folder" in fails(capsys, *given)
    tiny_plan().save(folder / "search.yaml")
    assert "holds another search: choose another folder, or continue" in fails(capsys, *given)
    message = fails(capsys, "--resume", str(folder), "--lr", "0.1")
    assert "goes on with a search as it was planned: leave out --lr" in message
    monkeypatch.setattr(studies.importlib.util, "find_spec", lambda name: None)
    assert "a search needs optuna: pip install 'vimtune[search]'" in fails(capsys, *given)


def test_a_task_that_would_open_the_test_split_is_refused(capsys, tmp_path) -> None:
    from vimtune.search.reading import SpaceError
    from vimtune.tasks import TASKS

    plan = tiny_plan()
    assert "test" in TASKS.get("text").data_options.__dataclass_fields__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vimtune.search.plan.keys_of", lambda task: {})
        with pytest.raises(SpaceError, match="has no key `test`, so that a trial would open the test split"):
            plan.check()


def test_trials_with_defaults_of_another_version_are_not_mixed_with_those_of_today(tmp_path, capsys) -> None:
    space = {"parts": {"scaled": {"method": "prodial", "optional": False, "options": {"rank": 2}}}}
    folder = tmp_path / "search"
    search(tiny_plan(trials=1, space=space, epochs=1), folder)
    report = folder / "trials/00000/report.json"
    report.write_text(report.read_text().replace('"variant": "exp"', '"variant": "free"'))
    plan = yaml.safe_load((folder / "search.yaml").read_text())
    (folder / "search.yaml").write_text(yaml.safe_dump({**plan, "trials": 2}))
    capsys.readouterr()
    assert cli.main(["search", "--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "had other defaults: variant of prodial was 'free' and is now 'exp'" in error
    assert "in search.yaml of the search (options: {variant: free} in each part of prodial)" in error
    # What the message says is done.
    plan["space"]["parts"]["scaled"]["options"]["variant"] = "free"
    (folder / "search.yaml").write_text(yaml.safe_dump({**plan, "trials": 2}))
    assert cli.main(["search", "--resume", str(folder)]) == 0
    assert load_recipe(folder / "best.yaml").method.peft_kwargs["prodial"]["variant"] == "free"
