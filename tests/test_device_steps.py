"""Training steps on a device against the definition and against themselves: the GPU's under the marker `gpu`,
and the same on the CPU wherever the code exists there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from method_cases import options_for
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vimtune
from vimtune import ops
from vimtune.adapters import adapter_parameters, list_methods
from vimtune.data import build_transform, create_dataset

NUM_CLASSES = 8
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
STEPS = {"cpu": 50, "cuda": 100}
"""How many steps are followed."""
LEARNT = {"cpu": 0.9, "cuda": 0.65}
"""Below which part of its first value the loss has to be in the end."""

on_each_device = pytest.mark.parametrize("device", ["cpu", ON_GPU])


@pytest.fixture(scope="module")
def flowers() -> tuple[Tensor, Tensor]:
    """64 images of 32 pixels, and their labels."""
    dataset = create_dataset(
        "synthetic_flowers", "train", img_size=(32, 32), species=NUM_CLASSES, train_per_species=8
    )
    transform = build_transform(
        "none",
        img_size=(32, 32),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        train=False,
        crop_pct=1.0,
        interpolation="bicubic",
        library="torchvision",
    )
    images = torch.stack([transform(dataset.load(index), 0) for index in range(len(dataset))])
    return images, torch.tensor(dataset.targets)


@pytest.fixture(autouse=True)
def plain_arithmetic() -> Iterator[None]:
    """Neither TF32 nor algorithms that add in the order in which threads finish; one thread, enough here."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    threads = torch.get_num_threads()
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    torch.set_num_threads(1)
    yield
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.set_num_threads(threads)


def build(method: str, device: str, depth: int = 2, **kwargs) -> nn.Module:
    """A Vim whose states matter, with an adapter: large time steps, hardly any skip past the scan."""
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=NUM_CLASSES, depth=depth, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
                parameter.fill_(-1.0)  # a step of softplus(-1) = 0.31
            elif name.endswith((".D", ".D_b")):
                parameter.fill_(0.1)
    return vimtune.inject(model, method, **options_for(method, {})).to(device)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {item.key: item.parameter for item in adapter_parameters(model)}


def move_off_the_start(model: nn.Module) -> nn.Module:
    """Adapters start at zero, where half of their gradients are zero too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def precision(amp: str, device: str, **options) -> AbstractContextManager:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return nullcontext() if amp == "none" else torch.autocast(device, types[amp], **options)


def gradients(
    model: nn.Module, images: Tensor, labels: Tensor, amp: str = "none", **options
) -> dict[str, Tensor]:
    """Loss and gradients of one step, on the CPU; the options are those of autocast."""
    model.zero_grad(set_to_none=True)
    with precision(amp, images.device.type, **options):
        loss = nn.functional.cross_entropy(model(images).float(), labels)
    loss.backward()
    found = {name: parameter.grad for name, parameter in trained(model).items()}
    assert all(gradient is not None for gradient in found.values())
    return {name: x.detach().cpu() for name, x in {"loss": loss, **found}.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


# --- many steps ---------------------------------------------------------------------------------


@dataclass
class Trajectory:
    losses: Tensor
    distance: Tensor
    """How far the trained numbers have come from their start, as one vector."""


def follow(
    flowers: tuple[Tensor, Tensor], method: str, device: str, *, lr: float, amp: str, backend: str, steps: int
) -> Trajectory:
    """AdamW on batches of 16, always the same ones."""
    images, labels = (tensor.to(device) for tensor in flowers)
    model = build(method, device, backend=backend).train()
    start = torch.cat([parameter.detach().flatten() for parameter in trained(model).values()])
    optimizer = torch.optim.AdamW(trained(model).values(), lr=lr)
    scaler = torch.amp.GradScaler(device, enabled=amp == "fp16")
    losses = []
    for step in range(steps):
        if step % 4 == 0:
            order = torch.randperm(64, generator=torch.Generator().manual_seed(step)).to(device)
        batch = order[16 * (step % 4) :][:16]
        optimizer.zero_grad()
        with precision(amp, device):
            loss = nn.functional.cross_entropy(model(images[batch]).float(), labels[batch])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    end = torch.cat([parameter.detach().flatten() for parameter in trained(model).values()])
    return Trajectory(torch.stack(losses).cpu(), (end - start).cpu())


TOLERANCES = {"none": (1e-3, 1e-2), "bf16": (0.04, 0.1)}
"""Of each loss, absolute; of the weights, relative to the way they have come. Both for a hundred steps, with
which they grow.

On a CPU fp32 differs by up to 4e-7 and 1e-6, bf16 by 0.014 and 0.043. A scan that halves the gradient of B
or C, or takes a fifth off that of u, makes 0.1 to 0.3 of the latter.
"""


@on_each_device
@pytest.mark.parametrize(("method", "lr"), [("full", 1e-3), ("prodial", 3e-3)])
def test_many_steps_follow_the_fp32_reference(flowers, device, method, lr):
    steps = STEPS[device]
    expected = follow(flowers, method, device, lr=lr, amp="none", backend="reference", steps=steps)
    assert expected.losses[-4:].mean() < LEARNT[device] * expected.losses[:4].mean()
    for amp, (loss_tolerance, distance_tolerance) in TOLERANCES.items():
        actual = follow(flowers, method, device, lr=lr, amp=amp, backend="auto", steps=steps)
        worst = (actual.losses - expected.losses).abs().max()
        apart = (actual.distance - expected.distance).norm() / expected.distance.norm()
        print(f"{device} {method} {amp}: losses {worst:.1e}, weights {apart:.1e}")
        assert worst <= loss_tolerance * steps / 100, amp
        assert apart <= distance_tolerance * steps / 100, amp


@pytest.mark.parametrize(
    ("device", "method", "amp"),
    [
        ("cpu", "full", "fp16"),
        ("cpu", "prodial", "bf16"),
        *(
            pytest.param("cuda", method, amp, marks=pytest.mark.gpu)
            for method in ("full", "prodial")
            for amp in ("bf16", "fp16")
        ),
    ],
)
def test_no_nan_under_amp(flowers, device, method, amp):
    """At many times the learning rate, too. A step that fp16's loss scaling skips leaves the weights as
    they are, so learning shows that few are."""
    found = follow(flowers, method, device, lr=2e-2, amp=amp, backend="auto", steps=50)
    assert torch.isfinite(found.losses).all() and torch.isfinite(found.distance).all()
    assert found.losses[-8:].mean() < 0.8 * found.losses[:4].mean()


# --- one step -----------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("method", ["full", "prodial"])
def test_compiled_step_equals_the_eager_one(flowers, device, method):
    """In one graph; by inductor on the GPU, on the CPU without its C++ compiler."""
    check_compiled_step(flowers, device, method)


@pytest.mark.gpu
def test_compiled_step_equals_the_eager_one_with_the_kernels_of_mamba_ssm(flowers):
    try:
        ops.resolved_backend("cuda", "cuda")
    except ops.BackendUnavailable as error:
        pytest.skip(str(error))
    with ops.use_backend("cuda"):
        check_compiled_step(flowers, "cuda", "full")


def check_compiled_step(flowers: tuple[Tensor, Tensor], device: str, method: str) -> None:
    images, labels = (tensor[:4].to(device) for tensor in flowers)
    model = move_off_the_start(build(method, device, depth=1))
    expected = gradients(model, images, labels)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    logits = compiled(images)
    assert_close({"logits": logits.detach().cpu()}, {"logits": model(images).detach().cpu()}, 1e-4)
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    actual = {name: parameter.grad.cpu() for name, parameter in trained(model).items()}
    assert_close({"loss": loss.detach().cpu(), **actual}, expected, 1e-4)


@on_each_device
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("method", list_methods())
def test_same_step_same_gradients_bit_for_bit(flowers, device, method, amp):
    images, labels = (tensor.to(device) for tensor in flowers)
    model = move_off_the_start(build(method, device))
    # One thread of a CPU has one order; the blocks of a GPU may by chance keep theirs once.
    runs = [gradients(model, images, labels, amp) for _ in range(3 if device == "cuda" else 2)]
    for name, first in runs[0].items():
        assert all(torch.equal(run[name], first) for run in runs[1:]), name
    other = gradients(model, images.flip(0), labels, amp)
    assert any(not torch.equal(other[name], first) for name, first in runs[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("method", list_methods())
def test_replayed_graph_equals_the_eager_step(flowers, method, amp):
    images, labels = (tensor.cuda() for tensor in flowers)
    model = move_off_the_start(build(method, "cuda"))
    batches = [(images[:16], labels[:16]), (images[16:32], labels[16:32])]
    # A cached cast of a weight that several layers share adds up their gradients in bf16.
    expected = [gradients(model, *batch, amp, cache_enabled=False) for batch in batches]

    static = [tensor.clone() for tensor in batches[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with precision(amp, "cuda", cache_enabled=False):  # and cached casts would outlive the recording
            loss = nn.functional.cross_entropy(model(static[0]).float(), static[1])
        loss.backward()
        return loss.detach()

    with torch.cuda.stream(stream):
        step()
        with torch.cuda.graph(graph, stream=stream):
            loss = step()
    for batch, wanted in zip(batches, expected, strict=True):
        for target, source in zip(static, batch, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        found = {name: parameter.grad.cpu() for name, parameter in trained(model).items()}
        assert_close({"loss": loss.cpu(), **found}, wanted, 1e-5)


# --- several processes --------------------------------------------------------------------------


def join(device: str, rank: int, world_size: int, meeting_point: Path) -> None:
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world_size,
    )


@on_each_device
def test_wrapped_for_distributed_training(flowers, device, tmp_path):
    """DistributedDataParallel finds a gradient for every trained tensor, the one it has alone."""
    images, labels = (tensor[:8].to(device) for tensor in flowers)
    model = move_off_the_start(build("prodial", device))
    expected = gradients(model, images, labels)
    model.zero_grad(set_to_none=True)
    join(device, 0, 1, tmp_path / "meet")
    try:
        wrapped = DistributedDataParallel(model)
        nn.functional.cross_entropy(wrapped(images), labels).backward()
    finally:
        dist.destroy_process_group()
    actual = {name: parameter.grad.cpu() for name, parameter in trained(model).items()}
    assert_close({"loss": expected["loss"], **actual}, expected, 1e-5)


def run_share(rank: int, wrap: bool, device: str, folder: Path, flowers: tuple[Tensor, Tensor]) -> None:
    """One of two processes: its half of the batch, the gradient of the whole; the first one writes."""
    from vimtune.runtime.distributed import Processes  # the trainer needs more packages than the other tests

    torch.set_num_threads(1)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    join(device, rank, 2, folder / "meet")
    images, labels = (tensor[4 * rank : 4 * rank + 4].to(place) for tensor in flowers)
    model = move_off_the_start(build("prodial", str(place)))
    if wrap:
        wrapped = DistributedDataParallel(model)  # averages gradients, as long as somebody holds it
        nn.functional.cross_entropy(wrapped(images), labels).backward()
    else:
        (nn.functional.cross_entropy(model(images), labels) / 2).backward()
        Processes(rank, 2, place).sum_gradients_(list(trained(model).values()))
    if rank == 0:
        torch.save({name: p.grad.cpu() for name, p in trained(model).items()}, folder / "gradients.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), ON_GPU])
@pytest.mark.parametrize("wrap", [False, True], ids=["trainer", "DistributedDataParallel"])
def test_two_processes_have_the_gradient_of_one(flowers, wrap, device, tmp_path):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(run_share, (wrap, device, tmp_path, flowers), nprocs=2)
    images, labels = (tensor[:8].to(device) for tensor in flowers)
    expected = gradients(move_off_the_start(build("prodial", device)), images, labels)
    del expected["loss"]
    assert_close(torch.load(tmp_path / "gradients.pt"), expected, 1e-5)
