"""Measure what the machine can do: copy bandwidth, matrix products, exponentials, fp32 instructions.

On a GPU the last two come from Triton kernels that chain exp2 or FMA in registers, so they are the clock
under load times the lanes of a multiprocessor (16 for exp2 and 128 for FMA on an H200).
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vimtune.machine import processor_name

PACKAGES = ("torch", "triton", "timm", "mamba-ssm", "causal-conv1d")
ROUNDS = 5


class Machine:
    """The device, described and measured; runs in a process of its own."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def describe(self) -> dict[str, Any]:
        facts = {name: found for name in PACKAGES if (found := _version(name))}
        facts |= {"python": platform.python_version(), "cpu": f"{processor_name()}, {os.cpu_count()} CPUs"}
        facts["device"] = facts["cpu"]
        if self.device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(self.device)
            facts["driver"] = _nvidia_smi(self.device, "driver_version")
        else:
            facts["threads"] = str(torch.get_num_threads())
        return facts

    def measure(self) -> dict[str, float]:
        """Per second: bytes (read and written), matmul FLOPs in the dtype of a step, exponentials, fp32
        instructions; and on a GPU the clock under load in MHz, where nvidia-smi tells it."""
        if self.device.type != "cuda":
            flops = self._matmul_rate(1024, torch.float32)
            return {
                "bytes": self._copy_rate(2**27),
                "matmul_flops": flops,
                "exponentials": self._exponential_rate(),
                "instructions": flops / 2,  # the same units do both
            }
        found = {
            "bytes": self._copy_rate(2**32),
            "matmul_flops": self._matmul_rate(8192, torch.bfloat16),
            **self._chain_rates(),
        }
        clock = self._clock_under_load()
        if clock is not None:
            found["clock_mhz"] = clock
        found["multiprocessors"] = torch.cuda.get_device_properties(self.device).multi_processor_count
        return found

    def _seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median time of one call."""
        times = []
        for turn in range(ROUNDS + 1):
            self._wait()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            self._wait()
            if turn:  # the first turn warms up
                times.append((time.perf_counter() - start) / repeats)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _copy_rate(self, size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self._seconds(lambda: target.copy_(source), 4)

    def _matmul_rate(self, side: int, dtype: torch.dtype) -> float:
        left, right = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * side**3 / self._seconds(lambda: torch.mm(left, right, out=out), 8)

    def _exponential_rate(self) -> float:
        """Over a block that fits in the caches of all threads."""
        x = torch.rand(2**15 * torch.get_num_threads())
        y = torch.empty_like(x)
        return x.numel() / self._seconds(lambda: torch.exp2(x, out=y), 200)

    def _chain_rates(self) -> dict[str, float]:
        from chain_kernel import chain_kernel  # Triton is at home on GPU machines only

        block, steps = 1024, 4096
        blocks = 32 * torch.cuda.get_device_properties(self.device).multi_processor_count
        x = torch.rand(blocks * block, device=self.device)
        rates = {}
        for name, exponential in (("exponentials", True), ("instructions", False)):
            run = partial(chain_kernel[(blocks,)], x, steps, BLOCK=block, EXPONENTIAL=exponential)
            seconds = self._seconds(run, 1)
            rates[name] = x.numel() * steps / seconds
        return rates

    def _clock_under_load(self) -> float | None:
        left = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16)
        for _ in range(400):
            torch.mm(left, left)
        text = _nvidia_smi(self.device, "clocks.sm")
        self._wait()
        return float(text) if text.replace(".", "").isdigit() else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _nvidia_smi(device: torch.device, field: str) -> str:
    """One property of the GPU; empty where the tool is missing."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        command += ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0].strip()
