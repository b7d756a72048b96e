"""What every method has to pass, on a model small enough for it."""

from __future__ import annotations

import copy
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import timm
import torch
from timm.models import create_feature_extractor
from torch import Tensor, nn

from vimtune import adapters
from vimtune.adapters.composition import single_rules
from vimtune.adapters.slots import base_value, iter_slots, iter_weight_slots, slots_of
from vimtune.backends import REFERENCE
from vimtune.ops import backend_report

NUM_CLASSES = 5
"""Number of outputs of the models that the checks adapt."""


def build_test_model(depth: int = 2) -> nn.Module:
    """The `test_vim` of so many layers, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_vim", num_classes=NUM_CLASSES, depth=depth, backend="torch")


def build_test_inputs() -> tuple[Any, ...]:
    """Three images, as `test_vim` takes them, (3, 3, 32, 32)."""
    return (torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)),)


@dataclass(frozen=True)
class MethodCase:
    """A method with its options, and the model on which it is checked."""

    method: str
    """The method as `inject` takes it: "lora", "lora+bitfit"."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `inject`: options of the method, `targets`, `layers`."""
    build_model: Callable[[], nn.Module] = build_test_model
    """Builds the plain model, with the same weights at every call."""
    build_inputs: Callable[[], tuple[Any, ...]] = build_test_inputs
    """Arguments with which the model is called; the result is a tensor."""

    def plain(self) -> nn.Module:
        """The plain model, in evaluation mode."""
        return self.build_model().eval()

    def adapted(self) -> nn.Module:
        """The model with the method as it starts, in evaluation mode."""
        torch.manual_seed(1)
        return adapters.inject(self.plain(), self.method, **self.options)

    def trained(self) -> nn.Module:
        """The model with the method, every trained tensor moved away from its start."""
        return disturb(self.adapted())

    def run(self, model: nn.Module) -> Tensor:
        """The output of a model."""
        return cast(Tensor, model(*self.build_inputs()))

    @property
    def methods(self) -> list[adapters.Method]:
        """The methods of the case, with their default options."""
        return [adapters.get_method(name)() for name in self.method.split("+")]


def disturb(model: nn.Module, seed: int = 0, size: float = 0.05) -> nn.Module:
    """Move every trained tensor of the active adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in adapters.adapter_parameters(model):
            noise = torch.randn(item.parameter.shape, generator=generator)
            item.parameter.add_(size * noise.to(item.parameter.device, item.parameter.dtype))
    return model


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that two tensors are equal up to a tolerance."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@contextmanager
def without_chance(model: nn.Module) -> Iterator[None]:
    """Dropout keeps everything within the block: what is left is the form that serves dropout."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    rates = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate


# --- the checks


def check_start(case: MethodCase) -> None:
    """Injecting changes nothing, unless the method says that it does (`Method.changes_at_start`)."""
    if not any(method.changes_at_start for method in case.methods):
        close(case.run(case.adapted()), case.run(case.plain()))


def check_disabling(case: MethodCase) -> None:
    """Disabled and deleted, an adapter leaves the plain model, to the bit; enabled it has an effect."""
    model, plain = case.trained(), case.plain()
    expected = case.run(plain)
    assert not torch.allclose(case.run(model), expected, atol=1e-3), "a trained adapter has no effect"
    with adapters.disabled(model):
        close(case.run(model), expected, 0)
    assert not torch.allclose(case.run(model), expected, atol=1e-3)
    adapters.delete_adapter(model, "default")
    close(case.run(model), expected, 0)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert _flags(model) == _flags(plain)


def check_merging(case: MethodCase) -> None:
    """Merging gives a plain model with the same output that can be taken back, or is refused by name."""
    model = case.trained()
    expected, state = case.run(model), _copy_state(model)
    rules = [(owner, rule) for _, owner, _, slot in iter_slots(model) for rule in single_rules(slot.rule)]
    if not all(_is_mergeable(rule, owner) for owner, rule in rules):
        try:
            adapters.merge(model)
        except ValueError as error:
            assert "nothing was merged" in str(error), error
        else:
            raise AssertionError("a rule that no weight can express was merged")
        _assert_same_state(model, state)
        close(case.run(model), expected, 0)
        return
    assert adapters.merge(model, reversible=True) is model
    plain = _merged_twin(model, case)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert _flags(model) == _flags(plain)
    close(case.run(model), expected)
    merged = _copy_state(model)
    adapters.merge(model)
    _assert_same_state(model, merged)
    adapters.unmerge(model)
    _assert_same_state(model, state)
    close(case.run(model), expected, 0)
    adapters.merge(model)
    close(case.run(model), expected)


def check_refusal_of_non_finite_weights(case: MethodCase) -> None:
    """A weight that would become inf or NaN is not merged, and the model stays as it was."""
    model = case.adapted()
    with torch.no_grad():
        list(adapters.adapter_parameters(model))[-1].parameter.view(-1)[0] = float("nan")
    before = _copy_state(model)
    try:
        adapters.merge(model)
    except ValueError as error:
        assert "nothing was merged" in str(error), error
    else:
        raise AssertionError("a weight that is not finite was merged")
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=0, rtol=0, equal_nan=True)


def check_gradients(case: MethodCase) -> None:
    """Every trained tensor gets a gradient, no frozen one does."""
    model = case.trained().train()
    case.run(model).square().sum().backward()
    adapters.check_gradients(model)
    trained = {id(item.parameter) for item in adapters.adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    for name, parameter in adapters.base_parameters(model):
        assert not parameter.requires_grad, name


def check_every_entry(case: MethodCase) -> None:
    """After one step from the start no entry of any tensor has a gradient of exactly zero, apart from those
    that a rule says never train (`Rule.idle_entries`), or may be off (`Rule.may_be_off`)."""
    model = case.adapted()  # The model is in evaluation, because dropout rightly makes some gradients zero.
    optimizer = torch.optim.SGD([item.parameter for item in adapters.adapter_parameters(model)], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = case.run(model)
        (output * torch.linspace(1, 5, output.shape[-1])).square().sum().backward()
        optimizer.step()
    for _, _, _, slot in iter_slots(model):
        for rule in single_rules(slot.rule):
            for name, parameter in rule.named_parameters():
                assert parameter.grad is not None, name
                dead, idle = parameter.grad == 0, rule.idle_entries(name)
                if rule.may_be_off and not dead.all():
                    continue
                unexpected = dead if idle is None else dead & ~idle
                kind = type(rule).__name__
                assert not unexpected.any(), (
                    f"{name}: {int(unexpected.sum())} of {dead.numel()} entries got no gradient; if they are "
                    f"never to train, {kind}.idle_entries({name!r}) has to say so"
                )
                assert idle is None or bool(dead[idle].all()), (
                    f"{name}: entries train that {kind}.idle_entries({name!r}) says are idle"
                )


def check_settling(case: MethodCase) -> None:
    """A method that looks at training batches makes of the same ones the same choice, keeps what it promises
    about the start, and leaves nothing behind but tensors of the adapter."""
    if not adapters.settles(case.adapted()):
        return
    states = []
    for _ in range(2):
        model = case.adapted()
        before = {key: tensor.shape for key, tensor in adapters.adapter_state_dict(model).items()}
        adapters.settle(model.train(), itertools.repeat(partial(_run_batch, case, model)))
        states.append(adapters.adapter_state_dict(model))
        assert {key: tensor.shape for key, tensor in states[-1].items()} == before
        assert all(item.parameter.requires_grad for item in adapters.adapter_parameters(model))
    for key, tensor in states[0].items():
        close(states[1][key], tensor, 0)
    if not any(method.changes_at_start for method in case.methods):
        close(case.run(model.eval()), case.run(case.plain()))


def _run_batch(case: MethodCase, model: nn.Module) -> float:
    """Forward and backward of a training batch, as a run hands it to methods that settle."""
    output = case.run(model)
    loss = (output * torch.linspace(1, 5, output.shape[-1])).square().mean()
    loss.backward()
    return float(loss.detach())


def check_training(case: MethodCase) -> None:
    """Training changes every tensor of the adapter and nothing else."""
    model, plain = case.adapted().train(), dict(case.plain().named_parameters())
    start = {key: tensor.clone() for key, tensor in adapters.adapter_state_dict(model).items()}
    parameters = [item.parameter for item in adapters.adapter_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        case.run(model).square().sum().backward()
        optimizer.step()
    for name, parameter in adapters.base_parameters(model):
        assert torch.equal(parameter, plain[name]), name
    trained = {item.key for item in adapters.adapter_parameters(model)}
    state = adapters.adapter_state_dict(model)
    assert not [key for key in trained if torch.equal(state[key], start[key])]


def check_reading(case: MethodCase) -> None:
    """Calling a linear layer equals multiplying by the weight that one reads, output and gradients."""
    for training in (False, True):
        model = case.trained().train(training)
        with without_chance(model):
            for _, owner, name, slot in iter_weight_slots(model):
                if name == "weight" and isinstance(owner, nn.Linear) and len(slots_of(owner)) == 1:
                    _compare_call_with_weight(owner, [p for p in slot.rule.parameters() if p.requires_grad])


def _compare_call_with_weight(owner: nn.Linear, trained: list[nn.Parameter]) -> None:
    x = torch.randn(2, 7, owner.in_features, requires_grad=True)
    results = []
    for output in (owner(x), nn.functional.linear(x, owner.weight, owner.bias)):
        loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
        results.append([output, *torch.autograd.grad(loss, [x, *trained], allow_unused=True)])
    for called, read in zip(*results, strict=True):
        close(called, read, 1e-4)


def check_files(case: MethodCase) -> None:
    """An adapter file gives the same outputs, names and sites."""
    model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        classes = [f"class {index}" for index in range(NUM_CLASSES)]
        adapters.save_adapter(model, path, classes=classes)
        torch.manual_seed(99)
        other = case.plain()
        info = adapters.load_adapter(other, path)
    assert info.classes == classes and info.method == case.method
    close(case.run(other), case.run(model), 0)
    assert _names(other) == _names(model)
    ours, theirs = adapters.active_adapter(model), adapters.active_adapter(other)
    assert ours is not None and theirs is not None and ours.sites == theirs.sites
    assert ours.options == theirs.options


def check_state(case: MethodCase) -> None:
    """Tensors pass from one model to another, by `adapter_state_dict` and by `state_dict`."""
    model, other, third = case.trained(), case.adapted(), case.adapted()
    adapters.load_adapter_state_dict(other, adapters.adapter_state_dict(model))
    close(case.run(other), case.run(model), 0)
    third.load_state_dict(model.state_dict())
    close(case.run(third), case.run(model), 0)
    try:
        adapters.load_adapter_state_dict(other, {})
    except ValueError as error:
        assert "missing" in str(error), error
    else:
        raise AssertionError("a state without tensors was loaded")


def check_plain_checkpoint(case: MethodCase) -> None:
    """A plain checkpoint loads strictly into the adapted model and leaves the adapter alone."""
    model = case.trained()
    expected = case.run(model)
    model.load_state_dict(case.plain().state_dict())
    close(case.run(model), expected, 0)


def check_autocast(case: MethodCase) -> None:
    """Under autocast outputs stay close and finite, and so do gradients."""
    model = case.trained()
    expected = case.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(model)
    assert (output.float() - expected).norm() / expected.norm() < 3e-2
    output.float().square().sum().backward()
    adapters.check_gradients(model)
    for item in adapters.adapter_parameters(model):
        assert item.parameter.grad is not None and torch.isfinite(item.parameter.grad).all(), item.name


def check_backends(case: MethodCase) -> None:
    """Every backend that can run here gives the outputs and gradients of the naive definition."""
    model = case.trained()
    choosing = [module for module in model.modules() if isinstance(getattr(module, "backend", None), str)]
    if not choosing:
        return
    names = [row.name for row in backend_report() if row.available and row.name != REFERENCE]
    results: dict[str, list[Tensor]] = {}
    for name in (REFERENCE, *names):
        for module in choosing:
            cast(Any, module).backend = name
        model.zero_grad()
        output = case.run(model)
        output.square().sum().backward()
        gradients = [cast(Tensor, item.parameter.grad) for item in adapters.adapter_parameters(model)]
        results[name] = [output.detach(), *(gradient.clone() for gradient in gradients)]
    for name in names:
        for actual, expected in zip(results[name], results[REFERENCE], strict=True):
            error = (actual - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error <= 1e-4, f"backend {name} is off by {error:.1e}"


def check_half_precision(case: MethodCase) -> None:
    """A model in bfloat16 stays in bfloat16 and trains: all tensors of a rule that its formula combines with
    the weight have the weight's dtype, as those made by `weight.new_zeros` have."""
    torch.manual_seed(1)
    model = adapters.inject(case.plain().to(torch.bfloat16), case.method, **case.options)
    inputs = [x.to(torch.bfloat16) if torch.is_floating_point(x) else x for x in case.build_inputs()]
    output = model(*inputs)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    adapters.check_gradients(model)


def check_compiling(case: MethodCase) -> None:
    """torch.compile takes the model without a graph break; in evaluation, too, if a rule tells it apart."""
    alike = case.build_model is build_test_model and "layers" not in case.options
    if alike and not _surrounds_calls(case.adapted()):
        # Each layer takes a second to trace, and where none hands anything on, one stands for all.
        case = replace(case, build_model=partial(build_test_model, depth=1))
    for training in (False, True) if _looks_at_mode(case.adapted()) else (True,):
        torch._dynamo.reset()
        model = case.trained().train(training)
        with without_chance(model):
            expected = case.run(model)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            close(case.run(cast(nn.Module, compiled)), expected)


def _surrounds_calls(model: nn.Module) -> bool:
    """Whether rules surround calls, by which they may hand something from layer to layer."""
    rules = (rule for _, _, _, slot in iter_slots(model) for rule in single_rules(slot.rule))
    return any(isinstance(rule, adapters.CallRule) for rule in rules)


def _looks_at_mode(model: nn.Module) -> bool:
    """Whether a rule, or a module in one, reads its `training`, by which it may do something else then."""
    rules = (rule for _, _, _, slot in iter_slots(model) for rule in single_rules(slot.rule))
    classes = {cls for rule in rules for module in rule.modules() for cls in type(module).__mro__}
    functions = (item for cls in classes - set(nn.Module.__mro__) for item in vars(cls).values())
    return any("training" in item.__code__.co_names for item in functions if isinstance(item, FunctionType))


def check_checkpointing(case: MethodCase) -> None:
    """Gradient checkpointing changes neither outputs nor gradients."""
    results = []
    for checkpointing in (False, True):
        model = case.trained().train()
        if not hasattr(model, "set_grad_checkpointing"):
            return
        cast(Any, model).set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        output = case.run(model)
        output.square().sum().backward()
        results.append([output, *(item.parameter.grad for item in adapters.adapter_parameters(model))])
    for plain, recomputed in zip(*results, strict=True):
        close(recomputed, plain, 1e-4)


def check_tracing(case: MethodCase) -> None:
    """A model that timm traces with torch.fx computes the same, for a model with a head of that name."""
    model = case.trained()
    if isinstance(getattr(model, "head", None), nn.Module):
        traced = create_feature_extractor(model, {"head": "output"})
        close(traced(*case.build_inputs())["output"], case.run(model))


def check_copies(case: MethodCase) -> None:
    """A deep copy and a pickled model compute the same, and are independent of the original."""
    model = case.trained()
    expected = case.run(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        close(case.run(twin), expected, 0)
        disturb(twin, seed=5)
        close(case.run(model), expected, 0)
        adapters.delete_adapter(twin, "default")
        assert adapters.list_adapters(model) == ["default"] and adapters.list_adapters(twin) == []


def check_several_adapters(case: MethodCase) -> None:
    """Two adapters of the method on one model do not disturb each other, nor do they in one batch."""
    model = case.trained()
    first = case.run(model)
    torch.manual_seed(2)
    adapters.inject(model, case.method, name="second", **case.options)
    disturb(model, seed=7)
    second = case.run(model)
    assert not torch.allclose(first, second, atol=1e-3)
    adapters.set_adapter(model, "default")
    close(case.run(model), first, 0)
    adapters.set_adapter(model, "second")
    close(case.run(model), second, 0)
    inputs, *others = case.build_inputs()
    if not others:
        names = [("default", "second")[row % 2] for row in range(len(inputs))]
        for row, found in enumerate(adapters.forward_mixed(model, inputs, names)):
            close(found, (first, second)[row % 2][row], 1e-4)
    adapters.delete_adapter(model, "default")
    close(case.run(model), second, 0)


def check_low_rank(case: MethodCase) -> None:
    """What a rule says to be the low-rank difference that it adds is this difference."""
    model = case.trained()
    for _, owner, name, slot in iter_weight_slots(model):
        weight = base_value(owner, name)
        if slot.rule is None or (found := slot.rule.low_rank(weight)) is None:
            continue
        with torch.no_grad():
            close(weight.flatten(1) + found[0] @ found[1], slot.evaluated(weight).flatten(1))


def check_summary(case: MethodCase) -> None:
    """The summary counts what trains and what the merged model would have, and names what is adapted."""
    model = case.adapted()
    report = adapters.summary(model)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert case.method in str(report)
    record = adapters.active_adapter(model)
    assert record is not None
    for method, paths in record.sites.items():
        assert sum(report.adapted[method].values()) == len(paths)
    try:
        adapters.merge(model)
    except ValueError:
        return
    had = {name for name, _ in case.plain().named_parameters()}
    assert report.total == sum(p.numel() for name, p in model.named_parameters() if name in had)


METHOD_CHECKS: tuple[Callable[[MethodCase], None], ...] = (
    check_start,
    check_disabling,
    check_merging,
    check_refusal_of_non_finite_weights,
    check_gradients,
    check_every_entry,
    check_settling,
    check_training,
    check_reading,
    check_files,
    check_state,
    check_plain_checkpoint,
    check_autocast,
    check_backends,
    check_half_precision,
    check_compiling,
    check_checkpointing,
    check_tracing,
    check_copies,
    check_several_adapters,
    check_low_rank,
    check_summary,
)
"""All checks of a method, each a function of a `MethodCase`."""


def check_method(
    method: str,
    *,
    build_model: Callable[[], nn.Module] = build_test_model,
    build_inputs: Callable[[], tuple[Any, ...]] = build_test_inputs,
    **options: Any,
) -> None:
    """Run all checks on a registered method.

    Args:
        method: its name, or several joined by "+".
        build_model: builds the plain model, with the same weights at every call; by default a Vim with 16
            channels and two layers.
        build_inputs: the arguments with which the model is called.
        options: options of the method, and `targets` and `layers`.

    Raises:
        AssertionError: a check failed, or the method raised an error in it. The message has the name of the
            check, what was found, and what the check demands.
    """
    case = MethodCase(method, options, build_model, build_inputs)
    for check in METHOD_CHECKS:
        try:
            check(case)
        except Exception as error:  # Whatever the method raises says nothing about the check.
            found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            demand = " ".join((check.__doc__ or "").split())
            raise AssertionError(f"{check.__name__} of {method!r}: {found or 'failed'} ({demand})") from error


def _is_mergeable(rule: adapters.Rule, owner: nn.Module) -> bool:
    """Whether plain weights can express a rule of `owner`."""
    if isinstance(rule, adapters.CallRule):
        return rule.fold(owner) is not None
    return cast(adapters.WeightRule, rule).mergeable


def _merged_twin(model: nn.Module, case: MethodCase) -> nn.Module:
    """The plain model; where merging has changed the options, one with these and the merged weights."""
    creation = cast(dict[str, Any], getattr(model, "creation", None))
    if not creation or creation == getattr(case.plain(), "creation", None):
        return case.plain()
    twin = timm.create_model(creation["name"], **creation["kwargs"])
    twin.load_state_dict(model.state_dict())
    close(case.run(twin.eval()), case.run(model))
    return twin


def _copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _names(model: nn.Module) -> list[str]:
    return [item.name for item in adapters.adapter_parameters(model)]
