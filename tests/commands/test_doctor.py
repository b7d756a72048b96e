"""The doctor: it passes sound backends, finds broken ones, and gives advice that fits the machine."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from vimtune import cli, ops
from vimtune.commands import doctor
from vimtune.ops import dispatch
from vimtune.ops.backend import Backend
from vimtune.ops.eager.convolution import EagerConvolution
from vimtune.ops.eager.scan import EagerScan

CPU = torch.device("cpu")


class BrokenScan(EagerScan):
    """A scan in PyTorch with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def forward(self, *arguments):
        out, states, last = super().forward(*arguments)
        if self.fault == "output":
            out = out * 1.001
        elif self.fault == "nan":
            out[0, 0, 0] = torch.nan
        elif self.fault == "raises":
            raise RuntimeError("illegal instruction")
        return out, states, last

    def backward(self, *arguments):
        gradients = list(super().backward(*arguments))
        if self.fault == "gradient":
            gradients[7] = gradients[7] * 1.001
        return tuple(gradients)


class BrokenConvolution(EagerConvolution):
    """A convolution that may run in one direction only."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def forward(self, inputs, options):
        reverse = options.reverse and self.fault != "direction"
        return super().forward(inputs, options._replace(reverse=reverse))


class Broken(ops.Backend):
    """The PyTorch backend with one fault."""

    name = "broken"
    summary = "wrong on purpose"

    def __init__(self, fault: str, reasons: tuple[str, ...] = ()) -> None:
        self.kernels = (BrokenScan(fault), BrokenConvolution(fault))
        self.reasons = reasons

    def refusals(self, device):
        return [*self.reasons]


@pytest.fixture
def break_backend(backends):
    return lambda fault, *reasons: backends(Broken(fault, reasons))


@pytest.mark.parametrize("backend", [row.name for row in ops.backend_report("cpu") if row.available])
def test_every_backend_of_this_machine_passes(backend):
    result = doctor.self_test(backend, CPU)
    assert result.failure == ""
    assert set(result.forward) == set(result.gradient) == set(doctor.TOLERANCE)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("output", r"selective_scan \(forward, fp32\): the output is off by 1\.\de-03"),
        ("nan", r"the output is off by inf"),
        ("gradient", r"the gradient of delta_bias is off"),
        ("direction", r"causal_conv1d \(reverse, fp32\)"),
        ("raises", r"RuntimeError: illegal instruction"),
    ],
)
def test_a_broken_backend_is_found_and_named(break_backend, fault, words):
    break_backend(fault)
    assert re.search(words, doctor.self_test("broken", CPU).failure)


def run(width: int) -> tuple[int, str]:
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    return doctor.run_doctor(console), console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_report(width):
    code, text = run(width)
    assert code == 0
    for name in (*dispatch.BACKENDS, "reference", "python", "torch", "timm", "GPU", "CPU"):
        assert re.search(rf"^ +{name} ", text, re.M)
    assert "used by auto" in text and "FAILED" not in text and "What to install" in text


def test_a_failed_self_test_sets_the_exit_code(break_backend, capsys):
    break_backend("gradient")
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "broken on cpu: selective_scan" in text


def test_reasons_of_a_backend_that_cannot_run_are_shown(break_backend):
    break_backend("", "no [magic] found")
    code, text = run(100)
    assert code == 0 and "cannot run: no [magic] found" in text


@pytest.mark.parametrize("compiler", [None, "missing", "c++"])
@pytest.mark.parametrize("driver", [False, True])
@pytest.mark.parametrize("build", [None, "13.0"])
def test_advice_on_a_machine_without_usable_gpu(monkeypatch, compiler, driver, build):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler == "c++" else None)
    if compiler == "missing":
        monkeypatch.setenv("CXX", "missing")
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    advice = "\n".join(doctor.install_advice())
    assert ("compiler" in advice) == (compiler != "c++")
    assert ("unset CXX" in advice) == (compiler == "missing")
    assert ("pip install --force-reinstall torch" in advice) == (driver and build is None)
    assert ("nvidia-smi" in advice) == (driver and build is not None)


@pytest.mark.parametrize("nvcc", [None, "/usr/local/cuda/bin/nvcc"])
@pytest.mark.parametrize("packages", [(), ("triton",), ("triton", "mamba-ssm", "causal-conv1d")])
def test_advice_on_a_machine_with_a_gpu(monkeypatch, packages, nvcc):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def version(name):
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(shutil, "which", lambda name: nvcc if name == "nvcc" else None)
    advice = "\n".join(doctor.install_advice())
    assert ("pip install triton" in advice) == ("triton" not in packages)
    assert ("vimtune[cuda]" in advice) == ("mamba-ssm" not in packages)
    assert ("needs nvcc" in advice) == ("mamba-ssm" not in packages and nvcc is None)


def test_packages_that_a_thin_installation_lacks_are_named(monkeypatch):
    requirements = ["torch<3,>=2.11", "matplotlib<4,>=3.8", "annotated-types", 'optuna; extra == "search"']
    there = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: requirements)
    assert "matplotlib" not in "\n".join(doctor.install_advice())

    def version(name):
        if name in ("matplotlib", "annotated-types", "optuna"):
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    first = doctor.install_advice()[0]
    assert first.endswith("not installed:\n    pip install matplotlib annotated-types")


def test_a_backend_of_a_users_own_says_what_it_needs(backends):
    class Mine(Backend):
        name = "mine"
        summary = "mine"
        packages = ("my-kernels",)

        def refusals(self, device):
            return ["my-kernels are not there"]

        def advice(self):
            return ["mine needs my-kernels:\n    pip install my-kernels"]

    backends(Mine())
    assert ("my-kernels", "not installed (optional)") in doctor.environment()
    assert doctor.install_advice()[-1] == "mine needs my-kernels:\n    pip install my-kernels"


EXAMINED = [
    (doctor.build, "find_compiler"),
    (importlib.metadata, "version"),
    (doctor.platform, "platform"),
    (doctor, "processor_name"),
    (torch.cuda, "is_available"),
    (doctor.ops, "backend_report"),
    (doctor, "install_advice"),
]


@pytest.mark.parametrize(
    ("owner", "name"), EXAMINED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_whatever_is_broken_is_a_finding(monkeypatch, owner, name):
    def broken(*arguments):
        raise RuntimeError("no [home] folder\n\x1b[2J")

    devices = doctor._devices()
    monkeypatch.setattr(doctor, "_devices", lambda: devices)
    monkeypatch.setattr(doctor, "self_test", lambda backend, device: doctor.SelfTest())
    monkeypatch.setattr(owner, name, broken)
    code, text = run(300)
    assert code in (0, 1)
    assert "no [home] folder" in text and "What to install" in text and "\x1b" not in text


def test_an_environment_where_nothing_is_as_it_should_be():
    nowhere = "/dev/null/nothing"
    odd = {
        "CXX": "no-such-compiler",
        "HOME": nowhere,
        "VIMTUNE_CACHE": nowhere,
        "TMPDIR": nowhere,
        "COLUMNS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "vimtune", "doctor"], capture_output=True, text=True, env={**os.environ, **odd}
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "unsetCXX" in "".join(done.stdout.split())
