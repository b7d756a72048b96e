"""The inside of a mixer of Vim or Mamba as its paper has it, one token after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_scan(xz: Tensor, mixer, suffix: str = "", offset: Tensor | None = None) -> Tensor:
    """y of one direction, from the first token to the last: (B, L, 2 E) to (B, L, E).

    The parameters are those of `mixer` whose names end with `suffix`. `offset` (E, N) is added to the state
    wherever it is read.
    """
    conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    A_log, D = (mixer.A_log, mixer.D) if not suffix else (mixer.A_b_log, mixer.D_b)
    x, z = xz.chunk(2, -1)
    u = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
    states = A_log.shape[1]
    projected = u @ x_proj.weight.T
    dt, B, C = projected.split([projected.shape[-1] - 2 * states, states, states], -1)
    dt = F.softplus(dt @ dt_proj.weight.T + dt_proj.bias)
    s = torch.zeros(x.shape[0], x.shape[2], states)
    ys = []
    for t in range(x.shape[1]):
        decay, step = torch.exp(dt[:, t, :, None] * -torch.exp(A_log)), dt[:, t] * u[:, t]
        s = decay * s + step[..., None] * B[:, t, None]
        read = s if offset is None else s + offset
        ys.append((read * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1) * F.silu(z)
