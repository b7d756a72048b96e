"""Cross entropy of tokens. A program reads a row of logits, or writes a part of the gradient of one.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loss_kernel(logits, labels, losses, log_sums, size, PART: tl.constexpr, IGNORED: tl.constexpr):
    """`log_sums` = log sum exp(logits), `losses` = log_sums - logits[label]; all (T,)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * size
    place = tl.arange(0, PART)
    # Every lane has a maximum of its own, and a sum relative to it, until the row has been read.
    largest = tl.full([PART], -float("inf"), tl.float32)
    total = tl.zeros([PART], tl.float32)
    for first in range(0, size, PART):
        inside = first + place < size
        value = tl.load(start + first + place, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        # Nothing has been seen as long as the maximum is minus infinity, and inf - inf would not be a number.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - base) + tl.exp(value - base)
        largest = higher
    highest = tl.max(largest, axis=0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - base), axis=0)) + base
    label = tl.load(labels + row)
    counts = label != IGNORED
    # A label that is no token makes a loss that is no number, which the caller notices.
    known = (label >= 0) & (label < size)
    chosen = tl.load(start + tl.where(known, label, 0)).to(tl.float32)
    chosen = tl.where(known, chosen, float("nan"))
    tl.store(log_sums + row, log_sum)
    tl.store(losses + row, tl.where(counts, log_sum - chosen, 0.0))


@triton.jit
def loss_backward_kernel(
    grad, logits, labels, log_sums, grad_logits, size, PART: tl.constexpr, IGNORED: tl.constexpr
):
    """`grad_logits` = grad (softmax(logits) - 1 at the label), a part of a row (T, V) each."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = place < size
    label = tl.load(labels + row)
    value = tl.load(logits + row * size + place, mask=inside, other=-float("inf")).to(tl.float32)
    slope = tl.exp(value - tl.load(log_sums + row)) - tl.where(place == label, 1.0, 0.0)
    slope = tl.where(label == IGNORED, 0.0, slope * tl.load(grad + row))
    tl.store(grad_logits + row * size + place, slope.to(grad_logits.dtype.element_ty), mask=inside)
