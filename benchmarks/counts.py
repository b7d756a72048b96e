"""What a step of Vim has to do at least: bytes, matrix products, exponentials, fp32 instructions.

Counted is an ideal implementation in which each large projection, the norm with its residual add and the
inside of the mixer are one kernel each: bytes are the tensors that travel between those kernels, and the
mixer keeps its states on chip. Products of weights with weights (forming B A, once a step) are left out:
less than 1 % at these batches. A tensor "travels" when it is written once and read once.

Shape letters: B batch, L tokens, T = B L, D width, E inner width, N states, R dt rank, K filter width,
r adapter rank, a bytes of an activation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

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
    tokens: int
    width: int
    inner: int
    states: int
    dt_rank: int
    filter_width: int
    depth: int
    num_classes: int
    patch_values: int
    """Numbers in a patch, 3 P P."""
    pixel_values: int
    """Numbers in an image."""

    @classmethod
    def of(cls, model: nn.Module, batch: int, num_classes: int) -> VimShape:
        mixer, patches = model.layers[0].mixer, model.patch_embed
        filters = patches.proj.weight
        height, width = patches.img_size
        return cls(
            batch=batch,
            tokens=patches.num_patches + 1,
            width=model.embed_dim,
            inner=mixer.D.shape[0],
            states=mixer.A_log.shape[1],
            dt_rank=mixer.dt_rank,
            filter_width=mixer.conv1d.weight.shape[-1],
            depth=len(model.layers),
            num_classes=num_classes,
            patch_values=filters[0].numel(),
            pixel_values=filters.shape[1] * height * width,
        )

    @property
    def rows(self) -> int:
        """T."""
        return self.batch * self.tokens


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
    D, E, T = shape.width, shape.inner, shape.rows
    projectors = ((D, 2 * E), (E, D))  # in_proj, out_proj: (in, out)
    inside = 2 * (E * (shape.dt_rank + 2 * shape.states) + shape.dt_rank * E)  # x_proj, dt_proj; 2 directions
    layers = 2 * T * shape.depth * (sum(i * o for i, o in projectors) + inside)
    patches = 2 * shape.batch * (shape.tokens - 1) * shape.patch_values * D
    head = 2 * shape.batch * D * shape.num_classes
    flops = patches + layers + head
    if method == "forward":
        return flops
    flops += head  # gradient of its weight
    if method == "linear":
        return flops
    flops += head + layers  # gradients of the inputs
    if method == "full":
        return flops + patches + layers  # of the weights
    if method in LOW_RANK:
        flops -= 2 * T * D * 2 * E  # nothing is trained before the first in_proj
        # (x A^T) and (dy B) with their products, or the gradient of the whole matrix where that is less.
        flops += T * shape.depth * sum(min(4 * rank * (i + o), 2 * i * o) for i, o in projectors)
    return flops


def count_exponentials(shape: VimShape, method: str) -> float:
    """exp or log: the decays 2 T E N; SiLU (1) and softplus (2) of both directions and the gate, 7 T E.

    A backward makes them once more: a mixer that kept them would move 2 N numbers for each it computes.
    """
    forward = shape.depth * shape.rows * shape.inner * (2 * shape.states + 7)
    return forward * (2 if method in TRAINING else 1)


def count_instructions(shape: VimShape, method: str) -> float:
    """Those of the scan and of the convolution (K forward; K again and K for its adjoint backward)."""
    rows = 2 * shape.depth * shape.rows * shape.inner
    per_row = shape.states * SCAN_FORWARD + shape.filter_width
    if method in TRAINING:
        per_row += shape.states * SCAN_BACKWARD + 2 * shape.filter_width
    if method == "full":  # dA and the gradient of the filter
        per_row += shape.states + shape.filter_width
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
    D, E, a = shape.width, shape.inner, activation_bytes
    per_row = 8 * D + 4 * a * D + 6 * a * E
    if method in TRAINING:
        per_row += 12 * D + 4 * a * D + 8 * a * E
    if method in TRAINING and method != "frozen":
        per_row += a * (D + E)
    return (
        shape.depth * shape.rows * per_row
        + 4 * shape.batch * shape.pixel_values
        + 4 * total
        + (0 if method == "forward" else 28 * trained)
    )
