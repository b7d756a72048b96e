"""Choosing a backend: of this thread, of the process, for the compiler, and for a backward pass elsewhere."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vimtune  # noqa: F401  (registers the models)
from vimtune import backends, ops
from vimtune.ops import dispatch
from vimtune.ops.backend import Backend
from vimtune.ops.eager.convolution import EagerConvolution
from vimtune.ops.eager.scan import EagerScan
from vimtune.ops.nvrtc.backend import NvrtcBackend
from vimtune.recipe import Recipe, RecipeError

NAMES = ["torch", "reference", "auto"]


def chosen() -> str:
    return dispatch.chosen_backend("auto")


@pytest.fixture(autouse=True)
def nothing_chosen():
    assert chosen() == "auto"
    yield
    ops.set_backend("auto")


class RecordedScan(EagerScan):
    """Plain PyTorch with a layout of saved states that no other backend reads."""

    def __init__(self, calls):
        self.calls = calls

    def states_shape(self, *sizes):
        return (*super().states_shape(*sizes), 1)

    def forward(self, *inputs):
        self.calls.append("forward")
        out, states, last = super().forward(*inputs)
        return out, states[..., None] if states.numel() else states, last

    def backward(self, grad, grad_last, states, *inputs):
        self.calls.append("backward")
        return super().backward(grad, grad_last, states[..., 0], *inputs)


class RecordedConvolution(EagerConvolution):
    def __init__(self, calls):
        self.calls = calls

    def forward(self, *inputs):
        self.calls.append("conv forward")
        return super().forward(*inputs)

    def backward(self, *inputs):
        self.calls.append("conv backward")
        return super().backward(*inputs)


class Recorded(Backend):
    """A backend that notes which of its kernels run."""

    name = "recorded"
    summary = "notes what runs"

    def __init__(self):
        self.calls = []
        self.kernels = (RecordedScan(self.calls), RecordedConvolution(self.calls))

    def refusals(self, device):
        return []


@pytest.fixture
def recorded(backends):
    backend = Recorded()
    backends(backend)
    return backend


def scan(backend="auto"):
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(1, 5, n, generator=generator, requires_grad=True) for n in (4, 4, 2, 2))
    return ops.selective_scan(u, delta, -torch.ones(4, 2), B, C, backend=backend), (u, delta, B, C)


def convolve():
    x = torch.randn(1, 5, 4, requires_grad=True)
    return ops.causal_conv1d(x, torch.randn(4, 3)), (x,)


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_threads_that_are_inside_at_once_do_not_see_each_other():
    turns = threading.Barrier(2)

    def run(name):
        with ops.use_backend(name):
            turns.wait(timeout=60)
            inside = chosen()
            turns.wait(timeout=60)
        return inside, chosen()

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(run, name) for name in ("torch", "reference")]
        assert [task.result(timeout=60) for task in tasks] == [("torch", "auto"), ("reference", "auto")]
    assert chosen() == "auto"


def test_the_first_leaves_while_the_second_is_inside():
    """The order that had left the process changed."""
    entered, left = threading.Event(), threading.Event()

    def second():
        with ops.use_backend("reference"):
            entered.set()
            assert left.wait(timeout=60)
            return chosen()

    with ThreadPoolExecutor(1) as pool:
        with ops.use_backend("torch"):
            task = pool.submit(second)
            assert entered.wait(timeout=60)
            assert chosen() == "torch"
        assert chosen() == "auto"
        left.set()
        assert task.result(timeout=60) == "reference"
    assert chosen() == "auto"


def test_many_threads_compute_what_each_has_chosen():
    expected = {name: scan(name)[0] for name in NAMES}
    start = threading.Barrier(6)

    def run(name):
        start.wait(timeout=60)
        for _ in range(20):
            with ops.use_backend(name):
                assert ops.resolved_backend("cpu") == ops.resolved_backend("cpu", name)
                out, tensors = scan()
                assert torch.equal(out, expected[name])
            assert chosen() == "auto"
            torch.autograd.grad(out.sum(), tensors)

    with ThreadPoolExecutor(6) as pool:
        for task in [pool.submit(run, name) for name in NAMES * 2]:
            task.result(timeout=60)


def test_blocks_are_nested_and_left_by_errors():
    with ops.use_backend("torch"):
        with pytest.raises(KeyError), ops.use_backend("reference"):
            raise KeyError
        assert chosen() == "torch"
        with ops.use_backend("auto"):
            assert chosen() == "auto"
        with pytest.raises(ValueError, match="Did you mean 'torch'"), ops.use_backend("troch"):
            pass
        assert chosen() == "torch"


def test_the_choice_of_the_process_holds_in_all_threads_outside_blocks():
    asked, answered = threading.Event(), threading.Event()

    def run():
        before = chosen()
        asked.set()
        assert answered.wait(timeout=60)
        with ops.use_backend("torch"):
            return before, chosen()

    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(run)
        assert asked.wait(timeout=60)
        ops.set_backend("reference")
        answered.set()
        assert task.result(timeout=60) == ("auto", "torch")
        assert pool.submit(chosen).result(timeout=60) == "reference"
    assert chosen() == "reference"
    with ops.use_backend("auto"):
        assert chosen() == "auto"


def test_a_thread_that_starts_within_a_block_begins_with_the_process_or_is_given_the_choice():
    with ops.use_backend("torch"):
        assert in_another_thread(chosen) == "auto"
        assert in_another_thread(ops.with_chosen_backend(chosen)) == "torch"
        given = ops.with_chosen_backend(lambda first, *, second: (first, second, chosen()))
    assert given(1, second=2) == (1, 2, "torch")
    assert chosen() == "auto"


@pytest.mark.parametrize("function", [scan, convolve])
@pytest.mark.parametrize("how", ["another thread", "another block", "another choice of the process"])
def test_the_backward_pass_uses_the_kernels_of_the_forward_pass(function, how, recorded):
    with ops.use_backend("recorded"):
        out, tensors = function()

    def backward():
        torch.autograd.grad(out.sum(), tensors)

    if how == "another thread":
        in_another_thread(backward)
    elif how == "another block":
        with ops.use_backend("torch"):
            backward()
    else:
        ops.set_backend("torch")
        backward()
    assert [call.rpartition(" ")[2] for call in recorded.calls] == ["forward", "backward"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_and_traced_graphs_ask_when_they_run(recorded):
    @torch.jit.script
    def scripted(x: torch.Tensor, weight: torch.Tensor):
        return torch.ops.vimtune.causal_conv1d(x, weight, None, False, False, "auto")

    x, weight = torch.randn(1, 5, 4, requires_grad=True), torch.randn(4, 3)
    with ops.use_backend("recorded"):
        out = scripted(x, weight)
    out.sum().backward()
    assert recorded.calls == ["conv forward", "conv backward"]
    with ops.use_backend("reference"), pytest.raises(Exception, match="'reference' has no kernels"):
        scripted(x, weight)


class Watch(TorchDispatchMode):
    """Writes down the operations of this package that pass torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vimtune":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_operations_are_called_at_once_only_where_nobody_looks(monkeypatch):
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 3)
    with Watch() as watch:
        expected = ops.causal_conv1d(x, weight)
    assert watch.seen == ["causal_conv1d"]
    with FakeTensorMode() as fake:
        found = ops.causal_conv1d(fake.from_tensor(x), fake.from_tensor(weight))
    assert type(found) is FakeTensor and found.shape == x.shape
    assert ops.causal_conv1d(x.to("meta"), weight.to("meta")).is_meta
    leaf = weight.clone().requires_grad_()
    assert ops.causal_conv1d(x, leaf).grad_fn is not None
    with torch.no_grad():
        torch.testing.assert_close(ops.causal_conv1d(x, leaf), expected, rtol=0, atol=0)

    monkeypatch.setattr(torch.ops.vimtune, "causal_conv1d", None)  # so that nobody can go this way
    torch.testing.assert_close(ops.causal_conv1d(x, weight), expected, rtol=0, atol=0)
    with pytest.raises(TypeError):
        ops.causal_conv1d(x, leaf)


def checkpointed_model():
    model = timm.create_model("vim_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize(
    "call", [lambda model, x: model(x), lambda model, x: model.forward_intermediates(x)[0]]
)
def test_what_checkpointing_repeats_runs_as_before_in_whatever_thread(call, recorded):
    """As on GPUs, where autograd's own threads repeat it."""
    model, images = checkpointed_model(), torch.randn(1, 3, 32, 32)
    with ops.use_backend("recorded"):
        loss = call(model, images).square().sum()
    forward = recorded.calls.count("forward")
    in_another_thread(loss.backward)
    assert forward == 4 and recorded.calls.count("forward") == 2 * forward
    assert recorded.calls.count("backward") == forward


@pytest.mark.gpu
def test_checkpointing_on_a_gpu_repeats_with_the_chosen_kernels():
    model, images = checkpointed_model().cuda(), torch.randn(1, 3, 32, 32, device="cuda")
    results = []
    for name in ("auto", "torch"):
        model.zero_grad()
        with ops.use_backend(name):
            loss = model(images).square().sum()
        loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_backward_on_a_gpu_uses_the_kernels_of_the_forward_pass(recorded):
    x = torch.randn(1, 5, 4, device="cuda", requires_grad=True)
    with ops.use_backend("recorded"):
        out = ops.causal_conv1d(x, torch.randn(4, 3, device="cuda"))
    out.sum().backward()
    assert recorded.calls == ["conv forward", "conv backward"]


def compiled_name():
    """What has been chosen, as a compiled graph that was fit for it says."""
    return NAMES.index(chosen()) + torch.zeros(())


def test_what_was_compiled_under_one_choice_is_not_run_under_another():
    torch._dynamo.reset()
    statistics = torch._dynamo.utils.counters["stats"]
    graphs_before = statistics["unique_graphs"]
    compiled = torch.compile(compiled_name, fullgraph=True, backend="eager")

    def name():
        return NAMES[int(compiled())]

    for wanted in ("torch", "reference", "torch"):
        with ops.use_backend(wanted):
            assert name() == wanted
            assert in_another_thread(name) == "auto"
        assert name() == "auto"
        ops.set_backend(wanted)
        assert name() == wanted
        ops.set_backend("auto")
    assert statistics["unique_graphs"] - graphs_before <= 5


def test_a_block_within_what_is_compiled():
    torch._dynamo.reset()

    def function(x, weight):
        with ops.use_backend("reference"):
            inside = ops.causal_conv1d(x, weight)
        return inside, ops.causal_conv1d(x, weight)

    x, weight = torch.randn(1, 5, 4), torch.randn(4, 3)
    for _ in range(2):
        found = torch.compile(function, fullgraph=True, backend="eager")(x, weight)
        for result in found:
            torch.testing.assert_close(result, ops.causal_conv1d(x, weight))
        assert chosen() == "auto"


def test_fused_kernels_of_compiled_code_follow_the_choice(backends, monkeypatch):
    monkeypatch.setattr(NvrtcBackend, "refusals", lambda self, device: [])
    torch._dynamo.reset()

    def function():
        names = dispatch.candidates("bidirectional_scan", chosen(), torch.device("cpu"), False)
        return torch.zeros(()) + (names == ("nvrtc",))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for wanted, has in (("nvrtc", True), ("torch", False), ("nvrtc", True), ("reference", False)):
        with ops.use_backend(wanted):
            assert bool(compiled()) == has, wanted


def test_names_are_known_before_the_backends_are_loaded():
    assert list(backends.OWN) == [name for name in dispatch.BACKENDS if name in backends.OWN]
    for name, path in backends.OWN.items():
        cls = type(dispatch.BACKENDS.get(name))
        assert path == f"{cls.__module__}.{cls.__qualname__}"
    assert ops.backend_names() == ["auto", *dispatch.BACKENDS, "reference"]


def test_a_backend_of_a_users_own_is_a_value_of_recipes(backends):
    class Mine(Backend):
        name = "mine"
        summary = "mine"

        def refusals(self, device):
            return []

    with pytest.raises(RecipeError, match="backend = 'mine': expected one of auto, cpu"):
        Recipe(backend="mine")
    backends(Mine())
    assert Recipe(backend="mine").run.backend == "mine"
