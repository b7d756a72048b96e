"""Memba (ICLR 2026, arXiv 2506.18184): a membrane that leaks and integrates in the place of a mixer's gate.

    u_(i+1) = fire(tau u_i + z_i),     fire(v) = 0 if v > threshold else v

z (B, L, E) is the gate of a scan, cut into T chunks z_0 .. z_(T-1) of equally many tokens, and u_i a membrane
of a chunk's shape: token k of a chunk goes on from token k of the chunk before. The output of the scan is
gated by SiLU(u_1), .., SiLU(u_T) where it was gated by SiLU(z). In a Vim both directions have the same u, for
z stands in the order of tokens. Nothing is trained; published is it beside LoRA on the projectors.

Chosen where the text leaves it open: tokens that are left over when L is cut into T belong to the last chunk
and have no predecessors, so that u = fire(z) there; what a layer hands on to the next one, for which it is
u_0, is the mean of u_1 .. u_T without the tokens left over. The first layer starts with 0.

In a model that reads from the first token to the last neither may be: of a text that grows, T chunks grow
with it, and the mean of a layer tells its first tokens of its last ones, so that the likelihood of a text
would be that of a model that has read its end. There chunks have a length of their own, and each layer starts
with 0. A token then depends on those before it alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.adapters.declarations import ScanInput
from vimtune.adapters.rule import Call, CallRule


class MembraneRule(CallRule):
    """The gate of one layer.

    Args:
        scan: what the call `scan` takes.
        path: that of the call, under which the mean is handed on.
        before: path of the layer whose mean is the start of this one; None to start with 0.
        tau: how much of a membrane the next one keeps.
        threshold: above it a membrane fires.
        chunks: T; None for chunks of `length` tokens.
        length: tokens of a chunk if there is no T.
    """

    mixes_tokens = True

    def __init__(
        self,
        scan: ScanInput,
        path: str,
        before: str | None,
        *,
        tau: float,
        threshold: float,
        chunks: int | None,
        length: int,
    ) -> None:
        super().__init__()
        self.gate, self.path, self.before = scan.columns["z"], path, before
        self.tau, self.threshold = tau, threshold
        self.chunks, self.length = chunks, length

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Any:
        first, end = self.gate.start, self.gate.stop
        z = x[..., first:end]
        if self.chunks is None:
            gate = self.gates_of_a_text(z)
        else:
            start = flow[0].get(self.before) if self.before is not None else None
            gate, flow[0][self.path] = self.gates_of_an_image(z, start)
        return call(torch.cat([x[..., :first], gate, x[..., end:]], -1))

    def gates_of_an_image(self, z: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gates (B, L, E) of T chunks, and their mean membrane (B, L // T, E).

        Args:
            z: the gates as they were, (B, L, E).
            start: the membrane before the first chunk, of the mean's shape; None for 0.
        """
        assert self.chunks is not None
        length = z.shape[1] // self.chunks
        membranes = self.membranes([z.narrow(1, i * length, length) for i in range(self.chunks)], start)
        left_over = self.fire(z[:, self.chunks * length :])
        return torch.cat([*membranes, left_over], 1), reduce(torch.add, membranes) / self.chunks

    def gates_of_a_text(self, z: Tensor) -> Tensor:
        """The gates (B, L, E) of chunks of `length` tokens, of which the last one may be shorter."""
        padded = F.pad(z, (0, 0, 0, -z.shape[1] % self.length))
        membranes = self.membranes(padded.split(self.length, 1), None)
        return torch.cat(membranes, 1)[:, : z.shape[1]]

    def membranes(self, chunks: Iterable[Tensor], start: Tensor | None) -> list[Tensor]:
        """The membranes after each of the chunks, which all have one shape."""
        membranes: list[Tensor] = []
        before = start
        for chunk in chunks:
            before = self.fire(chunk if before is None else torch.add(chunk, before, alpha=self.tau))
            membranes.append(before)
        return membranes

    def fire(self, membrane: Tensor) -> Tensor:
        """The membrane, 0 where it is above the threshold."""
        return membrane.masked_fill(membrane > self.threshold, 0)
