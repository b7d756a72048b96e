"""Scaled products with block diagonal matrices answer to the definition.

Without a GPU the kernels run in the emulator.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from kernel_checks import OPCHECKS, assert_close, assert_compiles

from vimtune.ops import BackendUnavailable, use_backend
from vimtune.ops import block_product as ops
from vimtune.ops.block_product import scaled_block_product
from vimtune.ops.nvrtc import block_product as kernels
from vimtune.ops.nvrtc import runtime

SHAPES = [
    # leading dimensions, rows, columns, columns of a block
    ((), 1, 1, 1),
    ((), 65, 40, 1),
    ((2,), 7, 6, 2),
    ((), 33, 66, 2),
    ((3,), 9, 3, 3),
    ((), 70, 51, 3),
    ((), 1, 4, 4),
    ((2, 2), 5, 8, 4),
    ((2,), 131, 72, 4),
    ((), 63, 128, 4),
    ((), 40, 85, 5),
    ((2,), 33, 108, 6),
    ((), 10, 119, 7),
    ((), 33, 8, 8),
    ((2,), 17, 136, 8),
]


def build(leading, rows, columns, size, dtype=torch.float32):
    """Weight, row scale, blocks and a gradient of the product."""
    generator = torch.Generator().manual_seed(rows + columns)
    shapes = [(rows, columns), (rows,), (columns // size, size, size), (rows, columns)]
    return [torch.randn(*leading, *shape, generator=generator).to(dtype) for shape in shapes]


def definition(weight, row_scale, blocks):
    if weight.ndim > 2:
        return torch.stack([definition(*member) for member in zip(weight, row_scale, blocks, strict=True)])
    return row_scale[:, None] * (weight + weight @ torch.block_diag(*blocks))


def with_gradients(function, tensors, grad):
    """The result, and its gradients of all tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_all_close(found, expected, tolerance=2e-6):
    for name, actual, exact in zip(("out", "weight", "row_scale", "blocks"), found, expected, strict=True):
        assert_close(actual, exact.double(), tolerance, name)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched, which want tensors to begin at a multiple of 16 bytes."""
    names = []
    load = runtime.load_kernel

    def load_watched(source, name, constants, device):
        kernel = load(source, name, constants, device)

        def launch(grid, threads, arguments, shared=0):
            assert not any(isinstance(t, torch.Tensor) and t.data_ptr() % 16 for t in arguments), name
            names.append(name)
            kernel(grid, threads, arguments, shared)

        return launch

    monkeypatch.setattr(runtime, "load_kernel", load_watched)
    return names


@pytest.fixture
def native(device, launches):
    """The product by kernels of backend `nvrtc`, for tensors that go where these are."""

    def call(*tensors):
        return scaled_block_product(*(tensor.to(device) for tensor in tensors), backend="nvrtc")

    yield call
    assert launches, "no kernel has run"


@pytest.mark.parametrize("leading, rows, columns, size", SHAPES)
def test_product_and_gradients(leading, rows, columns, size, native, device):
    *tensors, grad = build(leading, rows, columns, size)
    expected = with_gradients(definition, [t.double() for t in tensors], grad.double())
    found = with_gradients(native, tensors, grad.to(device))
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert_all_close(found, expected)


def test_a_thread_may_begin_with_our_kernels(device):
    """As those of autograd do where the backward begins with them: CUDA has no context there yet."""
    tensors = [tensor.to(device) for tensor in build((), 5, 8, 4)[:3]]
    with ThreadPoolExecutor(max_workers=1) as pool:
        found = pool.submit(kernels.scaled_block_product, *tensors).result()
    torch.testing.assert_close(found, kernels.scaled_block_product(*tensors))


@pytest.mark.parametrize("leading, rows, columns, size", [*SHAPES, ((2,), 12, 48, 16), ((), 4, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula_and_gradients(leading, rows, columns, size, dtype):
    *tensors, grad = build(leading, rows, columns, size, dtype)
    expected = with_gradients(definition, [t.double() for t in tensors], grad.double())
    found = with_gradients(scaled_block_product, tensors, grad)
    assert all(tensor.dtype == dtype for tensor in found)
    assert_all_close(found, expected, 1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("rows, columns, size", [(300, 72, 4), (130, 24, 6)])
def test_gradients_of_many_rows_come_from_several_tiles(rows, columns, size, native, device, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH", 12)
    *tensors, grad = build((2,), rows, columns, size)
    expected = with_gradients(definition, [t.double() for t in tensors], grad.double())
    assert_all_close(with_gradients(native, tensors, grad.to(device)), expected)


@pytest.mark.parametrize(
    "rows, step, others", [(768, 32, 72), (192, 32, 144), (1, 32, 1), (1 << 20, 32, 1), (33, 16, 9999)]
)
def test_tiles_cover_the_rows_and_are_not_many(rows, step, others):
    tile_rows, tiles = kernels.row_tiling(rows, step, others)
    assert tile_rows % step == 0
    assert tile_rows * (tiles - 1) < rows <= tile_rows * tiles
    assert tiles == 1 or tiles * others <= kernels.ENOUGH
    assert tiles * others > kernels.ENOUGH / 2 or tile_rows == step


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_the_order_of_threads_and_blocks_changes_no_bit(size, in_both_orders, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH", 12)
    *tensors, grad = build((2,), 70, 24 * size, size)

    def run():
        gradients = kernels.scaled_block_product_backward(grad, *tensors, True, True)
        return [kernels.scaled_block_product(*tensors), *gradients]

    for one, other in zip(*in_both_orders(run), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", [w for w in product([False, True], repeat=3) if any(w)])
def test_only_wanted_gradients_are_computed(wanted, native, device, launches):
    *tensors, grad = build((2,), 20, 24, 4)
    expected = with_gradients(definition, tensors, grad)[1:]
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, wanted, strict=True)]
    out = native(*leaves)
    launches.clear()
    out.backward(grad.to(device))
    backward = ["scaled_block_product_backward"] * any(wanted[1:])
    assert launches == ["scaled_block_product"] * wanted[0] + backward
    for leaf, exact, need in zip(leaves, expected, wanted, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, exact, rtol=1e-5, atol=1e-5)
    if any(wanted[1:]):
        inputs = [tensor.to(device) for tensor in (grad, *tensors)]
        found = kernels.scaled_block_product_backward(*inputs, *wanted[1:])
        assert [gradient.numel() > 0 for gradient in found] == list(wanted[1:])


@pytest.mark.parametrize("in_dims", [d for d in product([0, 1, None], repeat=3) if d != (None,) * 3])
def test_under_vmap_it_is_one_product_for_all(in_dims, native, device, launches):
    *tensors, grad = build((3,), 5, 8, 4)
    stacks = [
        tensor[0] if dim is None else tensor.movedim(0, dim)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]

    def one_by_one(*stacks):
        members = (
            [t if dim is None else t.select(dim, k) for t, dim in zip(stacks, in_dims, strict=True)]
            for k in range(3)
        )
        return torch.stack([definition(*member) for member in members])

    found = with_gradients(torch.func.vmap(native, in_dims=in_dims), stacks, grad.to(device))
    assert_all_close(found, with_gradients(one_by_one, stacks, grad))
    assert launches == ["scaled_block_product"] * 2 + ["scaled_block_product_backward"]


def test_vmap_of_vmap(native, device):
    *tensors, grad = build((2, 3), 5, 8, 2)
    found = with_gradients(torch.func.vmap(torch.func.vmap(native)), tensors, grad.to(device))
    assert_all_close(found, with_gradients(definition, tensors, grad))


def test_it_is_one_graph_for_the_compiler(native, device):
    *tensors, grad = build((2,), 5, 8, 4)
    compiled = torch.compile(native, backend="aot_eager", fullgraph=True)
    assert_all_close(
        with_gradients(compiled, tensors, grad.to(device)), with_gradients(definition, tensors, grad)
    )


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_operators_keep_what_torch_expects_of_them(needs, device):
    *tensors, grad = (tensor.to(device) for tensor in build((2,), 5, 8, 4))
    torch.library.opcheck(ops._product, (*tensors, "nvrtc"), test_utils=OPCHECKS)
    torch.library.opcheck(ops._backward, (grad, *tensors, *needs, "nvrtc"), test_utils=OPCHECKS)


def test_tensors_may_lie_anywhere(native, device):
    """Kernels read 16 bytes at once: slices that begin elsewhere, and those with gaps, are copied."""
    *tensors, grad = build((2,), 5, 8, 4)
    expected = with_gradients(definition, tensors, grad)

    def misplaced(tensor):
        buffer = torch.full((tensor.numel() + 1,), float("nan"), device=device)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)

    def with_gaps(tensor):
        buffer = torch.full((*tensor.shape, 2), float("nan"), device=device)
        buffer[..., 1] = tensor
        return buffer[..., 1]

    for place in (misplaced, with_gaps):
        found = with_gradients(lambda *t, place=place: native(*map(place, t)), tensors, place(grad))
        assert_all_close(found, expected)


@pytest.mark.parametrize(
    "size, dtype", [(kernels.MAX_BLOCK + 1, torch.float32), (4, torch.float64), (4, torch.bfloat16)]
)
def test_what_kernels_do_not_take_is_the_formula(size, dtype, on_cpu, launches):
    tensors = build((2,), 5, 2 * size, size, dtype)[:3]
    found = scaled_block_product(*tensors, backend="nvrtc")
    assert found.dtype == dtype
    assert torch.equal(found, scaled_block_product(*tensors, backend="reference"))
    assert not launches


@pytest.mark.parametrize("leading, rows, columns", [((), 0, 8), ((), 5, 0), ((0,), 5, 8)])
@pytest.mark.parametrize("transform", [lambda product: product, torch.func.vmap])
def test_nothing_to_do(leading, rows, columns, transform, on_cpu):
    if transform is torch.func.vmap and not leading:
        pytest.skip("no dimension to map over")
    *tensors, grad = build(leading, rows, columns, 4)
    product = transform(lambda *t: scaled_block_product(*t, backend="nvrtc"))
    found = with_gradients(product, tensors, grad)
    assert [value.shape for value in found] == [value.shape for value in (grad, *tensors)]
    assert not found[3].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the backend is available")
def test_a_backend_for_scans_does_not_forbid_the_formula():
    tensors = build((), 5, 8, 4)[:3]
    with use_backend("nvrtc"):
        assert torch.equal(
            scaled_block_product(*tensors), scaled_block_product(*tensors, backend="reference")
        )
    with pytest.raises(BackendUnavailable):
        scaled_block_product(*tensors, backend="nvrtc")


def test_tensors_on_several_devices_are_an_error_and_not_a_launch(native):
    """A kernel would take the address of one for that of the other."""
    weight, row_scale, blocks, _ = build((), 5, 8, 4)
    native(weight, row_scale, blocks)
    with pytest.raises(ValueError, match="blocks is on meta"):
        scaled_block_product(weight, row_scale, blocks.to("meta"), backend="nvrtc")


@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 4, 4), (2, 0, 0), (1, 2, 4, 4), (1, 5, 5), (4, 4), ()])
def test_blocks_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"blocks are .*expected \(..., n, b, b\) with n b = 8"):
        scaled_block_product(torch.ones(5, 8), torch.ones(5), torch.ones(shape))


@pytest.mark.parametrize("shape", [(1,), (8,), (5, 1), ()])
def test_a_row_scale_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"row_scale is .*expected \(5,\)"):
        scaled_block_product(torch.ones(5, 8), torch.ones(shape), torch.ones(2, 4, 4))


@pytest.mark.parametrize("size", range(1, kernels.MAX_BLOCK + 1))
@pytest.mark.parametrize("second", [0, 1])
def test_sources_compile_without_a_gpu(size, second, nvrtc):
    """Each size with and without each gradient, and for both architectures."""
    wanted = (second, second if size % 2 else 1 - second)
    ahead = kernels._rows_ahead(size) // (2 if any(wanted) else 1)
    constants = (("SIZE", size), ("AHEAD", ahead), *zip(("WANT_SCALE", "WANT_BLOCKS"), wanted, strict=True))
    assert_compiles(kernels.SOURCE, constants, [("sm_80", "sm_90")[second]])
