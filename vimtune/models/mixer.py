"""The bidirectional Mamba mixer of Vision Mamba (Zhu et al. 2024, arXiv 2401.09417, Algorithm 1).

Parameter names are those of the official code (`bimamba_type="v2"`): the suffix `_b` marks the
copy of a parameter that the backward direction has for itself.

Shape letters: B batch, L tokens, D width, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vimtune.ops import DirectionWeights, bidirectional_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4
"""The range in which time steps are log-uniform at the start of training (Gu & Dao 2023, section 3.6).

No time step is below the floor, so that the inverse of softplus stays finite.
"""


class ReadLinear(nn.Linear):
    """A linear layer whose weight is read by the mixer; the layer itself is never called.

    It is a type of its own so that tools that exchange linear layers for others by their type, such as
    dynamic quantisation, leave it alone.
    """

    weight_is_read = True
    """Tells adapters that a rule cannot act on the input of this layer."""


class BiMambaMixer(nn.Module):
    """Token mixer (B, L, D) -> (B, L, D): one gated scan per direction between two shared projections.

        x, z = in_proj(h)
        u    = SiLU(conv(x));  dt, B, C = x_proj(u)
        y    = scan(u, softplus(dt_proj(dt)), -exp(A_log), B, C, D) * SiLU(z)
        out  = out_proj((y_forward + y_backward) / 2)

    Every weight is read through its module at each call, so that rules attached to a weight
    (`vimtune.adapters`) take effect wherever the weight is used. The number of states is that of
    `A_log`, whatever was asked for at construction.
    """

    adapter_calls: ClassVar[tuple[str, ...]] = ("scan",)
    """Methods that rules of adapters may surround."""
    directions: ClassVar[int] = 2
    """The scan goes through the tokens in both directions."""
    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "A_b_log", "D", "D_b")
    """Names of the parameters that weight decay leaves alone: A and D are no factors of a product of
    matrices, and decay would pull them to values that mean nothing."""
    reverse_copies: ClassVar[Mapping[str, str]] = {
        "A_log": "A_b_log",
        "D": "D_b",
        "conv1d": "conv1d_b",
        "x_proj": "x_proj_b",
        "dt_proj": "dt_proj_b",
    }
    """What the backward direction has for itself, by what it is a copy of. Targets of adapters that name the
    one mean both."""

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        num_residuals: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build a mixer of width `dim`.

        Args:
            dim: D.
            d_state: N.
            d_conv: K.
            expand: E / D.
            dt_rank: R; ceil(D / 16) if None.
            num_residuals: number of residual branches in the network; scales the initial out_proj.
            backend: scan backend, see `vimtune.ops`.
            device: where the parameters lie; torch's default if None.
            dtype: of the parameters; torch's default if None.
        """
        super().__init__()
        inner = expand * dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.backend = backend

        def state_matrix() -> nn.Parameter:
            logarithms = torch.arange(1, d_state + 1, device=device).float().log()
            return nn.Parameter(logarithms.to(dtype or torch.float32).repeat(inner, 1))

        def convolution() -> nn.Conv1d:
            return nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, **factory)

        # In the official order, which is also the order of the keys.
        self.A_log = state_matrix()
        self.D = nn.Parameter(torch.ones(inner, **factory))
        self.A_b_log = state_matrix()
        self.D_b = nn.Parameter(torch.ones(inner, **factory))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **factory)
        self.conv1d = convolution()
        self.x_proj = ReadLinear(inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = ReadLinear(self.dt_rank, inner, **factory)
        self.conv1d_b = convolution()
        self.x_proj_b = ReadLinear(inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj_b = ReadLinear(self.dt_rank, inner, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=False, **factory)
        self._init_weights(num_residuals)

    @torch.no_grad()
    def _init_weights(self, num_residuals: int) -> None:
        """Official initialisation, for both directions.

        The official code leaves the time steps of the backward direction at softplus(0) = 0.69,
        some fifty times faster forgetting than forward; here both directions start alike.
        """
        self.out_proj.weight.div_(math.sqrt(num_residuals))
        for dt_proj in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            precise = torch.promote_types(dt_proj.bias.dtype, torch.float32)
            dt = torch.empty_like(dt_proj.bias, dtype=precise)
            dt.uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp_()
            dt.clamp_(min=DT_FLOOR)
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # This is the inverse of softplus.

    def named_rows(self) -> dict[str, dict[str, slice]]:
        """The rows of the projections by name, by the path of the parameter: in_proj makes x and z, x_proj
        makes dt, B and C. They follow the present width and number of states, which are those of A_log."""
        inner, rank = self.A_log.shape[0], self.dt_rank
        rows = {"in_proj.weight": {"x": slice(0, inner), "z": slice(inner, 2 * inner)}}
        for name, num_states in (("x_proj", self.A_log.shape[1]), ("x_proj_b", self.A_b_log.shape[1])):
            rows[f"{name}.weight"] = {
                "dt": slice(0, rank),
                "B": slice(rank, rank + num_states),
                "C": slice(rank + num_states, rank + 2 * num_states),
            }
        return rows

    def forward(self, hidden: Tensor, flow: dict[str, Tensor] | None = None) -> Tensor:
        """Tokens (B, L, D) to (B, L, D); `flow` is what earlier layers hand on (see `VisionMamba.encode`)."""
        return self.out_proj(self.scan(self.in_proj(hidden), flow))

    def scan(self, xz: Tensor, flow: dict[str, Tensor] | None = None) -> Tensor:
        """All that lies between the projections, in both directions.

        Rules of adapters may surround it (`adapter_calls`).

        Args:
            xz: the output of in_proj, (B, L, 2 E).
            flow: what earlier layers hand on; the scan itself has no use for it.

        Returns:
            The input of out_proj, (B, L, E).
        """
        # Read here one by one: TorchScript would give a function that reads them modules of one class alone,
        # and the projections that are read are of another class than those that are called.
        forward = DirectionWeights(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
        )
        reverse = DirectionWeights(
            self.conv1d_b.weight.squeeze(1),
            self.conv1d_b.bias,
            self.x_proj_b.weight,
            self.dt_proj_b.weight,
            self.dt_proj_b.bias,
            self.A_b_log,
            self.D_b,
        )
        return bidirectional_scan(xz, forward, reverse, self.backend)
