"""`vimtune doctor`: what this machine offers, whether every scan backend computes the right numbers,
and the exact line that installs what is missing.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vimtune import __version__, ops
from vimtune.backends import BACKENDS, REFERENCE
from vimtune.console import build_console
from vimtune.machine import installed_version, missing_requirements, processor_name, usable_cores
from vimtune.ops import reference
from vimtune.ops.cpu import build
from vimtune.text import printable, shorten

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest error that rounding explains, relative to the largest element of the reference result."""
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Short names of the types."""

PACKAGES = ("torch", "torchvision", "timm", "albumentations", "safetensors")
"""Distributions whose versions are shown, before those that backends need."""


def finding(examine: Callable[[], str]) -> str:
    """What `examine` finds out, or why it could not: a broken machine is what the doctor is for."""
    try:
        return examine()
    except Exception as error:  # Whatever is broken in it is the finding.
        return f"cannot be examined ({type(error).__name__}: {printable(shorten(str(error)))})"


def compiler() -> str | None:
    """Command line start of the C++ compiler that the CPU kernels are built with."""
    try:
        return " ".join(build.find_compiler())
    except build.BuildError:
        return None


def has_nvidia_gpu() -> bool:
    """Whether the machine has an NVIDIA driver, even if this torch cannot use it."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def _processor() -> str:
    return f"{processor_name()}, usable cores: {usable_cores()}, threads of torch: {torch.get_num_threads()}"


def _accelerators() -> str:
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})" for p in properties]
        return ", ".join(names)
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    driver = "an NVIDIA driver is installed" if has_nvidia_gpu() else "no NVIDIA driver found"
    return f"none usable (torch is {build}; {driver})"


def environment() -> list[tuple[str, str]]:
    """(name, value) rows that describe this installation."""
    optional = [package for _, backend in BACKENDS.items() for package in backend.packages]
    examinations: dict[str, Callable[[], str]] = {
        "vimtune": lambda: __version__,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        **{name: partial(_version, name, "not installed") for name in PACKAGES},
        **{name: partial(_version, name, "not installed (optional)") for name in optional},
        "system": platform.platform,
        "CPU": _processor,
        "GPU": _accelerators,
        "C++ compiler": lambda: compiler() or "none found",
    }
    return [(name, finding(examine)) for name, examine in examinations.items()]


def _version(package: str, otherwise: str) -> str:
    return installed_version(package) or otherwise


# ---------------------------------------------------------------------------------------------
# Numeric self-test


@dataclass
class SelfTest:
    """Errors of one backend on one device, relative to the largest element of the reference result.

    Attributes:
        forward: largest error of an output, by type.
        gradient: largest error of a gradient, by type.
        failure: what is wrong, in one line; empty if nothing is.
    """

    forward: dict[torch.dtype, float] = field(default_factory=dict)
    gradient: dict[torch.dtype, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether all errors are within `TOLERANCE`."""
        return not self.failure


def _scan_inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Inputs like those of a Vim layer, of odd sizes: B 2, L 61, E 40, N 16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, tokens, inner, states = 2, 61, 40, 16
    activations = {
        "u": normal(batch, tokens, inner),
        "delta": 0.5 * normal(batch, tokens, inner),
        "B": normal(batch, tokens, states),
        "C": normal(batch, tokens, states),
        "z": normal(batch, tokens, inner),
    }
    weights = {
        "A": -torch.rand(inner, states, generator=generator) * states - 0.1,
        "D": normal(inner),
        "delta_bias": normal(inner) - 3.0,
    }
    inputs = {name: tensor.to(dtype) for name, tensor in activations.items()} | weights
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _conv_inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 61, 40), (40, 4), (40,)))
    return {"x": x.to(device, dtype), "weight": weight.to(device), "bias": bias.to(device)}


def _with_gradients(operation: object, inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Result of `operation` and the gradients of all its inputs for a fixed random cotangent."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = operation(**leaves, **options)  # type: ignore[operator]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"output": out.detach()} | dict(zip(leaves, gradients, strict=True))


def _cases(device: torch.device) -> Iterator[tuple[torch.dtype, str, dict[str, Tensor], dict[str, bool]]]:
    for dtype in TOLERANCE:
        for reverse in (False, True):
            scan_options = {"delta_softplus": True, "reverse": reverse}
            yield dtype, "selective_scan", _scan_inputs(dtype, device), scan_options
            yield dtype, "causal_conv1d", _conv_inputs(dtype, device), {"silu": True, "reverse": reverse}


def self_test(backend: str, device: torch.device) -> SelfTest:
    """Compare scan and convolution, as far as `backend` has them, with the reference, and all gradients."""
    result = SelfTest()
    try:
        for dtype, operation, inputs, options in _cases(device):
            if backend != "reference" and not ops.has_kernels(backend, operation):
                continue
            expected = _with_gradients(getattr(reference, operation), inputs, **options)
            found = _with_gradients(getattr(ops, operation), inputs, backend=backend, **options)
            for name, tensor in expected.items():
                error = _relative_error(found[name], tensor)
                errors = result.forward if name == "output" else result.gradient
                errors[dtype] = max(error, errors.get(dtype, 0.0))
                if error > TOLERANCE[dtype] and not result.failure:
                    kind = "output" if name == "output" else f"gradient of {name}"
                    direction = "reverse" if options["reverse"] else "forward"
                    result.failure = (
                        f"{operation} ({direction}, {SHORT[dtype]}): the {kind} is off by {error:.1e}, "
                        f"at most {TOLERANCE[dtype]:.0e} is allowed"
                    )
    except Exception as error:  # Whatever a broken kernel raises is the finding of this test.
        result.failure = f"{type(error).__name__}: {error}"
    return result


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; infinite when `found` is not finite."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    right = expected.cpu().double()  # Not every device has doubles.
    difference = (found.cpu().double() - right).abs().max()
    return (difference / right.abs().max().clamp_min(1e-30)).item()


# ---------------------------------------------------------------------------------------------
# Advice


def install_advice() -> list[str]:
    """What is missing or would make this machine faster: one reason and one command per entry."""
    advice = []
    if missing := missing_requirements("vimtune"):
        reason = "train, evaluate and other commands need packages that are not installed"
        advice.append(f"{reason}:\n    pip install {' '.join(missing)}")
    if has_nvidia_gpu() and not torch.cuda.is_available():
        if torch.version.cuda is None:
            reason = "this torch is a CPU build, but the machine has an NVIDIA GPU"
            advice.append(f"{reason}:\n    pip install --force-reinstall torch torchvision")
        else:
            advice.append(
                f"torch (CUDA {torch.version.cuda}) cannot use the NVIDIA driver: "
                "update the driver, or check with\n    nvidia-smi"
            )
    for _, backend in BACKENDS.items():
        advice += backend.advice()
    return advice


# ---------------------------------------------------------------------------------------------


def _devices() -> list[torch.device]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [torch.device("cpu"), *(torch.device(name) for name, usable in there.items() if usable)]


def _backend_lines(device: torch.device, failures: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text in rich markup) per backend; adds what went wrong to `failures`."""
    try:
        chosen, report = ops.resolved_backend(device), ops.backend_report(device)
    except Exception as error:  # No backend can even be asked, and that is what the doctor has to say.
        failures.append(f"{device.type}: {type(error).__name__}: {error}")
        return
    for row in report:
        if not row.available:
            yield row.name, f"cannot run: {escape('; '.join(row.reasons))}"
            continue
        about = f"{escape(row.summary)}{' (used by auto)' if row.name == chosen else ''}"
        if row.name == REFERENCE:
            yield row.name, about
            continue
        result = self_test(row.name, device)
        if result.failure:
            failures.append(f"{row.name} on {device.type}: {result.failure}")
        verdict = "[red]FAILED[/]" if result.failure else "[green]passed[/]"
        errors = "".join(
            f"; {SHORT[dtype]} output {result.forward[dtype]:.0e}, gradients {result.gradient[dtype]:.0e}"
            for dtype in TOLERANCE
            if dtype in result.gradient
        )
        yield row.name, f"{about}\nself-test {verdict}{errors}"


def run_doctor(console: Console | None = None) -> int:
    """Print environment, backends with self-tests, and advice. Returns 1 when a self-test fails."""
    console = console or build_console(is_result=True)
    logging.getLogger("vimtune.ops").setLevel(logging.WARNING)  # The table below says which backend is used.

    def show(title: str, rows: Iterable[tuple[str, str]]) -> None:
        console.print(title, style="bold")
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, value in rows:
            table.add_row(name, Text.from_markup(value, emoji=False))
        console.print(table)

    show("Environment", ((name, escape(printable(value))) for name, value in environment()))
    failures: list[str] = []
    for device in _devices():
        show(f"\nScan backends on {device.type}", _backend_lines(device, failures))
    allowed = " and ".join(f"{tolerance:.0e} in {SHORT[dtype]}" for dtype, tolerance in TOLERANCE.items())
    console.print(f"Errors are relative to the largest element of the reference; {allowed} are allowed.")

    console.print("\nWhat to install", style="bold")
    nothing = "nothing: vimtune uses all that this machine offers"
    advice = finding(lambda: "\n  ".join(install_advice()) or nothing)
    console.print(f"  {advice}", markup=False, soft_wrap=True)
    for failure in map(printable, failures):
        console.print(f"\nSelf-test failed: {failure}", style="red", markup=False, soft_wrap=True)
    if failures:
        console.print("Choose another backend with --backend, and please report this.", style="red")
    return 1 if failures else 0
