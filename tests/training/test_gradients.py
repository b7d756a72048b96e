"""Gradients put in place all at once are those of `backward`, and their norm is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vimtune.training.gradients import GradientWatch, put_gradients, scale_and_clip


class Net(nn.Module):
    """Gradients of every kind: dense, transposed, expanded, one tensor for two parameters, none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Parameter(torch.randn(4, 6))
        self.transposed = nn.Parameter(torch.randn(6, 3))
        self.expanded = nn.Parameter(torch.randn(5))
        self.twin = nn.Parameter(torch.randn(3))
        self.other_twin = nn.Parameter(torch.randn(3))
        self.strided = nn.Parameter(torch.randn(3, 4).t())
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(()), requires_grad=False)

    def forward(self, x):
        y = (x @ self.dense @ self.transposed + (self.twin + self.other_twin)).tanh()
        return (y.sum() + (x @ self.strided).square().sum() + self.expanded.sum()) * self.frozen


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 4, generator=generator) for _ in range(count)]


def by_backward(inputs) -> list[torch.Tensor | None]:
    net = Net()
    for x in inputs:
        net(x).backward()
    return [p.grad for p in net.parameters()]


def assert_equal(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_added_gradients_are_those_of_backward():
    net = Net()
    for x in batches(3):
        put_gradients(net(x), net.parameters(), replace=False)
    assert_equal([p.grad for p in net.parameters()], by_backward(batches(3)))
    assert net.unused.grad is None and net.frozen.grad is None


def test_replaced_gradients_are_those_of_the_last_batch_in_the_same_place():
    net, places = Net(), []
    for number, x in enumerate(batches(3)):
        put_gradients(net(x), net.parameters(), replace=True)
        if number == 0:
            net.unused.grad = torch.ones(2)  # of a step that had used it
        places.append([p.grad.data_ptr() for p in net.parameters() if p.grad is not None])
    assert places[0] == places[1] == places[2]
    expected = by_backward(batches(3)[2:])
    expected[6] = torch.zeros(2)
    assert_equal([p.grad for p in net.parameters()], expected)


def test_unused_parameters_keep_their_sum():
    net = Net()
    net.unused.grad = torch.ones(2)
    put_gradients(net(batches(1)[0]), net.parameters(), replace=False)
    assert net.unused.grad.tolist() == [1.0, 1.0]


def test_no_gradient_shares_its_memory_with_another():
    net = Net()
    put_gradients(net(batches(1)[0]), net.parameters(), replace=True)
    before = net.other_twin.grad.clone()
    net.twin.grad.mul_(2)
    assert torch.equal(net.other_twin.grad, before) and torch.equal(net.twin.grad, 2 * before)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_scaled_and_clipped(max_norm):
    net, reference = Net(), Net()
    for model in (net, reference):
        model(batches(1)[0]).backward()
    norm = scale_and_clip(net.parameters(), 0.25, max_norm)
    for parameter in reference.parameters():
        if parameter.grad is not None:
            parameter.grad *= 0.25
    expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm or float("inf"))
    assert float(norm) == float(expected) > 0.5
    assert_equal([p.grad for p in net.parameters()], [p.grad for p in reference.parameters()])


def test_watch_names_what_never_moves():
    parameters = {name: nn.Parameter(torch.zeros(2)) for name in ("moves", "late", "never", "none")}
    watch, found = GradientWatch(parameters, 3), []
    for step in range(5):
        for name in ("moves", "late", "never"):
            moves = name == "moves" or (name == "late" and step == 2)
            parameters[name].grad = torch.tensor([0.0, float(moves)])
        found.append(watch.look())
    assert found == [[], [], ["never", "none"], [], []]
