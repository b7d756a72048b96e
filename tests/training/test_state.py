"""A state is one transaction with its adapter, is sane, and is believed only as far as it was checked."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import TINY, assert_same_weights, metrics, weights

import vimtune
from vimtune.recipe import Recipe, load_recipe
from vimtune.recipe.optimizers import OPTIMIZERS
from vimtune.training import NonFiniteError, OutputError, run, train
from vimtune.training.identity import ResumeError
from vimtune.training.state import Progress, check_tensors, load_run_state, save_run_state
from vimtune.training.stepper import Stepper

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file")


class Killed(BaseException):
    """Ends a run where it is, as SIGKILL does."""


def again(recipe: Recipe, **changes: Any):
    return train(load_recipe(None, {**recipe.to_dict(), "resume": "auto", **changes}))


# --- one transaction ------------------------------------------------------------------------------


def test_killed_at_every_write(tiny, monkeypatch):
    """Whichever rename a crash prevents, the run continues to the result of an uninterrupted run."""
    settings = {"epochs": 2, "dataset_kwargs": {**TINY["dataset_kwargs"], "train_per_species": 2}}
    move, moved = os.replace, []
    last = 10**6

    def dies(source, target):
        if len(moved) == last:
            raise Killed
        moved.append(Path(target).name)
        move(source, target)

    monkeypatch.setattr(os, "replace", dies)
    straight = train(tiny("straight", **settings))
    writes = list(moved)
    assert writes[:4] == [
        "recipe.yaml",
        ".adapter.next.safetensors",
        ".logger-tensorboard",
        "checkpoint.safetensors",
    ]
    assert writes[4] == "adapter.safetensors"
    for last in range(len(writes)):
        moved.clear()
        recipe = tiny(f"dies before write {last}", **settings)
        with pytest.raises(Killed):
            train(recipe)
        last = 10**6
        report = again(recipe)
        folder = Path(recipe.run.output_dir)
        assert (report.top1, report.loss) == (straight.top1, straight.loss)
        assert_same_weights(weights(folder), weights(straight.run_dir))
        assert vimtune.read_adapter_info(folder / "adapter.safetensors").extra["epoch"] == report.best_epoch
        assert metrics(folder) == metrics(straight.run_dir)
        assert not list(folder.glob(".*safetensors*"))


def test_the_adapter_is_that_of_the_best_epoch_though_the_rest_differs(tiny, monkeypatch):
    """Killed between adapter and state, and resumed with settings that make the second epoch worse."""
    recipe = tiny(epochs=2)
    top1s = iter([60.0, 80.0, 40.0, 40.0])
    score = run.evaluate

    def scripted(*arguments, **options):
        scores = score(*arguments, **options)
        return _with_top1(scores, next(top1s))

    monkeypatch.setattr(run, "evaluate", scripted)
    with monkeypatch.context() as patch:
        saves = []

        def dies(path, state):
            saves.append(path)
            if len(saves) == 2:
                raise Killed
            save_run_state(path, state)

        patch.setattr(run, "save_run_state", dies)
        with pytest.raises(Killed):
            train(recipe)
    report = again(recipe, lr=1e-4)
    assert (report.best_epoch, report.best_top1) == (1, 60.0)
    assert vimtune.read_adapter_info(Path(report.run_dir, "adapter.safetensors")).extra["epoch"] == 1


def _with_top1(scores, percent: float):
    """The same evaluation with `percent` of the images right."""
    return replace(scores, scores={**scores.scores, "top1": percent})


def test_a_better_adapter_that_cannot_be_read_for_a_moment_is_kept(tiny, monkeypatch):
    recipe = tiny(epochs=1)

    def no_descriptor_left(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("vimtune.adapters.store.read_metadata", no_descriptor_left)
        with pytest.raises(OutputError, match="Too many open files"):
            train(recipe)
    report = again(recipe)
    assert report.best_epoch == 1
    assert vimtune.read_adapter_info(Path(report.run_dir, "adapter.safetensors")).extra["epoch"] == 1


@pytest.mark.parametrize("left", ["nothing", "that of another epoch"])
def test_a_best_adapter_that_is_not_there(tiny, left):
    """Also in folders of earlier versions, killed between their two writes."""
    recipe = tiny(epochs=1)
    report = train(recipe)
    adapter = Path(recipe.run.output_dir, "adapter.safetensors")
    if left == "nothing":
        adapter.unlink()
    else:
        with safe_open(adapter, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            metadata = {
                key: value.replace('"epoch": 1', '"epoch": 9') for key, value in file.metadata().items()
            }
        save_file(tensors, adapter, metadata)
    Path(recipe.run.output_dir, "report.json").unlink()
    with pytest.raises(ResumeError, match=r"the best adapter, of epoch 1, is not in .*raise --epochs"):
        again(recipe)
    report = again(recipe, epochs=2)
    assert report.best_epoch == 2 and "the best adapter, of epoch 1, is not in" in " ".join(report.warnings)


# --- sane -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("diverges", ["weight", "ema", "exp_avg"])
def test_diverged_weights_do_not_replace_the_last_good_state(tiny, saving_each_epoch, monkeypatch, diverges):
    """They become infinite in the last step of an epoch that is not evaluated, so nothing else sees it."""
    recipe = tiny(ema=0.9, eval_interval=3)
    update = Stepper._update

    def overflows(stepper, step):
        update(stepper, step)
        trained = stepper.trained
        if step.number == 7:
            name, parameter = next(iter(trained.parameters.items()))
            tensor = {
                "weight": parameter.data,
                "ema": trained.average.tensors[name],
                "exp_avg": trained.optimizer.state[parameter]["exp_avg"],
            }[diverges]
            tensor.view(-1)[0] = float("inf")

    monkeypatch.setattr(Stepper, "_update", overflows)
    with pytest.raises(
        NonFiniteError, match=r"after step 8, .* is not finite \(1 of .*as it was saved before"
    ):
        train(recipe)
    state = load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors"))
    assert state.progress.epoch == 1 and bool(torch.isfinite(next(iter(state.adapter.values()))).all())


def test_a_loss_that_is_not_finite_is_not_saved(tiny, monkeypatch):
    score = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *a, **k: replace(score(*a, **k), loss=float("inf")))
    recipe = tiny()
    with pytest.raises(NonFiniteError, match="the loss on 'val' is not finite"):
        train(recipe)
    assert not list(Path(recipe.run.output_dir).glob("*.safetensors"))


def test_of_epochs_with_as_many_right_the_lower_loss_is_the_best(tiny, monkeypatch):
    losses = iter([0.9, 0.7, 0.8, 0.5])
    score = run.evaluate

    def scripted(*arguments, **options):
        return replace(_with_top1(score(*arguments, **options), 50.0), loss=next(losses))

    monkeypatch.setattr(run, "evaluate", scripted)
    report = train(tiny())
    state = load_run_state(Path(report.run_dir, "checkpoint.safetensors"))
    info = vimtune.read_adapter_info(Path(report.run_dir, "adapter.safetensors"))
    assert report.best_epoch == state.progress.best_epoch == info.extra["epoch"] == 2
    assert state.progress.best.loss == 0.7 and state.progress.stale_evaluations == 1


# --- believed only as far as it was checked -------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Recipe:
    """Recipe of a finished run with everything in its state."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = Recipe(**{**TINY, "output_dir": str(folder), "epochs": 2, "ema": 0.9})
    train(recipe)
    return recipe


@pytest.fixture
def altered(finished, tmp_path) -> Callable[..., Path]:
    """`altered(change)`: a checkpoint whose metadata (parsed) and tensors `change` has had in its hands."""

    def build(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Path:
        with safe_open(Path(finished.run.output_dir, "checkpoint.safetensors"), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            texts = dict(file.metadata())
        values = {key: json.loads(text) for key, text in texts.items() if key != "format"}
        change(values, tensors)
        texts |= {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
        }
        path = tmp_path / "checkpoint.safetensors"
        save_file(
            tensors, path, {key: text for key, text in texts.items() if key in values or key == "format"}
        )
        return path

    return build


def in_progress(**changes: Any) -> Callable[..., object]:
    return lambda values, tensors: values["progress"].update(changes)


def in_record(**changes: Any) -> Callable[..., object]:
    return lambda values, tensors: values["progress"]["history"][0].update(changes)


METADATA = {
    "no JSON": lambda values, tensors: values.update(progress="{"),
    "deep JSON": lambda values, tensors: values.update(progress="[" * 100_000),
    "a list": lambda values, tensors: values.update(progress=[]),
    "missing": lambda values, tensors: values.pop("facts"),
    "unknown key": in_progress(surplus=1),
    "missing key": lambda values, tensors: values["facts"].pop("outputs"),
    "text for a number": in_progress(step="3"),
    "a boolean for a number": in_progress(epoch=True),
    "a negative number": in_progress(batch=-1),
    "a huge number": in_progress(step=10**30),
    "NaN": in_progress(loss_sum=float("nan")),
    "over 100 %": in_record(scores={"top1": 101.0, "top5": None}),
    "a score that is none": in_record(scores={"top1": 50.0}),
    "more epochs than records": in_progress(epoch=3),
    "best epoch without scores": in_progress(best_epoch=7),
    "NaN in the history": in_record(train_loss=float("nan")),
    "text in the history": in_record(scores={"top1": "50", "top5": None}),
    "half of the scores": lambda values, tensors: values["progress"]["history"][0].pop("loss"),
    "no records": in_progress(history="none"),
    "class names that are none": lambda values, tensors: values["facts"].update(outputs={"classes": [1, 2]}),
    "recipe": lambda values, tensors: values["recipe"].update(epochs="many", lr=-1),
    "scaler": lambda values, tensors: values.update(scaler={"scale": 0.0}),
    "scaler list": lambda values, tensors: values.update(scaler=[1]),
    "tensor of no kind": lambda values, tensors: tensors.update({"code/x": torch.zeros(1)}),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_are_checked(altered, name):
    path = altered(METADATA[name])
    with pytest.raises(ResumeError) as error:
        load_run_state(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


def test_what_this_version_writes_is_read(altered):
    state = load_run_state(altered(lambda values, tensors: None))
    assert isinstance(state.progress, Progress) and state.progress.epoch == 2 and state.ema


def test_a_state_of_the_version_before_continues(finished, altered):
    """It has no fingerprints, no number of processes, and no setting `force`."""

    def as_before(values, tensors):
        values["recipe"].pop("force")
        for fact in ("data", "processes"):
            values["facts"].pop(fact)

    path = altered(as_before)
    for name in ("recipe.yaml", "adapter.safetensors", "metrics.jsonl"):
        (path.parent / name).write_bytes(Path(finished.run.output_dir, name).read_bytes())
    values = {"resume": str(path.parent), "output_dir": str(path.parent), "epochs": 3}
    report = train(load_recipe(None, values))
    assert report.epochs == 3 and "without fingerprints" in " ".join(report.warnings)


def first(tensors: dict[str, torch.Tensor], kind: str) -> str:
    return next(key for key in sorted(tensors) if key.startswith(kind))


TENSORS = {
    "NaN": lambda tensors, key: tensors[key].view(-1)[:1].fill_(float("nan")),
    "infinity": lambda tensors, key: tensors[key].view(-1)[:1].fill_(float("inf")),
    "another type": lambda tensors, key: tensors.update({key: tensors[key].double()}),
    "another shape": lambda tensors, key: tensors.update({key: tensors[key][None]}),
    "one value for all": lambda tensors, key: tensors.update({key: tensors[key].view(-1)[:1].clone()}),
    "missing": lambda tensors, key: tensors.pop(key),
    "surplus": lambda tensors, key: tensors.update({key + "x": tensors[key].clone()}),
}


@pytest.mark.parametrize("kind", ["adapter/", "ema/", "optimizer/"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_checked(altered, name, kind):
    keys: list[str] = []

    def change(values, tensors):
        keys.append(first(tensors, kind))
        TENSORS[name](tensors, keys[0])

    good = load_run_state(altered(lambda values, tensors: None))
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in good.adapter.items()}
    layouts = dict.fromkeys(parameters, OPTIMIZERS["adamw"].layout(matrix=False))
    check_tensors(good, good.adapter, parameters, layouts)
    with pytest.raises(ResumeError, match="does not fit this run") as error:
        check_tensors(load_run_state(altered(change)), good.adapter, parameters, layouts)
    assert keys[0] in str(error.value)


@pytest.mark.parametrize("what", ["optimizer/", "ema/"])
def test_nothing_that_is_missing_starts_afresh(finished, altered, what):
    def remove(values, tensors):
        for key in [key for key in tensors if key.startswith(what)]:
            del tensors[key]

    path = altered(remove)
    (path.parent / "recipe.yaml").write_bytes(Path(finished.run.output_dir, "recipe.yaml").read_bytes())
    with pytest.raises(ResumeError, match=f"{what}.* is missing"):
        train(load_recipe(None, {"resume": str(path), "output_dir": str(path.parent), "epochs": 3}))


def test_a_place_beyond_the_data_is_refused(finished, altered):
    path = altered(in_progress(batch=1000))
    (path.parent / "recipe.yaml").write_bytes(Path(finished.run.output_dir, "recipe.yaml").read_bytes())
    with pytest.raises(ResumeError, match="1000 batches of an epoch, which now has 4"):
        train(load_recipe(None, {"resume": str(path), "output_dir": str(path.parent), "epochs": 3}))


@pytest.mark.parametrize("text", ["", "[]", '{"epochs": "2"}', '{"epochs": NaN}', "[" * 100_000])
def test_a_damaged_report_is_written_again(finished, tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.yaml", "adapter.safetensors", "metrics.jsonl", "checkpoint.safetensors"):
        (folder / name).write_bytes(Path(finished.run.output_dir, name).read_bytes())
    (folder / "report.json").write_text(text)
    report = train(load_recipe(None, {"resume": str(folder), "output_dir": str(folder)}))
    assert json.loads((folder / "report.json").read_text())["top1"] == report.top1
