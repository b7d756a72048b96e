"""What the environment says of the processes that were started together."""

from __future__ import annotations

import os

import pytest

from vimtune.runtime.device import resolve_device
from vimtune.runtime.launch import Launch, read_launch

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "54321",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "99",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu-a[003-007,12],login1",
}
"""Variables of a process that srun started."""


@pytest.fixture
def environment(monkeypatch):
    """`environment(values)`: these are all variables that say anything of processes."""

    def have(values: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                monkeypatch.delenv(name)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return have


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Launch(3, 4, 0, 4)),
        (
            {**STEP, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Launch(5, 8, 1, 4),
        ),
        (STEP, Launch(6, 11, 2, 4, "tcp://gpu-a003:24321", own_gpu=True)),
        ({**STEP, "SLURM_NODEID": "2"}, Launch(6, 11, 2, 3, "tcp://gpu-a003:24321", own_gpu=True)),
        (
            {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"},
            Launch(6, 11, 2, 4, "tcp://10.0.0.1:7", own_gpu=True),
        ),
        ({name: STEP[name] for name in STEP if name != "SLURM_STEP_ID"}, Launch()),  # a batch script
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, Launch()),  # an interactive shell
        (
            {"SLURM_STEP_ID": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODELIST": "n[7]"},
            Launch(1, 2, 0, 2, "tcp://n7:20000", own_gpu=True),
        ),
    ],
)
def test_who_is_there(environment, values, expected):
    environment(values)
    assert read_launch() == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("jz-ia[810,817-819]", "jz-ia810"), ("r1-[02-04]-ib.x.y,z", "r1-02-ib.x.y")],
)
def test_the_processes_meet_on_the_first_node(environment, nodes, first):
    environment({**STEP, "SLURM_STEP_NODELIST": nodes})
    assert read_launch().meeting == f"tcp://{first}:24321"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "one"}, "RANK = 'one': expected a whole number"),
        ({**STEP, "SLURM_STEP_NODELIST": "a b"}, "SLURM_STEP_NODELIST = 'a b': set MASTER_ADDR"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "does not name their nodes: set MASTER_ADDR"),
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(y2)"},
            r"tasks per node = '4\(y2\)': expected a list such as",
        ),
    ],
)
def test_what_cannot_be_read_is_named(environment, values, message):
    environment(values)
    with pytest.raises(ValueError, match=message):
        read_launch()


def test_a_process_may_see_its_own_gpu_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert resolve_device("auto", 3, 4, own_gpu=True).index == 0
    with pytest.raises(ValueError, match="GPU 3 is asked for and this machine has 1"):
        resolve_device("auto", 3, 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert resolve_device("auto", 3, 4, own_gpu=True).index == 3
