"""Who started this process, and with which others: environment variables of torchrun and of Slurm's srun.

`torchrun` and `accelerate launch` say it in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and where the
processes meet in MASTER_ADDR and MASTER_PORT. `srun` says it in variables of its own; there the processes
meet on the first node of the step, at a port that follows from the number of the job, unless those two are
set. Without any of them the run is one process.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vimtune.text import quote

FIRST_PORT, PORTS = 20_000, 10_000
"""Jobs of Slurm meet at one of so many ports from the first one on."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number among those of this machine."""
    local_size: int = 1
    """How many of them are on this machine."""
    meeting: str = "env://"
    """Where they meet, as an address for torch's rendezvous."""
    own_gpu: bool = False
    """Whether the launcher may have left each process a GPU of its own as the only one that it sees."""


def read_launch() -> Launch:
    """What the environment says.

    Raises:
        ValueError: a variable that is wrong, or Slurm does not say where the processes meet.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ or not _is_step_of_several():
        world_size = _number("WORLD_SIZE", 1)
        return Launch(
            _number("RANK", 0),
            world_size,
            _number("LOCAL_RANK", 0),
            _number("LOCAL_WORLD_SIZE", world_size),
        )
    address, port = os.environ.get("MASTER_ADDR") or _first_node(), _number("MASTER_PORT", _port_of_job())
    return Launch(
        rank=_number("SLURM_PROCID", 0),
        world_size=_tasks(),
        local_rank=_number("SLURM_LOCALID", 0),
        local_size=_tasks_here(),
        meeting=f"tcp://{address}:{port}",
        own_gpu=True,
    )


def _is_step_of_several() -> bool:
    """Whether srun started this process with others. A batch script has Slurm's variables, too, but is no
    step that srun started."""
    return {"SLURM_STEP_ID", "SLURM_PROCID"} <= os.environ.keys() and _tasks() > 1


def _tasks() -> int:
    """Processes of the step; those of the job where Slurm does not say it of the step."""
    return _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1))


def _tasks_here() -> int:
    """Processes of the step on this node, from a list such as "4(x2),3": two nodes with 4, one with 3.

    Raises:
        ValueError: the list is of another form.
    """
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise ValueError(f"environment: tasks per node = {quote(text)}: expected a list such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number("SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else _tasks()


def _first_node() -> str:
    """Name of the first node of the step, from a list such as "gpu-a[003-007,12],login1".

    Raises:
        ValueError: there is no such list, or it is of another form.
    """
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if text := os.environ.get(name):
            node = re.sub(r"\[([^\],\-]*)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", text)[0])
            if re.fullmatch(r"[\w.\-]+", node):
                return node
            raise ValueError(
                f"environment variable {name} = {quote(text)}: set MASTER_ADDR to its first node"
            )
    raise ValueError("srun started several processes and does not name their nodes: set MASTER_ADDR")


def _port_of_job() -> int:
    """The same port in all processes of a job; jobs on one machine rarely have the same."""
    return FIRST_PORT + _number("SLURM_JOB_ID", 0) % PORTS


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name} = {quote(text)}: expected a whole number") from None
