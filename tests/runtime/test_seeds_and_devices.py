"""Seeds and devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vimtune.runtime.device import resolve_device
from vimtune.runtime.seeds import derive_seed, numpy_seed

CPU = torch.device("cpu")


def test_seeds_are_fixed_and_differ():
    assert derive_seed(0, "step", 1, 2) == derive_seed(0, "step", 1, 2) == 7986440277878847354
    seeds = {derive_seed(s, "step", a, b) for s in range(3) for a in range(20) for b in range(20)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)


def test_numpy_seed_is_restored():
    np.random.seed(1)
    expected = np.random.rand(3)
    np.random.seed(1)
    with numpy_seed(7):
        inside = np.random.rand()
    assert np.array_equal(np.random.rand(3), expected)
    with numpy_seed(7):
        assert np.random.rand() == inside


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpu", "expected auto, cpu, cuda"), ("cuda:99", "GPU 99 is asked for"), ("xpu", "expected auto, cpu")],
)
def test_devices_this_machine_does_not_have(name, expected):
    with pytest.raises(ValueError, match=expected):
        resolve_device(name)


def test_one_gpu_cannot_serve_several_processes():
    with pytest.raises(ValueError, match="names one GPU for 2 processes"):
        resolve_device("cuda:0", local_world_size=2)


def test_device_of_any_machine():
    assert resolve_device("cpu") == CPU
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto").type == ("cpu" if accelerator is None else accelerator.type)
