"""Settings of a run against each other: what must not change the result, and what must."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY, assert_close_metrics, assert_same_weights, largest_difference, metrics, weights

import vimtune
from vimtune import adapters
from vimtune.data import CorruptImageError, build_transform, create_dataset, create_loader
from vimtune.data.synthetic import SyntheticFlowers
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe, load_recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.precision import build_autocast
from vimtune.tasks.classification import Classification
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.images.job import build_model
from vimtune.tasks.images.scoring import ImageTally
from vimtune.training import InputError, Report, evaluate, run, train, trained
from vimtune.training.identity import ResumeError
from vimtune.training.state import load_run_state

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file")


@pytest.fixture
def tiny(tiny):
    return lambda name="run", **changes: tiny(name, **{"epochs": 2, **changes})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Report:
    """The run that the others are compared with."""
    return train(Recipe(**{**TINY, "epochs": 2, "output_dir": str(tmp_path_factory.mktemp("plain") / "run")}))


def test_run_folder_is_complete(plain):
    folder = Path(plain.run_dir)
    assert {path.name for path in folder.iterdir()} == {
        ".holder",
        ".lock",
        ".logger-tensorboard",
        "recipe.yaml",
        "adapter.safetensors",
        "checkpoint.safetensors",
        "metrics.jsonl",
        "tensorboard",
        "report.json",
        "report.html",
        "learning_curve.png",
        "confusion_matrix.png",
        "confusion_matrix.csv",
        "examples.png",
    }
    assert load_recipe(folder / "recipe.yaml", {"resume": str(folder)}).run.output_dir == str(folder)


def test_saved_adapter_gives_the_reported_scores(plain):
    recipe = load_recipe(None, {"resume": plain.run_dir})
    info = vimtune.read_adapter_info(Path(plain.run_dir, "adapter.safetensors"))
    model = build_model(recipe, 5)
    vimtune.load_adapter(model, Path(plain.run_dir, "adapter.safetensors"), name="loaded")
    dataset = create_dataset(recipe.data.dataset, "test", img_size=(32, 32), **recipe.data.dataset_kwargs)
    transform = build_transform(**info.preprocessing)
    loader = create_loader(
        dataset, transform, batch_size=3, shuffle=False, drop_last=False, num_workers=0, seed=0
    )
    cpu = torch.device("cpu")
    batches = ImageBatches(loader, numbered=True)
    scores = evaluate(model, batches, ImageTally(5, 10), device=cpu, autocast=build_autocast("none", cpu))
    assert info.classes == dataset.classes == list(plain.per_class)
    assert scores.scores == {"top1": plain.top1, "top5": plain.top5} and scores.count == plain.num_images
    assert scores.loss == pytest.approx(plain.loss, rel=1e-5)
    assert info.extra["epoch"] == plain.best_epoch


def test_training_lowers_the_loss_and_frozen_weights_stay(tiny):
    report = train(tiny(epochs=6, lr=2e-2, peft="full", rank=None, augmentation="none"))
    losses = [record["train_loss"] for record in report.history]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4, "grad_accum": 2},
        {"batch_size": 2, "grad_accum": 4},
        {"grad_checkpointing": True},
        {"num_workers": 2},
        {"cache": True},
        {"eval_interval": 2},
        {"log_interval": 100},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_settings_that_keep_the_result(tiny, plain, changes):
    report = train(tiny(**changes))
    assert largest_difference(weights(report.run_dir), weights(plain.run_dir)) < 2e-6
    assert report.steps == plain.steps


def test_gradient_is_the_mean_over_the_images_there_are(tiny):
    full = train(tiny("full", batch_size=25))
    short = train(tiny("short", batch_size=32))  # one batch of 25 images
    accumulated = train(tiny("accumulated", batch_size=20, grad_accum=3))  # 20 and 5
    for other in (short, accumulated):
        assert_close_metrics(full.run_dir, other.run_dir, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"label_smoothing": 0.1},
        {"clip_grad": 1e-3},
        {"weight_decay": 0.5},
        {"drop_path": 0.3},
        {"dropout": 0.2},
        {"head_lr": 1e-4},
        {"min_lr": 1e-3},
        {"warmup_epochs": 0},
        {"augmentation": "none"},
        {"transforms": "torchvision"},
        {"amp": "bf16"},
        {"pretrained": False, "layers": [0]},
    ],
    ids=str,
)
def test_settings_that_change_the_result(tiny, plain, changes):
    report = train(tiny(**changes))
    ours, theirs = weights(report.run_dir), weights(plain.run_dir)
    assert ours.keys() != theirs.keys() or largest_difference(ours, theirs) > 1e-6
    assert all(math.isfinite(record["train_loss"]) for record in report.history)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_same_recipe_same_weights_and_deterministic_mode_leaves_no_trace(tiny, two_threads):
    switches = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.get_num_threads(),
        resolved_backend("cpu"),
        matplotlib.get_backend(),
    )
    torch.manual_seed(5)
    np.random.seed(5)
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen = []

    original = run.evaluate

    def spy(*args, **kwargs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate", spy)
        one = train(tiny("one", deterministic=True, mixup=0.5))
    other = train(tiny("other", mixup=0.5))
    assert seen and all(seen)
    assert_same_weights(weights(one.run_dir), weights(other.run_dir))
    assert metrics(one.run_dir) == metrics(other.run_dir)
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.array_equal(np.random.get_state()[1], random[1])
    assert switches == (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.get_num_threads(),
        resolved_backend("cpu"),
        matplotlib.get_backend(),
    )


def test_average_of_weights_is_evaluated_and_saved(tiny):
    report = train(tiny(ema=0.9, epochs=1, lr=2e-2))
    recipe = load_recipe(None, {"resume": report.run_dir})
    last = weights(report.run_dir)
    model = build_model(recipe, 5)
    vimtune.load_adapter(model, Path(report.run_dir, "adapter.safetensors"), name="saved")
    saved = adapters.adapter_state_dict(model, "saved")
    assert largest_difference(saved, last) > 1e-4  # an average, not the last weights


def test_early_stop(tiny, monkeypatch):
    original = run.evaluate
    calls = []

    def never_better(*args, **kwargs):
        calls.append(1)
        scores = original(*args, **kwargs)
        return replace(scores, scores={"top1": 100.0 if len(calls) == 1 else 20.0, "top5": None})

    monkeypatch.setattr(run, "evaluate", never_better)
    report = train(tiny(epochs=9, early_stop=2))
    assert (report.epochs, report.best_epoch, report.stopped_early) == (3, 1, True)


def test_compiled_model_gives_the_same_run(tiny, plain, monkeypatch):
    compiled = torch.compile
    used = []

    def traced_only(model):
        used.append(model)
        return compiled(model, backend="eager")  # captures the graphs, spares the C++ compiler

    monkeypatch.setattr(torch, "compile", traced_only)
    report = train(tiny(compile=True))
    assert len(used) == 1
    assert largest_difference(weights(report.run_dir), weights(plain.run_dir)) < 2e-6


@pytest.mark.parametrize(("scale", "skipped"), [(2.0**16, False), (3e38, True)])
def test_scaled_loss(tiny, plain, monkeypatch, scale, skipped):
    """fp16's loss scaling, here on the CPU in fp32."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    monkeypatch.setattr(trained, "build_scaler", lambda amp, device: scaler)
    report = train(tiny())
    state = load_run_state(Path(report.run_dir, "checkpoint.safetensors"))
    if skipped:  # the first gradients overflow: no update, a smaller scale
        assert state.scaler["scale"] < scale
        assert int(state.optimizer["head.bias.value"]["step"]) < 8
        assert state.progress.step == 8
    else:
        assert state.scaler["scale"] == 2.0**18
        assert largest_difference(state.adapter, weights(plain.run_dir)) < 2e-6
    assert all(torch.isfinite(value).all() for value in state.adapter.values())


def test_fp16_needs_a_gpu():
    with pytest.raises(ValueError, match=r"amp = 'fp16' needs a CUDA GPU and the device is cpu: use bf16"):
        build_autocast("fp16", torch.device("cpu"))


def test_dead_adapter_stops_the_run(tiny, monkeypatch):
    original = Classification.open

    def with_a_dead_tensor(task, recipe, processes):
        job = original(task, recipe, processes)
        dead = next(e for e in adapters.adapter_parameters(job.model) if e.group == "adapter")
        forward = job.model.forward

        def without(images):
            dead.parameter.requires_grad_(False)
            logits = forward(images)
            dead.parameter.requires_grad_(True)
            return logits

        job.model.forward = without
        return job

    monkeypatch.setattr(Classification, "open", with_a_dead_tensor)
    with pytest.raises(adapters.DeadAdapterError, match=r"layers\.0\.mixer"):
        train(tiny())


def test_warns_of_gradients_that_stay_zero(tiny, monkeypatch, capsys):
    original = Classification.open

    def with_a_useless_tensor(task, recipe, processes):
        job = original(task, recipe, processes)
        for entry in adapters.adapter_parameters(job.model):
            if entry.key == "head.bias.weight" or entry.base_name == "head.bias":
                entry.parameter.register_hook(torch.zeros_like)
        return job

    monkeypatch.setattr(Classification, "open", with_a_useless_tensor)
    report = train(tiny())
    assert len(report.warnings) == 1  # LoRA's A starts with a zero gradient and is not named
    assert "head.bias" in report.warnings[0] and "lora" not in report.warnings[0]
    assert "warning: gradient exactly zero" in capsys.readouterr().out


def test_no_warning_for_a_sound_run(plain):
    assert plain.warnings == []


def test_console_off_a_terminal_is_brief(tiny, capsys):
    train(tiny())
    lines = capsys.readouterr().out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2 and "top1" in epochs[0] and "img/s" in epochs[0]
    assert len(lines) < 2 + 6 + 16
    assert "\x1b" not in "".join(lines)


def test_skipped_images_are_counted(tiny, damaged):
    damaged(lambda index, turn: index in (3, 4))
    told = (
        r"cannot decode image .*: damaged\. Leave .* with which a run can be continued, too; .* begin anew; "
    )
    with pytest.raises(InputError, match=told):
        train(tiny("error"))
    report = train(tiny("skip", on_corrupt="skip"))
    assert report.warnings == ["train: 2 corrupt images left out"]
    assert report.steps == 8
    page = (Path(report.run_dir) / "report.html").read_text("utf-8")
    assert "<td>warning</td><td>train: 2 corrupt images left out</td>" in page


def test_the_final_table_says_of_how_many_images_the_scores_are(tiny, monkeypatch, capsys):
    load = SyntheticFlowers.load

    def read(dataset, index):
        if dataset.split == "test" and index == 1:
            raise CorruptImageError(dataset.describe(index), "damaged")
        return load(dataset, index)

    whole = train(tiny("whole", epochs=1))
    assert "scored" not in dict(whole.rows())
    monkeypatch.setattr(SyntheticFlowers, "load", read)
    report = train(tiny("part", epochs=1, on_corrupt="skip"))
    scored = f"{whole.num_images - 1} of {whole.num_images}, the others are corrupt"
    assert report.left_out == 1 and dict(report.rows())["scored"] == scored
    assert scored in (Path(report.run_dir) / "report.html").read_text("utf-8")


def test_training_on_train_and_val_selects_on_test(tiny):
    report = train(tiny(train_split="train+val"))
    assert (report.selection_split, report.split) == ("test", "test")
    assert report.data.keys() == {"train+val", "test"} and "35 images" in report.data["train+val"]
    assert report.top1 == report.best_top1


@pytest.mark.parametrize(("best", "evaluations"), [("last", 2), ("first", 3)])
def test_the_best_adapter_is_not_scored_twice_on_the_same_images(tiny, monkeypatch, best, evaluations):
    """Only if its weights are those that were scored last; the scores are of what lies in the file."""
    score, calls = run.evaluate, []

    def scripted(model, *arguments, **options):
        calls.append(1)
        scores = score(model, *arguments, **options)
        if len(calls) > 2:
            return scores
        top1 = 100.0 if (best == "first") == (len(calls) == 1) else 0.0
        return replace(scores, scores={"top1": top1, "top5": None})

    monkeypatch.setattr(run, "evaluate", scripted)
    report = train(tiny(train_split="train+val", epochs=2, ema=0.5))
    assert len(calls) == evaluations and report.best_epoch == (1 if best == "first" else 2)
    assert report.split == report.selection_split == "test"
    if best == "last":
        assert report.top1 == report.best_top1 == 100.0


def test_folder_without_test_images_is_scored_on_val(tiny, tmp_path):
    for label, colour in enumerate(("red", "blue")):
        (tmp_path / "images" / "train" / colour).mkdir(parents=True)
        for number in range(8):
            image = Image.new("RGB", (40, 36), (255 - 255 * label, number * 8, 255 * label))
            image.save(tmp_path / "images" / "train" / colour / f"{number}.png")
    report = train(tiny(dataset="folder", data_dir=str(tmp_path / "images"), dataset_kwargs={}))
    assert report.split == report.selection_split == "val" and report.data.keys() == {"train", "val"}
    assert list(report.per_class) == ["blue", "red"]
    # Images that were added since make another data set.
    image.save(tmp_path / "images" / "train" / "red" / "more.png")
    with pytest.raises(ResumeError, match="training images were"):
        train(load_recipe(None, {"resume": report.run_dir, "epochs": 3}))
    (tmp_path / "images" / "train" / "green").mkdir()
    for number in range(4):
        image.save(tmp_path / "images" / "train" / "green" / f"{number}.png")
    with pytest.raises(ResumeError, match="it has 2 classes and the data now 3"):
        train(load_recipe(None, {"resume": report.run_dir, "epochs": 3}))


def test_refuses_a_folder_with_another_run(tiny, plain):
    with pytest.raises(ValueError, match="holds another run"):
        train(tiny(output_dir=plain.run_dir))


def test_no_folder_is_made_when_the_data_are_wrong(tiny, tmp_path):
    with pytest.raises(ValueError, match="rank"):
        train(tiny(rank=1000))
    assert not (tmp_path / "run").exists()


def test_default_folder_never_hits_an_existing_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "run_dir", lambda self: tmp_path / "same")
    first, second = (train(tiny(output_dir=None, epochs=1)) for _ in range(2))
    assert (Path(first.run_dir).name, Path(second.run_dir).name) == ("same", "same-2")


def test_single_process_helpers_are_the_identity():
    alone = Processes()
    assert alone.is_main and alone.gather(3) == [3] and alone.from_main("x") == "x"
    assert torch.equal(alone.sum(torch.ones(2)), torch.ones(2))
