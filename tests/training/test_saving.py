"""States are saved as often as saving takes little of a run's time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tiny_runs import assert_same_weights, metrics, weights

from vimtune.recipe import load_recipe
from vimtune.training import run, saving, train
from vimtune.training.callbacks import Callback
from vimtune.training.saving import SavingTimes
from vimtune.training.state import load_run_state, save_run_state

pytestmark = pytest.mark.usefixtures("no_pictures")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The time of `SavingTimes`, which the test moves on."""
    found = Clock()
    monkeypatch.setattr(saving, "time", found)
    return found


@pytest.mark.parametrize("save", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("epoch", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_saving_takes_its_share_and_no_epoch_waits_that_is_long_enough(clock, epoch, save):
    times, saved, epochs = SavingTimes(), [], 2000
    for number in range(1, epochs + 1):
        clock.now += epoch
        if times.is_due:
            with times.measured():
                clock.now += save
            saved.append(number)
    share = len(saved) * save / (clock.now - 1000.0)
    assert saved[0] == 1
    assert share <= saving.SHARE * 1.05 + save / (clock.now - 1000.0)
    longest = max(after - before for before, after in itertools.pairwise([*saved, epochs + 1]))
    assert longest <= 1 or saving.SHARE * (longest - 1) * epoch < save
    if saving.SHARE * epoch >= save:
        assert len(saved) == epochs


@pytest.fixture
def slow_saves(monkeypatch) -> list[int]:
    """The epochs whose states were saved. By the clock of `SavingTimes` a save takes a minute."""
    saved: list[int] = []
    real = saving.time.monotonic
    late = 0.0

    class Late:
        """The module `time`, later by the saves."""

        @staticmethod
        def monotonic() -> float:
            """The time in seconds."""
            return real() + late

    def save(path, state) -> None:
        nonlocal late
        late += 60.0
        save_run_state(path, state)
        saved.append(state.progress.epoch)

    monkeypatch.setattr(saving, "time", Late)
    monkeypatch.setattr(run, "save_run_state", save)
    return saved


def test_short_epochs_are_not_all_saved_but_the_last_one_is(tiny, slow_saves):
    report = train(tiny(epochs=4))
    assert slow_saves == [1, 4]
    assert load_run_state(Path(report.run_dir, "checkpoint.safetensors")).progress.epoch == 4


def test_an_epoch_that_a_callback_makes_the_last_one_is_saved(tiny, slow_saves):
    class Stops(Callback):
        """Ends the training after the second epoch."""

        def on_epoch(self, session, epoch) -> None:
            """Ask for it."""
            if epoch.epoch == 2:
                session.stop()

    report = train(tiny(epochs=4), callbacks=[Stops()])
    assert slow_saves == [1, 2] and report.stopped_early


def test_what_was_not_saved_is_trained_again_as_it_was(tiny, slow_saves):
    """A crash finds the files of the first epoch, also its best adapter, whatever better ones there were."""

    class Breaks(Callback):
        """Ends the process, as it were, in the third epoch."""

        def on_step(self, session, step) -> None:
            """Break."""
            if step.epoch == 3:
                raise KeyError("broken")

    straight = train(tiny("straight", epochs=4))
    with pytest.raises(KeyError):
        train(tiny("parts", epochs=4), callbacks=[Breaks()])
    folder = Path(tiny("parts").run.output_dir)
    assert load_run_state(folder / "checkpoint.safetensors").progress.epoch == 1
    train(load_recipe(None, {"resume": str(folder)}))
    assert_same_weights(weights(folder), weights(straight.run_dir))
    assert metrics(folder) == metrics(straight.run_dir)
