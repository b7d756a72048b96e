"""What a step of Vim has to do at least: bytes, matrix products, exponentials, fp32 instructions.

Counted is an ideal implementation in which each large projection, the norm with its residual add and the
inside of the mixer are one kernel each: bytes are the tensors that travel between those kernels, and the
mixer keeps its states on chip. Products of weights with weights (forming B A, once a step) are left out:
less than 1 % at these batches. A tensor "travels" when it is written once and read once.

Shape letters: B batch, L tokens, T = B L, D width, E inner width, N states, R dt rank, K filter width,
r adapter rank, a bytes of an activation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from vimtune.analysis.cost import Sizes, layer_operations, model_operations
from vimtune.models import VisionMamba

TRAINING = ("frozen", "lora", "dora", "prodial", "full")
"""Methods whose backward passes through the whole backbone."""
LOW_RANK = ("lora", "dora", "prodial")

SCAN_FORWARD = 4
"""fp32 instructions a state and token: dt A; (dt u) B; s = a s + ...; y += C s."""
SCAN_BACKWARD = 10
"""The first three again, then h = dy C + carry; q += h B; carry = a h; its product with s; the sum of
that with A; dt u h and dy s, whose sums over channels are left to the matrix units."""


@dataclass(frozen=True)
class VimShape:
    """Sizes of a step."""

    batch: int
    model: Sizes
    """Those of the model, with the states that an adapter adds."""
    pixel_values: int
    """Numbers in an image."""

    @classmethod
    def of(cls, model: VisionMamba, batch: int, num_classes: int) -> VimShape:
        states = model.layers[0].mixer.A_log.shape[1]
        height, width = model.patch_embed.img_size
        return cls(
            batch=batch,
            model=replace(Sizes.of(model), states=states, num_classes=num_classes),
            pixel_values=model.in_chans * height * width,
        )

    @property
    def rows(self) -> int:
        """T."""
        return self.batch * self.model.tokens


@dataclass(frozen=True)
class Counts:
    """Of one step."""

    bytes: float
    matmul_flops: float
    exponentials: float
    instructions: float
    """fp32 instructions of single lanes."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def count_step(
    shape: VimShape, method: str, *, trained: int, total: int, rank: int = 16, activation_bytes: int = 2
) -> Counts:
    """Counts of a step of `method` that trains `trained` of `total` numbers."""
    return Counts(
        bytes=count_bytes(shape, method, trained, total, activation_bytes),
        matmul_flops=count_matmul_flops(shape, method, rank),
        exponentials=count_exponentials(shape, method),
        instructions=count_instructions(shape, method),
    )


def count_matmul_flops(shape: VimShape, method: str, rank: int) -> float:
    """Two for each multiplication with its addition."""
    sizes = shape.model
    D, E, T = sizes.width, sizes.inner, shape.rows
    layers = shape.batch * sizes.depth * layer_operations(sizes).products
    head = 2 * shape.batch * D * sizes.num_classes
    flops = forward = shape.batch * model_operations(sizes).products
    if method == "forward":
        return flops
    flops += head  # gradient of its weight
    if method == "linear":
        return flops
    flops += head + layers  # gradients of the inputs
    if method == "full":
        return flops + forward - head  # of the weights
    if method in LOW_RANK:
        flops -= 2 * T * D * 2 * E  # nothing is trained before the first in_proj
        projectors = ((D, 2 * E), (E, D))  # in_proj, out_proj: (in, out)
        # (x A^T) and (dy B) with their products, or the gradient of the whole matrix where that is less.
        flops += T * sizes.depth * sum(min(4 * rank * (i + o), 2 * i * o) for i, o in projectors)
    return flops


def count_exponentials(shape: VimShape, method: str) -> float:
    """exp or log: the decays 2 T E N; SiLU (1) and softplus (2) of both directions and the gate, 7 T E.

    A backward makes them once more: a mixer that kept them would move 2 N numbers for each it computes.
    """
    sizes = shape.model
    forward = sizes.depth * shape.rows * sizes.inner * (2 * sizes.states + 7)
    return forward * (2 if method in TRAINING else 1)


def count_instructions(shape: VimShape, method: str) -> float:
    """Those of the scan and of the convolution (K forward; K again and K for its adjoint backward)."""
    sizes = shape.model
    rows = 2 * sizes.depth * shape.rows * sizes.inner
    per_row = sizes.states * SCAN_FORWARD + sizes.filter_width
    if method in TRAINING:
        per_row += sizes.states * SCAN_BACKWARD + 2 * sizes.filter_width
    if method == "full":  # dA and the gradient of the filter
        per_row += sizes.states + sizes.filter_width
    return rows * per_row


def count_bytes(shape: VimShape, method: str, trained: int, total: int, activation_bytes: int) -> float:
    """Forward, a layer and token: the fp32 residual, read and written (8 D); norm, branch (2 a D each),
    xz (4 a E) and the scan's result (2 a E) travel.

    Backward: the gradient of the residual, read and written (8 D), the residual read (4 D); gradients of
    branch and norm (2 a D each), of the scan's result (2 a E) and of xz (4 a E) travel; xz is read (2 a E).
    Gradients of the projectors read their inputs again, a (D + E).

    Beside the layers: images (fp32), all parameters once, and for what is trained 28 bytes a number:
    parameter and AdamW's two moments read and written, the gradient read.
    """
    D, E, a = shape.model.width, shape.model.inner, activation_bytes
    per_row = 8 * D + 4 * a * D + 6 * a * E
    if method in TRAINING:
        per_row += 12 * D + 4 * a * D + 8 * a * E
    if method in TRAINING and method != "frozen":
        per_row += a * (D + E)
    return (
        shape.model.depth * shape.rows * per_row
        + 4 * shape.batch * shape.pixel_values
        + 4 * total
        + (0 if method == "forward" else 28 * trained)
    )
