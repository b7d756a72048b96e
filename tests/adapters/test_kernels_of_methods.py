"""Every method on the kernels of GPUs, which compute what the definitions compute.

Those written in Triton run without a GPU, too, if TRITON_INTERPRET=1 is set before Python starts.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import timm
import torch
from method_cases import disturb, options_for
from torch import Tensor, nn

import vimtune
from vimtune.adapters import CallRule, Method, adapter_parameters
from vimtune.methods import list_methods
from vimtune.testing.methods import MethodCase, build_test_model, check_backends

INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def build_smallest_model() -> nn.Module:
    """One layer that sees four patches: Triton's interpreter takes a second for each."""
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=1, img_size=16)


def images(count: int, size: int) -> tuple[Tensor]:
    return (torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3)),)


def meets_the_kernels(case: MethodCase) -> bool:
    """Whether a method surrounds calls or changes the number of states; others give kernels other numbers
    alone."""
    changes_shapes = any(type(method).merged_options is not Method.merged_options for method in case.methods)
    return changes_shapes or any(isinstance(module, CallRule) for module in case.adapted().modules())


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and TRITON_INTERPRET=1 set before Python starts")
def test_in_the_interpreter_of_triton_methods_around_the_scan_give_what_the_definition_gives():
    checked = []
    for name in list_methods():
        options = options_for(name, {})
        case = MethodCase(name, options, build_smallest_model, lambda: images(1, 16))
        if meets_the_kernels(case):
            check_backends(case)
            checked.append(name)
    assert {"affix", "prompt", "additional_scan", "memba", "svp", "state_offset"} <= set(checked)
    assert "lora" not in checked


@pytest.mark.gpu
@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("backend", ["nvrtc", "triton"])
def test_on_a_gpu_the_kernels_stay_and_steps_replay(method, backend):
    """Every backend gives what the definition gives, and a step is replayed as a CUDA graph."""
    model = vimtune.inject(build_test_model(), method, **options_for(method, {}))
    model = disturb(model).cuda().train()
    (inputs,) = images(3, 32)
    inputs = inputs.cuda()
    tensors = [item.parameter for item in adapter_parameters(model)]

    def step(backend: str) -> list[Tensor]:
        for block in model.layers:
            block.mixer.backend = backend
        with torch.autocast("cuda", torch.bfloat16):
            output = model(inputs)
        gradients = torch.autograd.grad(output.float().square().sum(), tensors)
        return [output.detach().float(), *gradients]  # no graph outlives the step: a capture would meet it

    expected = step("reference")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager = step(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = step(backend)
    graph.replay()
    torch.cuda.synchronize()
    for own, replayed, definition in zip(eager, recorded, expected, strict=True):
        torch.testing.assert_close(replayed, own, atol=1e-5, rtol=1e-4)
        assert (own - definition).norm() <= 0.05 * definition.norm() + 1e-4
