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
would be that of a model that has read its end. There chunks have a length of their own, c, and each layer
starts with 0. The membrane of a token is then made of its gate and the membrane c tokens before it, so that
those of the last c tokens are all that a text has to keep of its membranes: they lie in the cache of the
model, and cached decoding, texts that are read in parts, and padding change nothing. Padding has no gate.
(In half precision, where ways of computing differ in their last digits, these may decide what fires.)

Beside affix the order of the methods decides what is cut into chunks, as each method surrounds those named
before it. `affix+memba` makes membranes of the tokens of the image or text alone, as `memba` does without
affix. In `memba+affix` the learnt tokens are there already, with gates of 0, so that they have membranes and
the chunks are others; in a language model their membranes are 0 and it makes no difference. Tokens of prompt
tuning are among those of the image or text in any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vimtune.adapters.declarations import ScanInput
from vimtune.adapters.parts import TextPart
from vimtune.adapters.rule import Call, CallRule
from vimtune.ops import membrane

torch.fx.wrap("membrane")  # One node of an FX graph, so that the device decides which kernels run.


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
        start = flow[0].get(self.before) if self.before is not None else None
        changed, mean = self._membranes(x, start)
        if self.chunks is not None:
            flow[0][self.path] = mean
        return call(changed)

    def around_part(self, call: Call, x: Tensor, part: TextPart, *flow: dict[str, Tensor]) -> Any:
        def step(tokens: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
            # Of fewer tokens than a chunk has, each goes on from the membrane of one, and the rest wait.
            start = None if before is None else before[:, : tokens.shape[1]]
            changed, _ = self._membranes(tokens, start)
            return changed, changed[..., self.gate]

        return call(part.go_on(x, self.length, step))

    def _membranes(self, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """`x` with membranes for its gates, and their mean to be handed on."""
        changed, mean = membrane(
            x,
            start,
            first=self.gate.start,
            width=self.gate.stop - self.gate.start,
            chunks=self.chunks,
            length=self.length,
            tau=self.tau,
            threshold=self.threshold,
        )
        return changed, mean
