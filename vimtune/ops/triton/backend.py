"""Backend `triton`: the four kernels of the backend protocol on NVIDIA GPUs (or Triton's interpreter).

Importable without Triton: the kernels are imported when first used.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from vimtune.ops.dispatch import Backend

CHUNK = 64
"""Steps between the states that the forward keeps."""


class TritonBackend(Backend):
    name = "triton"
    summary = "Triton kernels for NVIDIA GPUs"
    has_fused_kernels = True

    def refusals(self, device):
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("the package 'triton' is not installed")
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return reasons
        if device.type != "cuda":
            reasons.append(f"device is {device.type}, the kernels need cuda (or TRITON_INTERPRET=1)")
        elif torch.version.cuda is None or not torch.cuda.is_available():
            reasons.append("torch has no usable CUDA device")
        elif torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append(f"compute capability {torch.cuda.get_device_capability(device)} is below (8, 0)")
        return reasons

    def states_shape(self, batch, tokens, inner, states):
        return (1, batch, torch.sym_max(-(-tokens // CHUNK) - 1, 0), states, inner)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, options, save_states):
        from vimtune.ops.triton import launch

        out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        inputs = _inputs(u, delta, A, B, C, D, delta_bias, options)
        return out, launch.scan_forward(inputs, z, out, 1.0, save_states)

    def scan_backward(self, grad, states, u, delta, A, B, C, D, z, delta_bias, options, needs):
        from vimtune.ops.triton import launch

        need_u, need_delta, need_A, need_B, need_C, need_D, need_z, need_bias = needs
        inputs = _inputs(u, delta, A, B, C, D, delta_bias, options)
        wanted = launch.ScanNeeds(need_u, need_delta, need_A, need_B or need_C, need_D, need_z, need_bias)
        before_gate = grad if z is None else launch.gate_gradient(grad, z, 1.0)
        gradients = launch.scan_backward(inputs, before_gate, states, wanted)
        grad_B = grad_C = grad_z = None
        if need_B or need_C:
            num_states = A.shape[1]
            blocks = gradients.BC[0]
            padded = blocks.shape[-1] // 2
            grad_B = blocks[..., :num_states].sum(0).to(B.dtype) if need_B else None
            grad_C = blocks[..., padded : padded + num_states].sum(0).to(C.dtype) if need_C else None
        if need_z:
            grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
            launch.gate_finish(grad, z, gradients.y, grad_z, 1.0)
        return (
            gradients.u[0] if need_u else None,
            gradients.delta[0] if need_delta else None,
            gradients.A[0].to(A.dtype) if need_A else None,
            grad_B,
            grad_C,
            gradients.D[0].to(D.dtype) if need_D else None,
            grad_z,
            gradients.bias[0].to(delta_bias.dtype) if need_bias else None,
        )

    def conv_forward(self, x, weight, bias, silu, reverse):
        from vimtune.ops.triton import convolution

        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        convolution.convolve(x, convolution.transposed(weight), bias, out, silu, reverse)
        return out

    def conv_backward(self, grad, x, weight, bias, silu, reverse, needs):
        from vimtune.ops.triton import convolution

        return convolution.conv_backward(grad, x, weight, bias, silu, reverse, needs)


def _inputs(u, delta, A, B, C, D, delta_bias, options):
    from vimtune.ops.triton.launch import Direction, ScanInputs

    return ScanInputs(
        u,
        delta,
        B,
        C,
        [Direction(A.contiguous(), D, delta_bias)],
        first=int(options.reverse),
        softplus=options.delta_softplus,
        raw=True,
        from_log=False,
    )
