"""Where the model of a run lies: whole in every process, or shared out among them.

With `Replicated`, the rule, every process holds the whole model and the processes sum their gradients. With
`Sharded` every tensor is cut along its first dimension and each process holds one piece of it, of its
gradient and of its optimizer state; torch's FSDP2 (`torch.distributed.fsdp.fully_shard`) puts the tensors of
a block together while the block computes. A model that is too large for one device is trained so.

All processes of a sharded model meet in every pass: they need to run equally many of them, and a process
that ends takes a piece of the model with it. Files do not tell how a run was spread, because they hold whole
tensors in either case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vimtune.adapters import settles
from vimtune.adapters.slots import SLOTS, at_rest, plain_class
from vimtune.recipe.components import OptimisationSettings
from vimtune.runtime.distributed import PeerLostError, Processes
from vimtune.tasks.job import Batch


class Part(NamedTuple):
    """A batch that this process has to run."""

    number: int
    """Place of the batch in its window."""
    batch: Batch
    own: bool
    """Whether it is this process's share. If not, it is that of another process, run along with it because
    the passes meet, and nothing may come of it here."""


class Placement(ABC):
    """Where the model lies, and what follows from it for passes, gradients and files."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    saves_alone: bool
    """Whether the main process can save the state of the run without the others."""

    @abstractmethod
    def place(self, model: nn.Module) -> None:
        """Put a model, which lies whole in every process on any device, where it is to be trained."""

    @abstractmethod
    def sum_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` of `parameters` over all processes, unless the passes have done so."""

    @abstractmethod
    def parts(self, window: Sequence[Batch]) -> Iterator[Part]:
        """What this process has to run for its shares of the batches `window`, some of which may be empty."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in this process, or in one that it meets in its passes."""

    @abstractmethod
    def meeting(self) -> AbstractContextManager[None]:
        """For blocks in which passes run.

        Raises:
            PeerLostError: another process has ended while it was needed there.
        """

    @abstractmethod
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, at least in the main process; all processes call this together."""

    @abstractmethod
    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this process needs of a whole tensor that takes the place of `like`, a tensor of the run."""


class Replicated(Placement):
    """Every process holds the whole model."""

    saves_alone = True

    def place(self, model: nn.Module) -> None:
        """Move the model to the device of this process."""
        model.to(self.processes.device)

    def sum_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` of `parameters` over all processes."""
        self.processes.sum_gradients_(parameters)

    def parts(self, window: Sequence[Batch]) -> Iterator[Part]:
        """The shares that are not empty."""
        for number, batch in enumerate(window):
            if batch.count > 0:
                yield Part(number, batch, own=True)

    def any(self, flag: bool) -> bool:
        """`flag`: passes of other processes are their own business."""
        return flag

    def meeting(self) -> AbstractContextManager[None]:
        """Nothing: passes meet nobody."""
        return nullcontext()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are."""
        return dict(tensors)

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """The whole tensor."""
        return whole.to(like.device)


class Sharded(Placement):
    """Each process holds a piece of every tensor."""

    saves_alone = False

    def place(self, model: nn.Module) -> None:
        """Shard the model, block by block: no more than one block lies whole on the device.

        Raises:
            ValueError: it has a parameter that is a scalar and cannot be cut, one that several blocks have in
                common, or a method that looks at whole tensors.
        """
        if settles(model):
            raise ValueError(
                "shard = true does not go with a method that chooses from data before training, because that "
                "looks at whole tensors: pass --no-shard, or choose another method"
            )
        if common := _in_several(blocks_of(model)):
            raise ValueError(
                f"shard = true does not go with {common}, which is a tensor of several blocks, because each "
                "block is put together alone: pass --no-shard, or choose options without tensors in common"
            )
        mesh = init_device_mesh(self.processes.device.type, (self.processes.world_size,))
        # FSDP reads parameters by their names and would take what the rules make of them for the weights.
        with at_rest(model):
            # The root, too, gives its whole tensors back after each pass: kept until the next one, they
            # would hide what is written to the pieces meanwhile.
            sharded = [
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
                for module in [*blocks_of(model), model]
            ]
            for module in sharded:
                # Losses are sums, so gradients are sums as well; gloo knows no other reduction.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
                module.unshard()  # the first time FSDP looks up its parameters once more
                module.reshard()

    def sum_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Nothing: the backward passes have summed them."""

    def parts(self, window: Sequence[Batch]) -> Iterator[Part]:
        """A batch for each that any process has a share of: where this process's is empty, that of another.

        A model need not be able to compute with empty tensors.
        """
        rank, world_size = self.processes.rank, self.processes.world_size
        counts = torch.zeros(world_size, len(window), dtype=torch.int64)
        counts[rank] = torch.tensor([batch.count for batch in window])
        held = self.processes.sum(counts) > 0
        for number, batch in enumerate(window):
            if held[:, number].all():
                yield Part(number, batch, own=True)
            elif held[:, number].any():
                lender = int(held[:, number].int().argmax())
                lent = self.processes.gather(batch.to(torch.device("cpu")) if rank == lender else None)
                own = batch.count > 0
                yield Part(number, batch if own else lent[lender].to(self.processes.device), own)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.processes.sum(torch.tensor(int(flag))))

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Give the failure of a collective within the block its name."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise PeerLostError from error
            raise

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the tensors together one by one: on the CPU in the main process, nothing in the others."""
        gathered = {}
        with self.meeting():
            for name, tensor in tensors.items():
                value = whole(tensor)
                if self.processes.is_main:
                    gathered[name] = value.cpu()
        return gathered

    @torch.no_grad()
    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """This process's piece of the tensor, if `like` is cut into pieces, too."""
        if not isinstance(like, DTensor):
            return whole.to(like.device)
        piece = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return piece.clone()  # or it would keep the whole tensor


def build_placement(settings: OptimisationSettings, processes: Processes) -> Placement:
    """The placement that `settings` ask for.

    Raises:
        ValueError: the model cannot be shared out.
    """
    if not settings.shard:
        return Replicated(processes)
    if processes.world_size == 1:
        raise ValueError(
            "shard = true needs several processes and there is one: start them with torchrun, or pass "
            "--no-shard"
        )
    if processes.device.type == "mps":
        raise ValueError("shard = true is not possible on mps: use cuda or cpu, or pass --no-shard")
    return Sharded(processes)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the members of its outermost lists of modules of one class."""
    return list(_blocks_below(model))


def _blocks_below(module: nn.Module) -> Iterator[nn.Module]:
    members = list(module.children())
    alike = len(members) > 1 and len({plain_class(member) for member in members}) == 1
    if alike and isinstance(module, (nn.ModuleList, nn.Sequential)):
        yield from members
        return
    for name, child in module.named_children():
        if name != SLOTS:  # what is inside rules is not called
            yield from _blocks_below(child)


def _in_several(blocks: Sequence[nn.Module]) -> str | None:
    """The name within its block of a parameter that several blocks have in common; None if there is none."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            if owners.setdefault(parameter, block) is not block:
                return name
    return None


def whole(tensor: Tensor) -> Tensor:
    """A tensor of the run as one that all processes hold; they call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor of the run."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
