"""Callbacks: what they are told, how they end a run, and what is left of one that they break."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import two_ranks
from tiny_runs import TINY, assert_same_weights, metrics, weights

import vimtune
from vimtune.recipe import Recipe
from vimtune.training import Callback, EpochRecord, Interrupted, Report, Session, StepRecord, train

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file")


class Listener(Callback):
    """Notes what it is told, and does at one moment what a test wants."""

    def __init__(self, at: tuple[Any, ...] = (), act: Any = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.steps: list[StepRecord] = []
        self.at, self.act = at, act

    def _note(self, session: Session, *moment: Any) -> None:
        self.told.append(moment)
        if moment == self.at:
            self.act(session)

    def on_start(self, session: Session) -> None:
        self._note(session, "start", session.step)

    def on_step(self, session: Session, step: StepRecord) -> None:
        self.steps.append(step)
        self._note(session, "step", step.step)

    def on_epoch(self, session: Session, epoch: EpochRecord) -> None:
        self._note(session, "epoch", epoch.epoch)

    def on_end(self, session: Session, report: Report) -> None:
        self._note(session, "end", report.steps)


class Broken(Exception):
    """What a callback of a test raises."""


def fail(session: Session) -> None:
    raise Broken("here")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Listener]:
    """A run that nothing disturbs, and who was told of it."""
    listener = Listener()
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(Recipe(**{**TINY, "output_dir": str(folder)}), callbacks=[listener]), listener


def test_every_moment_is_told_once_and_in_order(whole) -> None:
    report, listener = whole
    steps = [("step", step) for step in range(1, 13)]
    epochs = [[*steps[4 * i : 4 * i + 4], ("epoch", i + 1)] for i in range(3)]
    assert listener.told == [("start", 0), *(moment for epoch in epochs for moment in epoch), ("end", 12)]
    logged = [record for record in metrics(report.run_dir) if record["kind"] == "step"]
    for told, record in zip(listener.steps, logged, strict=True):
        assert (told.step, told.epoch, told.loss, told.lr, told.grad_norm) == tuple(
            record[name] for name in ("step", "epoch", "loss", "lr", "grad_norm")
        )
    assert [step.count for step in listener.steps] == [8, 8, 8, 1] * 3
    assert all(step.seconds > 0 for step in listener.steps)


def test_a_session_shows_the_run(tiny, capsys) -> None:
    seen: list[Any] = []

    def look(session: Session) -> None:
        session.message("from a callback")
        seen.append((session.epoch, session.step, session.epochs, session.total_steps, session.rank))
        seen.append([record.epoch for record in session.history])
        seen.append(Path(session.folder, "checkpoint.safetensors").is_file())
        seen.append(sum(p.requires_grad for p in session.model.parameters()) > 0)
        seen.append((session.device.type, session.recipe.method.peft))

    train(tiny(epochs=2), callbacks=[Listener(("epoch", 1), look)])
    assert seen == [(1, 4, 2, 8, 0), [1], True, True, ("cpu", "lora")]
    assert "from a callback\n" in capsys.readouterr().out


@pytest.mark.parametrize("moment", [("start", 0), ("step", 6), ("epoch", 2)])
def test_an_error_ends_the_run_as_it_is_and_the_run_can_go_on(tiny, saving_each_epoch, whole, moment) -> None:
    with pytest.raises(Broken, match="here") as error:
        train(tiny(), callbacks=[Listener(moment, fail)])
    assert error.value.__cause__ is None and error.traceback[-1].name == "fail"
    left = {path.name for path in Path(tiny().run.output_dir).iterdir()}
    assert "report.json" not in left and not any(name.endswith("tmp") for name in left)
    for line in Path(tiny().run.output_dir, "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    again = Listener()
    rest = train(tiny(resume="auto"), callbacks=[again])
    done = {"start": 0, "step": 4, "epoch": 8}[moment[0]]
    assert again.told[:2] == [("start", done), ("step", done + 1)]
    assert_same_weights(weights(rest.run_dir), weights(whole[0].run_dir))
    assert metrics(rest.run_dir) == metrics(whole[0].run_dir)


def test_an_error_at_the_end_leaves_a_finished_run(tiny) -> None:
    with pytest.raises(Broken):
        train(tiny(epochs=1), callbacks=[Listener(("end", 4), fail)])
    silent = Listener()
    assert train(tiny(epochs=1, resume="auto"), callbacks=[silent]).epochs == 1
    assert silent.told == []


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late, as on a GPU"])
def test_a_callback_ends_the_training_after_a_step(tiny, whole, reading_ahead, fused, late, capsys) -> None:
    if late:
        reading_ahead()
        fused()
    listener = Listener(("step", 6), lambda session: session.stop("good enough"))
    report = train(tiny(), callbacks=[listener])
    assert "a callback ends the training: good enough\n" in capsys.readouterr().out
    assert listener.told[-3:] == [("step", 6), ("epoch", 2), ("end", 6)]
    assert (report.epochs, report.steps, report.stopped_early) == (2, 6, True)
    assert "top1" in report.history[-1] and report.split == "test"
    steps = [record for record in metrics(report.run_dir) if record["kind"] == "step"]
    expected = [record for record in metrics(whole[0].run_dir) if record["kind"] == "step"][:6]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected])
    with pytest.raises(ValueError, match=r"finished after 2 epochs: a callback ended it \('good enough'\)"):
        train(tiny(resume=report.run_dir))
    assert train(tiny(resume="auto")).steps == 6


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}], ids=str)
def test_the_epoch_after_which_a_callback_ends_the_training_is_evaluated(tiny, changes) -> None:
    """Also where no evaluation was due then; the file is that of a run of this length."""
    listener = Listener(("epoch", 1), lambda session: session.stop())
    report = train(tiny(eval_interval=2, **changes), callbacks=[listener])
    assert (report.epochs, report.best_epoch, report.stopped_early) == (1, 1, True)
    kinds = [record["kind"] for record in metrics(report.run_dir)]
    assert kinds == ["step"] * 4 + ["epoch", "evaluation"]
    late = metrics(report.run_dir)[-1]
    assert late == {
        "kind": "evaluation",
        **{"epoch": 1, "step": 4, "split": "val"},
        **{name: report.history[0][name] for name in ("loss", "top1", "top5")},
    }
    other = train(tiny("due", **changes), callbacks=[Listener(("epoch", 1), lambda session: session.stop())])
    assert other.loss == report.loss
    info = vimtune.read_adapter_info(Path(report.run_dir, "adapter.safetensors"))
    assert info.extra["epoch"] == 1


def test_a_wish_that_comes_with_the_last_step_is_none(tiny) -> None:
    report = train(tiny(epochs=1), callbacks=[Listener(("step", 4), lambda session: session.stop())])
    assert not report.stopped_early
    report = train(tiny("b", epochs=1), callbacks=[Listener(("epoch", 1), lambda session: session.stop())])
    assert not report.stopped_early


def test_a_run_that_is_interrupted_while_a_callback_ends_it_ends_after_resuming(tiny, monkeypatch) -> None:
    def both(session: Session) -> None:
        session.stop()
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(tiny(), callbacks=[Listener(("step", 6), both)])
    listener = Listener()
    report = train(tiny(resume="auto"), callbacks=[listener])
    # The signal is seen with the next step at the latest; none follows the one that was ended with.
    assert report.steps == 6 and report.stopped_early
    assert listener.told == [("start", 6), ("epoch", 2), ("end", 6)]


def test_what_is_no_callback_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"callbacks\[1\] = .*Listener.*: expected an instance"):
        train(tiny(), callbacks=[Listener(), Listener])  # type: ignore[list-item]
    assert not Path(tiny().run.output_dir).exists()


def stopping_in_the_second() -> None:
    """Runs of this process have a callback that asks to stop after step 5 if it is in the second process."""

    def act(session: Session) -> None:
        if session.rank == 1:
            session.stop("the second")

    two_ranks.train = functools.partial(train, callbacks=[Listener(("step", 5), act)])


def with_a_callback() -> None:
    """Runs of this process have a callback."""
    two_ranks.train = functools.partial(train, callbacks=[Listener()])


@pytest.mark.processes
def test_one_of_several_processes_ends_the_training_of_all(tiny) -> None:
    """And the first of them alone writes logs."""
    recipe = tiny(logger="csv,tensorboard")
    assert two_ranks.run_two(recipe, prepare=stopping_in_the_second) == ["", ""]
    folder = Path(recipe.run.output_dir)
    report = json.loads((folder / "report.json").read_text())
    assert (report["steps"], report["epochs"], report["stopped_early"]) == (5, 2, True)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "1", "2", "3", "4", "4", "5", "5"]
    assert len(list((folder / "tensorboard").iterdir())) == 1


@pytest.mark.processes
def test_all_processes_need_the_same_callbacks(tiny) -> None:
    for message in two_ranks.run_two(tiny(), sabotage=with_a_callback):
        assert message is not None and "callbacks is" in message and "Listener" in message
