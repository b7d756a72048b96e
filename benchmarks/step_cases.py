"""The steps that gpu_step.py times: models, methods, CUDA graphs.

A Vim and the ViT of its size get the same methods from the same adapter code. LoRA, DoRA and ProDiaL act on
every linear layer of a block (in_proj and out_proj; qkv, proj, fc1 and fc2), rank 16: LoRA then trains as
many parameters of DeiT-tiny as of Vim-tiny. `linear` trains the head; `frozen` trains the position embedding
beside it: the backward through the whole frozen backbone, without any adapter.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from counts import VimShape, count_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vimtune
from vimtune import ops
from vimtune.adapters import check_gradients

PAIRS = {
    "tiny": ("vim_tiny_patch16_224", "deit_tiny_patch16_224"),
    "small": ("vim_small_patch16_224", "deit_small_patch16_224"),
    "test": ("test_vim", "test_vit"),
}
VIT = "vit"
VIT_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
METHODS = ("forward", "linear", "prodial", "lora", "frozen", "dora", "full")
RANK = 16
NUM_CLASSES = 102
SMALL_IMAGE = 64
"""Images up to this many pixels are cut into patches of 8 x 8, larger ones into 16 x 16."""

EAGER_SECONDS = 0.5
EAGER_STEPS = (2, 7)
"""Least and most steps that are timed before the rounds."""


@dataclass(frozen=True)
class Case:
    """One row of the tables."""

    scale: str
    kernels: str
    method: str
    img_size: int
    batch_size: int


class CaptureFailed(RuntimeError):
    """The step runs, but not while a CUDA graph records it."""


@dataclass
class Step:
    """A prepared case."""

    run: Callable[[], object]
    """What a visit runs."""
    seconds: float
    """About how long that takes."""
    eager: Callable[[], object]
    """The step itself: it holds the model and the optimizer, whose memory a graph uses but does not own."""


def parse_size(text: str) -> tuple[int, int]:
    """Pixels and batch size as the command line has them, 224:128."""
    pixels, _, batch = text.partition(":")
    if not (pixels.isdigit() and batch.isdigit() and int(pixels) and int(batch)):
        raise argparse.ArgumentTypeError(f"{text!r} is not pixels:batch, such as 224:128")
    return int(pixels), int(batch)


def build_model(case: Case) -> nn.Module:
    """The case's model with its adapter; the plain one for `forward`."""
    vim, vit = PAIRS[case.scale]
    patch_size = 8 if case.img_size <= SMALL_IMAGE else 16
    sizes = {"img_size": case.img_size, "patch_size": patch_size, "num_classes": NUM_CLASSES}
    model = timm.create_model(vit if case.kernels == VIT else vim, **sizes)
    if case.method == "forward":
        return model
    if case.method == "frozen":
        return vimtune.inject(model, "ft", targets=["pos_embed"])
    if case.method in ("linear", "full"):
        return vimtune.inject(model, case.method)
    targets = VIT_LAYERS if case.kernels == VIT else "both"
    return vimtune.inject(model, case.method, targets=targets, rank=RANK)


class StepRunner:
    """Builds and times the steps of one backend, or of the ViT; lives in a process of its own."""

    def __init__(self, kernels: str, device: str) -> None:
        """`device` names a GPU with its index.

        Raises:
            BackendUnavailable: the backend cannot run on `device`.
        """
        self.kernels, self.device = kernels, torch.device(device)
        if kernels != VIT:
            ops.set_backend(kernels)
            ops.resolved_backend(self.device)
        self.stream: Any = None
        self.pool: Any = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self.stream = torch.cuda.Stream()
        self.steps: dict[Case, Step] = {}
        self.images: Tensor | None = None

    def warm(self, cases: list[Case]) -> None:
        """Run each case once, so that its kernels are compiled before anything is timed."""
        with self._on_stream():
            for case in cases:
                self._build(case)[0]()
        self.drop()

    def prepare(self, case: Case, capture: bool, slow: float = math.inf) -> dict[str, Any]:
        """Build a case, time it eagerly, record its CUDA graph (on a GPU); returns facts for its row.

        A step that takes more than `slow` seconds is timed twice and neither recorded nor kept for visits.

        Raises:
            CaptureFailed: the rest went well: prepare it again without `capture`.
        """
        with self._on_stream():
            held = self._allocated() - (0 if self.images is None else self.images.nbytes)
            run, model = self._build(case)
            first_loss = run().item()
            if not self.infers(case):
                check_gradients(model)
            if self.stream is not None:
                torch.cuda.reset_peak_memory_stats()
            eager = self._time_eagerly(run, slow)
            kept = min(eager) <= slow * 1e3
            peak = None if self.stream is None else (torch.cuda.max_memory_allocated() - held) / 2**30
            graph = self.stream is not None and capture and kept
            if kept:
                visited = self._capture(run) if graph else run
                self.steps[case] = Step(visited, self._time(visited), eager=run)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {
            "model": PAIRS[case.scale][case.kernels == VIT],
            "tokens": model.pos_embed.shape[1],
            "trained": 0 if self.infers(case) else trained,
            "first_loss": first_loss,
            "kept": kept,
            "graph": graph,
            "eager_ms": eager,
            "peak_gib": peak,
        }
        return facts | self.further_facts(case, model, facts["trained"])

    def build_model(self, case: Case) -> nn.Module:
        """The model of a case, on the CPU."""
        return build_model(case)

    def infers(self, case: Case) -> bool:
        """Whether a step of the case is a forward pass alone."""
        return case.method == "forward"

    def further_facts(self, case: Case, model: nn.Module, trained: int) -> dict[str, Any]:
        """Facts for the row of a case beside those of every benchmark: what a step has to compute."""
        if case.kernels == VIT:
            return {}
        counts = count_step(
            VimShape.of(model, case.batch_size, NUM_CLASSES),
            case.method,
            trained=trained,
            total=sum(p.numel() for p in model.parameters()),
            rank=RANK,
            activation_bytes=4 if self.stream is None else 2,
        )
        return {"counts": asdict(counts)}

    def visit(self, case: Case, seconds: float) -> float:
        """Milliseconds of one step, the mean of as many as fit into `seconds` (at least one)."""
        step = self.steps[case]
        with self._on_stream():
            if step.seconds < seconds:  # another process may have had the device until now
                step.run()
            return self._time(step.run, max(1, round(seconds / step.seconds))) * 1e3

    def drop(self) -> None:
        """Forget all cases and give their memory back.

        Raises:
            RuntimeError: an earlier error has left the device beyond use in this process.
        """
        self.steps.clear()
        self.images = self.pool = None
        self.recover()

    def recover(self) -> None:
        """Free what a failed case held; raises as `drop` does."""
        gc.collect()
        if self.stream is not None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.ones(1, device=self.device).item()

    def _build(self, case: Case) -> tuple[Callable[[], Tensor], nn.Module]:
        """The case's step, which returns its loss, and its model."""
        torch.manual_seed(0)
        model = self.build_model(case).to(self.device).train(not self.infers(case))
        shape = (case.batch_size, 3, case.img_size, case.img_size)
        if self.images is None or self.images.shape != shape:
            self.images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        images = self.images
        labels = torch.arange(case.batch_size, device=self.device) % NUM_CLASSES

        def find_loss() -> Tensor:
            with self._precision():
                return nn.functional.cross_entropy(model(images).float(), labels)

        if self.infers(case):
            return torch.no_grad()(find_loss), model
        trained = [p for p in model.parameters() if p.requires_grad]
        on_gpu = self.stream is not None
        optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=on_gpu, fused=on_gpu or None)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = find_loss()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step, model

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """bf16 autocast and flash attention (PyTorch's or cuDNN's) on a GPU, fp32 elsewhere."""
        if self.stream is None:
            yield
            return
        flash = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
        # Cached casts would outlive the graph that made them.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False), flash:
            yield

    def _capture(self, run: Callable[[], Tensor]) -> Callable[[], object]:
        """Replays of one CUDA graph of `run`.

        All graphs draw from one pool: each is a whole step whose activations nobody reads afterwards.
        """
        self.recover()  # what eager steps had cached is wanted for the pool
        graph = torch.cuda.CUDAGraph()
        try:
            self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                run()
            graph.replay()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # ending a failed capture raises another error on top
                cause = cause.__context__
            raise CaptureFailed(str(cause)) from error
        return graph.replay

    def _on_stream(self) -> Any:
        """Gradients belong to the stream that first made them: everything runs on the captured one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _allocated(self) -> int:
        return 0 if self.stream is None else torch.cuda.memory_allocated()

    def _wait(self) -> None:
        if self.stream is not None:
            torch.cuda.synchronize()

    def _time(self, run: Callable[[], object], count: int = 1) -> float:
        """Seconds of one run, the mean of `count` without a pause; the device's work included."""
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        self._wait()
        return (time.perf_counter() - start) / count

    def _time_eagerly(self, run: Callable[[], object], slow: float) -> list[float]:
        """Milliseconds of single steps; of two where both take more than `slow` seconds."""
        least, most = EAGER_STEPS
        times = [self._time(run) * 1e3 for _ in range(2)]
        if min(times) > slow * 1e3:
            return times
        del times[0]  # the allocator's cache had to be filled
        while len(times) < least or (len(times) < most and sum(times) < EAGER_SECONDS * 1e3):
            times.append(self._time(run) * 1e3)
        return times
