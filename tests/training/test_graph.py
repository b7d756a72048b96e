"""Batches replayed as CUDA graphs: the same run, whatever is replayed and whatever is not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from interruption import interrupt_at
from recorders import FailingRecorder, RepeatingRecorder
from tiny_runs import assert_same_weights, largest_difference, metrics, weights
from torch import nn

from vimtune import adapters
from vimtune.recipe import Recipe, RecipeError, load_recipe
from vimtune.runtime.precision import build_autocast
from vimtune.tasks.classification import Classification
from vimtune.tasks.images.scoring import ImageTally
from vimtune.tasks.job import Batch
from vimtune.training import Interrupted, train, trained
from vimtune.training.evaluate import Replays, evaluate
from vimtune.training.gradients import StandingGradients, put_gradients
from vimtune.training.graph import BatchGraphs, CaptureError, CudaRecorder, refusals
from vimtune.training.guard import NonFiniteError
from vimtune.training.state import load_run_state

pytestmark = pytest.mark.usefixtures("no_pictures")

CUDA = torch.device("cuda", 0)
MIXED = {"mixup": 0.5, "cutmix": 0.5, "drop_path": 0.3, "dropout": 0.2, "label_smoothing": 0.1, "ema": 0.9}


# --- whether to replay --------------------------------------------------------------------------


def test_a_plain_run_on_a_gpu_is_replayed(tiny):
    assert refusals(tiny(device="cuda").optimisation, CUDA) == []
    recipe = tiny(device="cuda", cuda_graph="on", amp="fp16", grad_accum=3, **MIXED)
    assert refusals(recipe.optimisation, CUDA) == []


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", "the device is cpu"),
        ({"cuda_graph": "off"}, "cuda", "cuda_graph is off"),
        ({"compile": True}, "cuda", "torch.compile"),
        ({"grad_checkpointing": True}, "cuda", "grad_checkpointing"),
    ],
)
def test_what_keeps_a_run_from_being_replayed(tiny, changes, device, reason):
    (found,) = refusals(tiny(**changes).optimisation, torch.device(device))
    assert reason in found


def test_anomaly_detection_is_a_reason(tiny):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        (found,) = refusals(tiny().optimisation, CUDA)
    assert "anomaly" in found


def test_demanded_where_it_is_impossible(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"cuda_graph = 'on'.*device is cpu; torch\.compile.*Use auto"):
        train(tiny(cuda_graph="on", compile=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("value", "meant"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yaml_reads_on_and_off_as_booleans(value, meant):
    assert Recipe(cuda_graph=value).optimisation.cuda_graph == meant
    with pytest.raises(RecipeError, match="amp = True: expected"):
        Recipe(amp=True)


# --- the graph of a batch -----------------------------------------------------------------------


def ones(size):
    return {"images": torch.ones(size, 2), "labels": torch.ones(size)}


class Sum:
    """A pass with one parameter w: loss = w * sum(images * targets)."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(()))
        self.gradients = StandingGradients([self.weight], one_batch=False)
        self.batches: list[int] = []

    def forward_backward(self, tensors):
        self.batches.append(len(tensors["images"]))
        loss = self.weight * (tensors["images"] * tensors["labels"][:, None]).sum()
        loss.backward()
        return loss.detach()


def test_losses_and_gradients_of_replays_and_eager_batches_add_up():
    work, recorder = Sum(), RepeatingRecorder(torch.device("cpu"))
    graph = BatchGraphs(recorder, [work.weight], warmup=2)
    expected = 0.0
    for number, size in enumerate([4, 3, 4, 4, 3, 4, 1, 4]):
        images, targets = torch.full((size, 2), float(number + 1)), torch.arange(size).float()
        loss = graph(work.forward_backward, {"images": images, "labels": targets})
        expected += 2 * (number + 1) * sum(range(size))
        assert float(loss) == 2 * (number + 1) * sum(range(size))
        images.fill_(math.nan)  # the caller's tensors are its own
    assert float(work.weight.grad) == expected
    assert work.batches == [4, 3, 4, 4, 3, 4, 1, 4]
    # 4, 3, 4 to warm up; then 4 recorded and replayed three times; 3 and 1 as they come.
    assert (recorder.num_warm, recorder.num_replays, graph.num_replays) == (3, 3, 3)


def test_recorded_is_the_first_shape_that_keeps_coming():
    work, recorder = Sum(), RepeatingRecorder(torch.device("cpu"))
    graph = BatchGraphs(recorder, [work.weight], warmup=1)
    for size in (1, 2, 3, 2, 3, 2):
        graph(work.forward_backward, ones(size))
    assert graph.num_replays == 2


def test_several_shapes_are_recorded_up_to_a_limit():
    work, recorder = Sum(), RepeatingRecorder(torch.device("cpu"))
    graphs = BatchGraphs(recorder, [work.weight], warmup=2, limit=2)
    expected = 0.0
    for number, size in enumerate([2, 3, 2, 2, 4, 3, 4, 4, 3, 2], 1):
        loss = graphs(work.forward_backward, {**ones(size), "images": torch.full((size, 2), float(number))})
        expected += 2 * size * number
        assert float(loss) == 2 * size * number and float(work.weight.grad) == expected
    assert recorder.recorded == [3, 2] and recorder.num_warm == 3
    assert recorder.num_replays == graphs.num_replays == 4
    assert work.batches == [2, 3, 2, 2, 4, 3, 4, 4, 3, 2]  # 4 comes when there are two graphs already
    assert graphs.summary == "2 shapes of batches recorded, 4 of 10 batches replayed"


def test_the_largest_shape_is_recorded_first():
    """In its memory the others find room."""
    work, recorder = Sum(), RepeatingRecorder(torch.device("cpu"))
    graphs = BatchGraphs(recorder, [work.weight], warmup=1, limit=8)
    for size in (5, 9, 3, 7, 3, 5, 7, 11, 9, 9, 11):
        graphs(work.forward_backward, ones(size))
    assert recorder.recorded == [9, 3, 5, 7, 11]


def test_gradients_exist_before_a_batch_is_recorded():
    work, recorder = Sum(), RepeatingRecorder(torch.device("cpu"))
    graph = BatchGraphs(recorder, [work.weight], warmup=0)
    graph(work.forward_backward, ones(2))
    assert float(work.weight.grad) == 4.0


def test_a_failed_recording_has_not_run_the_batch():
    work = Sum()
    graph = BatchGraphs(FailingRecorder(torch.device("cpu")), [work.weight], warmup=0)
    with pytest.raises(CaptureError):
        graph(work.forward_backward, ones(2))
    assert work.batches == [] and graph.num_replays == 0


def test_what_another_has_broken_is_not_replayed():
    """A recording that failed elsewhere takes the generator from graphs that were recorded before."""
    work, recorder = Sum(), RepeatingRecorder(torch.device("cpu"))
    graph = BatchGraphs(recorder, [work.weight], warmup=1)
    for broken in (False, False, True, True):
        recorder.broken = broken
        assert float(graph(work.forward_backward, ones(2))) == 4.0
    assert graph.num_replays == 1 and work.batches == [2] * 4


# --- whole runs, without a GPU ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "num_replays"),
    [
        ({}, 9),  # 9 batches of 8 images, 3 single images; two and one of them run before they are recorded
        ({"grad_accum": 3}, 7),  # windows of 8 + 8 + 8 and 1
        ({"grad_accum": 2, "batch_size": 7, **MIXED}, 8),  # windows of 7 + 7 and 7 + 4; odd, mixed
        ({"batch_size": 32}, 1),  # one batch of 25 an epoch
    ],
    ids=str,
)
def test_replays_change_nothing(tiny, replaying, changes, num_replays):
    eager = train(tiny("eager", **changes))
    recorders = replaying()
    replayed = train(tiny("replayed", **changes))
    assert [recorder.num_replays for recorder in recorders] == [num_replays]
    assert (eager.cuda_graph, replayed.cuda_graph) == (False, True)
    assert_same_weights(weights(eager.run_dir), weights(replayed.run_dir))
    assert metrics(eager.run_dir) == metrics(replayed.run_dir)
    assert (eager.top1, eager.loss, eager.warnings) == (replayed.top1, replayed.loss, replayed.warnings)


def test_evaluations_are_replayed_with_the_weights_of_their_time(tiny, replaying):
    """Those of 8, and 2 images: the average of the weights after each epoch, and the saved adapter."""
    changes = {"epochs": 4, "ema": 0.9}
    eager = train(tiny("eager", **changes))
    (recorders, settings) = replaying(), tiny("replayed", **changes)
    replayed = train(settings)
    # Of the ten batches, two of each evaluation, the first of each size has run before.
    assert [recorder.num_judged for recorder in recorders] == [8]
    assert metrics(eager.run_dir) == metrics(replayed.run_dir)
    assert (eager.top1, eager.loss, eager.per_class) == (replayed.top1, replayed.loss, replayed.per_class)
    assert len({record["loss"] for record in replayed.history}) == 4


def test_a_teacher_answers_within_the_replays(tiny, replaying):
    teacher = train(tiny("teacher", epochs=1)).run_dir
    eager = train(tiny("eager", teacher=teacher, **MIXED))
    replaying()
    replayed = train(tiny("replayed", teacher=teacher, **MIXED))
    assert replayed.cuda_graph and not eager.cuda_graph
    assert_same_weights(weights(eager.run_dir), weights(replayed.run_dir))
    assert metrics(eager.run_dir) == metrics(replayed.run_dir)


@pytest.mark.parametrize("scale", [2.0**16, 3e38])
def test_replays_under_loss_scaling(tiny, replaying, monkeypatch, scale):
    def build_scaler(amp, device):
        return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

    monkeypatch.setattr(trained, "build_scaler", build_scaler)
    eager = train(tiny("eager"))
    replaying()
    replayed = train(tiny("replayed"))
    states = [load_run_state(Path(r.run_dir, "checkpoint.safetensors")) for r in (eager, replayed)]
    assert states[0].scaler == states[1].scaler != {}
    assert_same_weights(states[0].adapter, states[1].adapter)


def test_failed_recording_is_told_once_and_the_run_goes_on(tiny, replaying, capsys):
    eager = train(tiny("eager"))
    replaying(FailingRecorder)
    other = train(tiny("other"))
    assert other.warnings == [
        "the CUDA graph could not be recorded, batches run eagerly: "
        "operation not permitted when stream is capturing"
    ]
    assert capsys.readouterr().out.count("could not be recorded") == 1
    assert not other.cuda_graph
    assert_same_weights(weights(eager.run_dir), weights(other.run_dir))


def test_interrupted_and_resumed(tiny, replaying, monkeypatch):
    whole = train(tiny("whole"))
    replaying()
    recipe = tiny("parts")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 6)
        with pytest.raises(Interrupted):
            train(recipe)
    report = train(load_recipe(None, {"resume": recipe.run.output_dir, "cuda_graph": "off"}))
    assert report.warnings == []  # whether batches are replayed is no change of the run
    assert_same_weights(weights(whole.run_dir), weights(report.run_dir))


def test_non_finite_replay_names_the_layer(tiny, replaying, monkeypatch):
    (recorders, original) = replaying(), Classification.open

    def with_a_bad_layer(task, recipe, processes):
        job = original(task, recipe, processes)
        mixer = job.model.layers[1].mixer
        forward = mixer.forward
        mixer.forward = lambda *x: forward(*x) * (math.inf if recorders[0].num_replays >= 2 else 1.0)
        return job

    monkeypatch.setattr(Classification, "open", with_a_bad_layer)
    with pytest.raises(NonFiniteError, match="epoch 2, step 6") as error:
        train(tiny())
    assert "the output of layers.1.mixer (BiMambaMixer)" in str(error.value)


def test_dead_adapter_is_found_before_anything_is_recorded(tiny, replaying, monkeypatch):
    (recorders, original) = replaying(), Classification.open

    def with_a_dead_tensor(task, recipe, processes):
        job = original(task, recipe, processes)
        next(e for e in adapters.adapter_parameters(job.model) if e.group == "adapter").parameter.detach_()
        return job

    monkeypatch.setattr(Classification, "open", with_a_dead_tensor)
    with pytest.raises(adapters.DeadAdapterError):
        train(tiny(grad_accum=2))
    assert recorders[0].num_replays == 0


# --- on a GPU -----------------------------------------------------------------------------------

gpu = pytest.mark.gpu
ON_GPU = {
    "device": "cuda",
    "backend": "auto",
    "transforms": "torchvision",
    "augmentation": "none",
    "epochs": 7,  # 3 full batches and a single image each
    "batch_size": 8,
}


def run_once(recipe: Recipe):
    """The report of a run, its weights and its losses and gradient norms."""
    report = train(recipe)
    trace = [[r["loss"], r["grad_norm"]] for r in metrics(report.run_dir) if "grad_norm" in r]
    return report, weights(report.run_dir), torch.tensor(trace).nan_to_num()  # fp16 norms may overflow


def difference(one, other) -> float:
    """Largest difference of weights, losses and norms between two runs."""
    return max(largest_difference(one[1], other[1]), float((one[2] - other[2]).abs().max()))


@gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peft": "prodial"},
        {"peft": "full", "rank": None},
        {"model": "vim_nano_patch8_64"},
        {"model": "vim_nano_patch8_64", "peft": "prodial", "amp": "bf16"},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"peft": "prodial", "amp": "fp16", "grad_accum": 2},
        {"grad_accum": 2},
        {"backend": "torch"},
        {"clip_grad": 0.05},
        {"drop_path": 0.3, "dropout": 0.2},
        {"batch_size": 7, "grad_accum": 3, "amp": "bf16", **MIXED},
    ],
    ids=str,
)
def test_on_a_gpu_replays_are_as_close_to_eager_as_eager_runs_to_each_other(tiny, changes):
    settings = {**ON_GPU, **changes}
    first, second = (run_once(tiny(f"eager{n}", **settings, cuda_graph="off")) for n in (1, 2))
    replayed = run_once(tiny("replayed", **settings, cuda_graph="on"))
    assert (first[0].cuda_graph, replayed[0].cuda_graph) == (False, True)
    assert replayed[0].warnings == []
    assert len(replayed[2]) >= 7
    spread = difference(first, second)
    print(f"{changes}: eager spread {spread:.2e}, replayed {difference(first, replayed):.2e}")
    assert difference(first, replayed) <= max(10 * spread, 1e-6)


@gpu
def test_on_a_gpu_each_replay_draws_afresh_from_its_seed():
    """Dropout in replays: the values of an eager pass with the same seed, and others with another, whichever
    of two graphs was replayed before."""
    weight = nn.Parameter(torch.ones((), device="cuda"))

    def work(tensors):
        loss = (weight * nn.functional.dropout(tensors["images"], 0.5)).sum(0)
        loss.sum().backward()
        return loss.detach()

    graphs = BatchGraphs(CudaRecorder(CUDA), [weight], warmup=1, limit=2)
    batches = [{"images": torch.rand(rows, 32, device="cuda")} for rows in (64, 48)]
    seen = []
    for seed in (3, 4, 5, 4, 3):
        for batch in batches:
            torch.manual_seed(seed)
            eager = work(batch)
            torch.manual_seed(seed)
            assert torch.equal(graphs(work, batch), eager)
            seen.append(eager)
    assert graphs.num_replays == 8
    assert torch.equal(seen[0], seen[8]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[9]) and not torch.equal(seen[1], seen[3])


@gpu
def test_on_a_gpu_many_shapes_need_hardly_more_memory_than_the_largest():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(6))).to(CUDA)
    parameters = list(layers.parameters())

    def work(tensors):
        loss = layers(tensors["images"]).square().mean()
        put_gradients(loss, parameters, replace=True)
        return loss.detach()

    recorder = CudaRecorder(CUDA)
    graphs = BatchGraphs(recorder, parameters, warmup=1, limit=12)
    batches = {rows: {"images": torch.rand(rows, 512, device=CUDA)} for rows in range(4096, 53248, 4096)}
    order = [max(batches), *(rows for rows in batches if rows % 8192), *(rows for rows in batches)]
    expected = {rows: (float(work(batch)), parameters[0].grad.clone()) for rows, batch in batches.items()}
    kept = []
    for rows in order + order:
        loss = graphs(work, batches[rows])
        assert float(loss) == pytest.approx(expected[rows][0], rel=1e-5)
        torch.testing.assert_close(parameters[0].grad, expected[rows][1], rtol=1e-4, atol=1e-7)
        kept += [recorder.kept] if recorder.kept else []
    assert graphs.num_replays >= len(order)
    assert kept[0] > 2**28 and kept[-1] <= 1.25 * kept[0]


@gpu
def test_on_a_gpu_a_forward_that_waits_for_the_device_is_not_recorded(tiny, monkeypatch):
    original = Classification.open

    def with_a_wait(task, recipe, processes):
        job = original(task, recipe, processes)
        forward = job.model.forward
        job.model.forward = lambda x: forward(x) * (1.0 if x.sum().item() > -math.inf else 0.0)
        return job

    monkeypatch.setattr(Classification, "open", with_a_wait)
    eager = run_once(tiny("eager", **ON_GPU, cuda_graph="off", drop_path=0.3))
    other = run_once(tiny("other", **ON_GPU, cuda_graph="auto", drop_path=0.3))
    (warning,) = other[0].warnings
    assert "could not be recorded" in warning and "captur" in warning
    assert not other[0].cuda_graph
    assert difference(eager, other) < 1e-6


@gpu
def test_on_a_gpu_the_graph_must_leave_room_for_other_batches(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1024, 2**37))
    report = train(tiny(**ON_GPU))
    assert not report.cuda_graph
    assert any("could not be recorded" in text and "GiB" in text for text in report.warnings)


@gpu
def test_on_a_gpu_a_resumed_run_continues_as_if_it_had_not_stopped(tiny):
    recipe = tiny("parts", **{**ON_GPU, "epochs": 3, "warmup_epochs": 0, "min_lr": 3e-3})
    whole = run_once(recipe.replace(epochs=6, output_dir=recipe.run.output_dir + "-whole"))
    train(recipe)
    report = train(load_recipe(None, {"resume": recipe.run.output_dir, "epochs": "6"}))
    assert largest_difference(whole[1], weights(report.run_dir)) < 1e-6


@gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_on_a_gpu_replayed_evaluations_have_the_scores_of_eager_ones(amp):
    """Whatever weights are written in place meanwhile, and with a last batch that is smaller."""
    model = timm.create_model("vim_nano_patch8_64", num_classes=7).to(CUDA)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(27, 3, 64, 64, generator=generator).pin_memory()
    labels = torch.randint(0, 7, (27,), generator=generator).pin_memory()
    places = torch.arange(27).pin_memory()
    batches = [
        Batch({"images": x, "labels": y, "places": z}, len(x))
        for x, y, z in zip(images.split(8), labels.split(8), places.split(8), strict=True)
    ]
    graphs = BatchGraphs(CudaRecorder(CUDA), (), warmup=1, limit=3)
    common = {"device": CUDA, "autocast": build_autocast(amp, CUDA)}
    losses = set()
    for _ in range(3):
        eager = evaluate(model, batches, ImageTally(7, 27), **common)
        replayed = evaluate(model, batches, ImageTally(7, 27), **common, replays=Replays(graphs, pytest.fail))
        assert (eager.loss, eager.scores) == (replayed.loss, replayed.scores)
        assert torch.equal(eager.confusion, replayed.confusion)
        losses.add(eager.loss)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
    assert graphs.num_replays == 10 and len(losses) == 3  # the first batch of each size ran before
