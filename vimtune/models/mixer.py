"""The bidirectional Mamba mixer of Vision Mamba (Zhu et al. 2024, arXiv 2401.09417, Algorithm 1).

Parameter names are those of the official code (`bimamba_type="v2"`): the suffix `_b` marks the
copy of a parameter that the backward direction has for itself.

Shape letters: B batch, L tokens, D width, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vimtune.ops import (
    DirectionStart,
    DirectionWeights,
    bidirectional_scan,
    bidirectional_scan_from,
    start_behind,
)

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
    starts: ClassVar[tuple[str, ...]] = ("initial_state", "conv_tail", "initial_state_b", "conv_tail_b")
    """Names of the parameters with which the scans begin, in a mixer that has them."""
    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "A_b_log", "D", "D_b", *starts)
    """Names of the parameters that weight decay leaves alone: A and D are no factors of a product of
    matrices, and decay would pull them to values that mean nothing; what a scan begins with is no factor
    either."""

    reverse_copies: ClassVar[Mapping[str, str]] = {
        "A_log": "A_b_log",
        "D": "D_b",
        "conv1d": "conv1d_b",
        "x_proj": "x_proj_b",
        "dt_proj": "dt_proj_b",
    }
    """What the backward direction has for itself, by what it is a copy of. Targets of adapters that name the
    one mean both."""

    if TYPE_CHECKING:  # TorchScript would take annotations for the types of the attributes.
        initial_state: nn.Parameter | None
        conv_tail: nn.Parameter | None
        initial_state_b: nn.Parameter | None
        conv_tail_b: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        initial_state: bool = False,
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
            initial_state: whether each direction begins with a state and a convolution tail, see
                `set_initial_state`.
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
        for name in self.starts:
            self.register_parameter(name, None)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **factory)
        self.conv1d = convolution()
        self.x_proj = ReadLinear(inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = ReadLinear(self.dt_rank, inner, **factory)
        self.conv1d_b = convolution()
        self.x_proj_b = ReadLinear(inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj_b = ReadLinear(self.dt_rank, inner, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=False, **factory)
        self._init_weights(num_residuals)
        self.set_initial_state(initial_state)

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

    def set_initial_state(self, wanted: bool) -> None:
        """Let the scans begin with a state and a convolution tail that are parameters, or with nothing.

        `initial_state` (E, N) stands for what tokens before the first one have left in the states,
        `conv_tail` (E, K - 1) for the last inputs of the convolution among them, the latest at the end. Both
        are the same for every image; at first they are zeros, which changes nothing. A mixer keeps those that
        it has.
        """
        if wanted == (self.initial_state is not None):
            return
        shapes = self.A_log.shape, (self.A_log.shape[0], self.conv1d.kernel_size[0] - 1)
        for name, shape in zip(self.starts, (*shapes, *shapes), strict=True):
            setattr(self, name, nn.Parameter(self.A_log.new_zeros(shape)) if wanted else None)

    def starts_behind(self, tokens: Tensor) -> dict[str, Tensor]:
        """The parameters with which the scans compute what they would compute behind tokens.

        Args:
            tokens: x of the tokens that the forward direction visits first, and of those that the reverse one
                does, (2, n, E), each in the order in which they are visited.

        Returns:
            The values of the parameters of `set_initial_state`, which the mixer need not have, by name.
        """
        shape = self.A_log.shape[0], self.conv1d.kernel_size[0] - 1
        zeros = DirectionStart(torch.zeros_like(self.A_log), self.A_log.new_zeros(shape))
        starts = self._starts() or (zeros, zeros)
        values: list[Tensor] = []
        for own, weights, start in zip(tokens, self.direction_weights(), starts, strict=True):
            values += start_behind(own, weights, start)
        return dict(zip(self.starts, values, strict=True))

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

    def scan(
        self,
        xz: Tensor,
        flow: dict[str, Tensor] | None = None,
        offsets: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """All that lies between the projections, in both directions.

        Rules of adapters may surround it (`adapter_calls`).

        Args:
            xz: the output of in_proj, (B, L, 2 E).
            flow: what earlier layers hand on; the scan itself has no use for it.
            offsets: what C reads beside the states in the forward and in the reverse direction, (E, N) each.

        Returns:
            The input of out_proj, (B, L, E).
        """
        forward, reverse = self.direction_weights(offsets)
        starts = self._starts()
        if starts is None:
            return bidirectional_scan(xz, forward, reverse, self.backend)
        return bidirectional_scan_from(xz, forward, reverse, starts[0], starts[1], self.backend)

    def _starts(self) -> tuple[DirectionStart, DirectionStart] | None:
        """What the directions begin with; None for zeros."""
        state, tail = self.initial_state, self.conv_tail
        state_b, tail_b = self.initial_state_b, self.conv_tail_b
        if state is None or tail is None or state_b is None or tail_b is None:
            return None
        return DirectionStart(state, tail), DirectionStart(state_b, tail_b)

    def direction_weights(
        self, offsets: tuple[Tensor, Tensor] | None = None
    ) -> tuple[DirectionWeights, DirectionWeights]:
        """Weights of the forward and of the reverse direction, with the offsets of `scan`."""
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
            None if offsets is None else offsets[0],
        )
        reverse = DirectionWeights(
            self.conv1d_b.weight.squeeze(1),
            self.conv1d_b.bias,
            self.x_proj_b.weight,
            self.dt_proj_b.weight,
            self.dt_proj_b.bias,
            self.A_b_log,
            self.D_b,
            None if offsets is None else offsets[1],
        )
        return forward, reverse
