"""Derivatives of operations by all ways that torch has are those of the definition, or an error: never 0.

What runs in Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch import func
from torch.autograd import forward_ad, functional
from torch.utils._pytree import tree_leaves

from vimtune import ops
from vimtune.models.mixer import BiMambaMixer

HINT = 'use_backend("reference")'
HAS_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, L, E, N, K, R = 2, 3, 4, 2, 3, 1


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scan_tensors():
    sequences = [normal(B, L, width, seed=width) for width in (E, E, N, N, E)]
    u, delta, B_, C, z = sequences
    return [u, delta, -normal(E, N).exp(), B_, C, normal(E), z, normal(E, seed=1)]


def weights_of_directions(directions=2, offset=False):
    shapes = ((E, K), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,), *[(E, N)] * offset)
    return [normal(*shape, seed=seed) / 2 for seed in (0, 9)[:directions] for shape in shapes]


def both_directions(function, xz, *weights):
    half = len(weights) // 2
    directions = [ops.DirectionWeights(*own) for own in (weights[:half], weights[half:])]
    return function(xz, *directions)


def one_direction(function, xz, *weights):
    return function(xz, ops.DirectionWeights(*weights))


def norm(*tensors, backend):
    normed, total = ops.add_rms_norm(*tensors, backend=backend)
    return torch.cat([normed, total])


def scan(*tensors, backend):
    return ops.selective_scan(*tensors, delta_softplus=True, backend=backend)


def filter_(*tensors, backend):
    return ops.causal_conv1d(*tensors, silu=True, backend=backend)


def gated_norm(*tensors, backend):
    return ops.gated_rms_norm(*tensors, 1, 1e-5, backend)


def silu_pair_tensors():
    return [tensor for seed in (2, 3) for tensor in (normal(B, L, E, seed=seed), normal(E, seed=seed))]


def membrane(x, start, backend):
    options = {"first": 1, "width": E, "chunks": 2, "length": 1, "tau": 0.9, "threshold": 0.4}
    result, mean = ops.membrane(x, start, **options, backend=backend)
    return torch.cat([result[..., :E], mean], 1)


def silu_pair(*tensors, backend):
    return ops.add_silu_pair(*tensors, 1, backend)


def losses(*logits, backend):
    """Those of two sets of logits, because there is no other tensor to be differentiated."""
    return torch.cat([_losses(each, backend) for each in logits])


def _losses(logits, backend):
    labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    return ops.token_losses(logits, torch.where(labels == 1, -100, labels), backend=backend)


# By name: what runs in the kernels of a backend, the definition, and the tensors.
CASES = {
    **{
        f"{name} {backend}": (
            partial(function, backend=backend),
            partial(function, backend="reference"),
            tensors,
        )
        for backend in ("torch", "cpu", "triton")
        for name, function, tensors in (
            ("selective_scan", scan, scan_tensors),
            ("causal_conv1d", filter_, lambda: [normal(B, L, E), normal(E, K), normal(E)]),
        )
    },
    "add_rms_norm triton": (
        partial(norm, backend="triton"),
        partial(norm, backend="reference"),
        lambda: [normal(B, L, E), normal(B, L, E, seed=1), normal(E)],
    ),
    **{
        f"gated_rms_norm {backend}": (
            partial(gated_norm, backend=backend),
            partial(gated_norm, backend="reference"),
            lambda: [normal(B, L, E), normal(B, L, E, seed=1), normal(E)],
        )
        for backend in ("torch", "triton")
    },
    "membrane triton": (
        partial(membrane, backend="triton"),
        partial(membrane, backend="reference"),
        lambda: [normal(B, L, 2 * E), normal(B, L // 2, E)],
    ),
    "add_silu_pair triton": (
        partial(silu_pair, backend="triton"),
        partial(silu_pair, backend="reference"),
        lambda: [normal(B, L, E, seed=1), *silu_pair_tensors()],
    ),
    "token_losses triton": (
        partial(losses, backend="triton"),
        partial(losses, backend="reference"),
        lambda: [normal(3, 7), normal(2, 7, seed=1)],
    ),
    "bidirectional_scan triton": (
        partial(both_directions, partial(ops.bidirectional_scan, backend="triton")),
        partial(both_directions, partial(ops.bidirectional_scan, backend="reference")),
        lambda: [normal(B, L, 2 * E), *weights_of_directions()],
    ),
    "causal_mixer triton": (
        partial(one_direction, partial(ops.causal_mixer, backend="triton")),
        partial(one_direction, partial(ops.causal_mixer, backend="reference")),
        lambda: [normal(B, L, 2 * E), *weights_of_directions(1)],
    ),
    "scaled_block_product nvrtc": (
        partial(ops.scaled_block_product, backend="nvrtc"),
        partial(ops.scaled_block_product, backend="reference"),
        lambda: [normal(3, 4), normal(3), normal(2, 2, 2)],
    ),
}


def loss(function):
    return lambda *tensors: function(*tensors).sin().sum()


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def tangents(tensors):
    return tuple(torch.linspace(-1, 1, t.numel()).to(t).view(t.shape) for t in tensors)


def dual(function, tensors, wanted=lambda index: True, prepare=lambda tensor: tensor):
    with forward_ad.dual_level():
        inputs = [
            forward_ad.make_dual(prepare(tensor), tangent) if wanted(index) else tensor
            for index, (tensor, tangent) in enumerate(zip(tensors, tangents(tensors), strict=True))
        ]
        return forward_ad.unpack_dual(function(*inputs)).tangent.detach()


def dual_backward(function, tensors):
    """Forward over reverse: the gradient that comes in is dual."""
    inputs = leaves(tensors)
    out = function(*inputs)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), tangents([out])[0])
        return [forward_ad.unpack_dual(found).tangent for found in torch.autograd.grad(out, inputs, grad)]


def penalty(function, tensors, wanted=lambda index: True):
    """Of the gradients, as of WGAN-GP."""
    inputs = [t.clone().requires_grad_(wanted(index)) for index, t in enumerate(tensors)]
    trained = [t for t in inputs if t.requires_grad]
    gradients = torch.autograd.grad(loss(function)(*inputs), trained, create_graph=True)
    return torch.autograd.grad(sum(found.square().sum() for found in gradients), trained)


def gradients_of_batches(function, tensors, over):
    inputs = leaves(tensors)
    out = function(*inputs)
    return over(out, inputs, torch.stack([torch.ones_like(out), tangents([out])[0]]))


def over_grads(out, inputs, batch):
    return torch.autograd.grad(out, inputs, batch, is_grads_batched=True)


def over_vmap(out, inputs, batch):
    return func.vmap(lambda grad: torch.autograd.grad(out, inputs, grad, retain_graph=True))(batch)


def stacked(tensors, times=1.0):
    return [torch.stack([tensor, times * tensor]) for tensor in tensors]


def mapped_gradients(function, tensors):
    """Ordinary gradients of what vmap has mapped."""
    inputs = leaves(stacked(tensors, 0.5))
    return torch.autograd.grad(loss(func.vmap(function))(*inputs), inputs)


def of_first(function, tensors):
    return lambda tensor: function(tensor, *tensors[1:])


TRANSFORMATIONS = {
    "jvp": lambda f, t: func.jvp(f, tuple(t), tangents(t))[1],
    "jvp of the first": lambda f, t: func.jvp(of_first(f, t), (t[0],), tangents(t[:1]))[1],
    "jvp of the last": lambda f, t: func.jvp(lambda x: f(*t[:-1], x), (t[-1],), tangents(t[-1:]))[1],
    "jvp of vmap": lambda f, t: func.jvp(func.vmap(f), tuple(stacked(t)), tangents(stacked(t)))[1],
    "linearize": lambda f, t: func.linearize(f, *t)[1](*tangents(t)),
    "dual": dual,
    "dual and trained": lambda f, t: dual(f, t, prepare=lambda x: x.clone().requires_grad_()),
    "dual weights": lambda f, t: dual(f, t, wanted=lambda index: index > 0),
    "dual gradient": dual_backward,
    "jacfwd": lambda f, t: func.jacfwd(f, argnums=len(t) - 1)(*t),
    "jacobian forward": lambda f, t: functional.jacobian(
        of_first(f, t), t[0], False, False, True, "forward-mode"
    ),
    "jacrev": lambda f, t: func.jacrev(f, argnums=len(t) - 1)(*t),
    "grad": lambda f, t: func.grad(loss(f), argnums=tuple(range(len(t))))(*t),
    "vjp": lambda f, t: func.vjp(f, *t)[1](torch.ones_like(f(*t))),
    "gradients of members": lambda f, t: func.vmap(func.grad(loss(f)), (0,) + (None,) * (len(t) - 1))(
        stacked(t, 0.5)[0], *t[1:]
    ),
    "grad of vmap": lambda f, t: func.grad(loss(func.vmap(f)))(*stacked(t, 0.5)),
    "hessian": lambda f, t: func.hessian(loss(f), argnums=len(t) - 1)(*t),
    "jvp of grad": lambda f, t: func.jvp(func.grad(loss(of_first(f, t))), (t[0],), tangents(t[:1]))[1],
    "penalty": penalty,
    "penalty of weights": lambda f, t: penalty(f, t, wanted=lambda index: index > 0),
    "hvp": lambda f, t: functional.hvp(loss(of_first(f, t)), t[0], tangents(t[:1])[0])[1],
    "batches of gradients": partial(gradients_of_batches, over=over_grads),
    "jacobian vectorized": lambda f, t: functional.jacobian(of_first(f, t), t[0], vectorize=True),
    "vmap": lambda f, t: func.vmap(f)(*stacked(t, 0.5)),
    "vmap of one": lambda f, t: func.vmap(f, (1,) + (None,) * (len(t) - 1))(
        torch.stack([t[0], -t[0]], 1), *t[1:]
    ),
    "vmap of vmap": lambda f, t: func.vmap(func.vmap(f))(*stacked(stacked(t, 0.5))),
    "gradients of vmap": mapped_gradients,
    "vmap of gradients": partial(gradients_of_batches, over=over_vmap),
    "jacobian": lambda f, t: functional.jacobian(of_first(f, t), t[0]),
}
ALWAYS_RIGHT = ("vmap", "vmap of one", "vmap of vmap", "gradients of vmap", "vmap of gradients", "jacobian")
# What is tried of the kernels that the interpreter of Triton takes long for, where there is no GPU.
FOR_TRITON = ("jvp", "grad", "dual gradient", "penalty of weights", "gradients of vmap")


@pytest.fixture(params=CASES)
def case(request):
    """Kernels, definition, tensors, and whether this is slow."""
    backend = request.param.split()[1]
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 set before Python starts")
    if backend == "nvrtc":
        request.getfixturevalue("on_cpu")
    kernels, definition, tensors = CASES[request.param]
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    dtype = torch.float64 if backend == "torch" else torch.float32
    slow = backend == "triton" and device == "cpu"
    if slow:
        from vimtune.ops.triton import launch

        tiling = launch.Tiling(forward_steps=4, backward_steps=4, chunk=8)
        request.getfixturevalue("monkeypatch").setattr(launch, "TILING", tiling)
    return kernels, definition, [tensor.to(device, dtype) for tensor in tensors()], slow


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_right_or_an_error_that_says_so(case, transformation):
    kernels, definition, tensors, slow = case
    if slow and transformation not in FOR_TRITON:
        pytest.skip("slow in Triton's interpreter")
    compute = TRANSFORMATIONS[transformation]
    try:
        found = tree_leaves(compute(kernels, tensors))
    except NotImplementedError as error:
        assert HINT in str(error)
        assert transformation not in ALWAYS_RIGHT
        return
    expected = tree_leaves(compute(definition, [tensor.double() for tensor in tensors]))
    tolerance = 1e-10 if tensors[0].dtype == torch.float64 else 1e-5
    for actual, exact in zip(found, expected, strict=True):
        assert actual.shape == exact.shape
        assert exact.any()
        torch.testing.assert_close(
            actual.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item()
        )


HEADS = 2


def ssd_tensors():
    """x, dt, A, B, C, D, dt_bias and the state of Mamba-2's scan."""
    shapes = [(B, L, HEADS, E), (B, L, HEADS), (HEADS,), *[(B, L, 1, N)] * 2, (HEADS,), (HEADS,)]
    return [normal(*shape) for shape in [*shapes, (B, HEADS, E, N)]]


def ssd_mixer_tensors():
    """The output of in_proj, the six weights of Mamba-2's mixer, and a mask."""
    inner = HEADS * E
    wide, vectors = inner + 2 * N, [(HEADS,)] * 3
    shapes = [(B, L, inner + wide + HEADS), (wide, K), (wide,), *vectors, (inner,), (B, L, 1)]
    return [normal(*shape) for shape in shapes]


SSD_MIXER_OPTIONS = [1, 1, 1e-5, 0.0, 1.0, "torch", "torch", "torch"]

# Each operation as torch.library knows it: its arguments, which need to have the right kinds only.
ARGUMENTS = {
    "selective_scan": lambda: [*scan_tensors(), True, False, "torch", True],
    "selective_scan_backward": lambda: [
        *(normal(B, L, E), normal(1, B, E, N), *scan_tensors(), True, False, "torch", [True] * 8)
    ],
    "stateful_scan": lambda: [*scan_tensors(), normal(B, E, N), True, False, "torch", True],
    "stateful_scan_backward": lambda: [
        *(normal(B, L, E), normal(B, E, N), normal(1, B, E, N), *scan_tensors(), normal(B, E, N)),
        *(True, False, "torch", [True] * 9),
    ],
    "ssd": lambda: [*ssd_tensors(), True, 0.0, 1.0, "torch"],
    "ssd_backward": lambda: [
        *(normal(B, L, HEADS, E), normal(B, HEADS, E, N), *ssd_tensors(), True, 0.0, 1.0, "torch", [True] * 8)
    ],
    "ssd_mixer": lambda: [*ssd_mixer_tensors(), *SSD_MIXER_OPTIONS],
    "ssd_mixer_backward": lambda: [
        *(normal(B, L, HEADS * E), *ssd_mixer_tensors(), *SSD_MIXER_OPTIONS, [True] * 7)
    ],
    "causal_conv1d": lambda: [normal(B, L, E), normal(E, K), normal(E), True, False, "torch"],
    "causal_conv1d_backward": lambda: [
        *(normal(B, L, E), normal(B, L, E), normal(E, K), normal(E), True, False, "torch", [True] * 3)
    ],
    "bidirectional_scan": lambda: [normal(B, L, 2 * E), *weights_of_directions(2, True), True, "triton"],
    "bidirectional_scan_from": lambda: [
        *(normal(B, L, 2 * E), *weights_of_directions(2, True)),
        *(normal(E, N), normal(E, K - 1), normal(E, N), normal(E, K - 1), "torch"),
    ],
    "causal_mixer": lambda: [normal(B, L, 2 * E), *weights_of_directions(1, True), True, "triton"],
    "causal_prompt": lambda: [normal(B, L, 2 * E), *weights_of_directions(1, True), "nvrtc"],
    "mixer_backward": lambda: [
        *(normal(B, L, E), normal(B, L, 2 * E), normal(B, L, E), normal(2, B, L, 4), normal(4)),
        *(weights_of_directions(2, True), [True] * 17, "triton"),
    ],
    "add_rms_norm": lambda: [normal(B, L, E), normal(B, L, E), normal(E), 1e-5, torch.float32, "triton"],
    "add_rms_norm_backward": lambda: [
        *(normal(B, L, E), normal(B, L, E), normal(B, L, E), normal(E), normal(B * L), torch.float32, True),
        "triton",
    ],
    "gated_rms_norm": lambda: [normal(B, L, E), normal(B, L, E), normal(E), 1, 1e-5, "torch"],
    "gated_rms_norm_backward": lambda: [
        *(normal(B, L, E), normal(B, L, E), normal(B, L, E), normal(E), 1, 1e-5, "torch", [True] * 3)
    ],
    "membrane": lambda: [normal(B, L, 2 * E), normal(B, 1, E), 0, E, 2, 1, 0.9, 1.0, "triton"],
    "membrane_backward": lambda: [
        *(normal(B, L, 2 * E), normal(B, 1, E), normal(B, L, 2 * E), 0, E, 2, 1, 0.9, 1.0, "triton"),
        [True] * 2,
    ],
    "add_silu_pair": lambda: [normal(B, L, E), *silu_pair_tensors(), 1, "triton"],
    "add_silu_pair_backward": lambda: [normal(B, L, E), *silu_pair_tensors(), 1, "triton", [True] * 4],
    "token_losses": lambda: [normal(3, 7), normal(3), "triton"],
    "token_losses_backward": lambda: [normal(3), normal(3, 7), normal(3), normal(3), "triton"],
    "scaled_block_product": lambda: [normal(3, 4), normal(3), normal(2, 2, 2), "nvrtc"],
    "scaled_block_product_backward": lambda: [
        *(normal(3, 4), normal(3, 4), normal(3), normal(2, 2, 2), True, True, "nvrtc")
    ],
}


def test_every_operation_is_among_these():
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {name.removeprefix("vimtune::") for name in names if name.startswith("vimtune::")} == {*ARGUMENTS}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("way", ["jvp", "dual", "grad"])
def test_no_tensor_of_any_operation_is_overlooked(name, way):
    """Without a kernel: the refusal comes before."""
    arguments = ARGUMENTS[name]()
    places = [(i, None) for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
    places += [(i, j) for i, value in enumerate(arguments) if type(value) is list for j, x in enumerate(value)
               if isinstance(x, torch.Tensor)]  # fmt: skip

    def call(tensor, i, j):
        changed = list(arguments)
        if j is None:
            changed[i] = tensor
        else:
            changed[i] = [*changed[i][:j], tensor, *changed[i][j + 1 :]]
        found = tree_leaves(getattr(torch.ops.vimtune, name)(*changed))
        return found[0].sum()

    for i, j in places:
        tensor = arguments[i] if j is None else arguments[i][j]
        function = partial(call, i=i, j=j)
        compute = {
            "jvp": lambda x=tensor, f=function: func.jvp(f, (x,), (x,)),
            "dual": lambda x=tensor, f=function: dual(f, [x]),
            "grad": lambda x=tensor, f=function: func.grad(f)(x),
        }[way]
        with pytest.raises(NotImplementedError) as caught:
            compute()
        assert HINT in str(caught.value) and f"vimtune::{name} " in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_what_a_transformation_leaves_alone_is_computed(backend):
    """As a frozen backbone below a head that is differentiated."""
    tensors = scan_tensors()
    out = scan(*tensors, backend=backend)
    weight, tangent = normal(E), normal(E, seed=1)
    found = func.jvp(lambda w: scan(*tensors, backend=backend) * w, (weight,), (tangent,))[1]
    torch.testing.assert_close(found, out * tangent)
    trained = leaves(tensors)
    found = func.grad(lambda w: (scan(*trained, backend=backend) * w).sum())(weight)
    torch.testing.assert_close(found, out.sum((0, 1)))


def plain_scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> torch.Tensor:
    return ops.selective_scan(u, delta, A, B, C)


class PlainScan(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return plain_scan(u, delta, A, B, C)


GRAPHS = {
    "fx": lambda example: torch.fx.symbolic_trace(plain_scan),
    "script": lambda example: torch.jit.script(plain_scan),
    "trace": lambda example: torch.jit.trace(plain_scan, example, check_trace=False),
    "export": lambda example: torch.export.export(PlainScan(), example).module(),
    "compile": lambda example: torch.compile(plain_scan, backend="aot_eager"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_of_operations_refuse_as_well(graph):
    torch._dynamo.reset()
    tensors = tuple(scan_tensors()[:5])
    function = GRAPHS[graph](tensors)
    torch.testing.assert_close(function(*tensors), plain_scan(*tensors))
    for compute in (dual, TRANSFORMATIONS["jvp"]):
        with pytest.raises((NotImplementedError, RuntimeError), match="no forward-mode derivatives"):
            compute(function, tensors)


def test_the_way_out_that_the_message_names():
    """A mixer within `use_backend("reference")` has derivatives of all kinds and orders."""
    mixer = BiMambaMixer(4, d_state=2, backend="auto").double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    hidden = normal(1, L, 4).double()
    with ops.use_backend("reference"):
        tangent = tangents([hidden])[0]
        found = func.jvp(mixer, (hidden,), (tangent,))[1]
        step = 1e-6 * tangent
        torch.testing.assert_close(
            found, (mixer(hidden + step) - mixer(hidden - step)).detach() / 2e-6, atol=1e-8, rtol=1e-6
        )
        assert torch.autograd.gradgradcheck(mixer, [hidden.requires_grad_()])
