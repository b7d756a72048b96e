"""What a Vim costs: operations of a forward pass with those of the scan, parameters, memory of activations.

Every addition, multiplication, division and elementary function (exp, log, square root) counts as one
operation, so a product of matrices (m x k) (k x n) has 2 m k n, as torch.utils.flop_counter counts it.
Counted is the definition in `vimtune.ops.reference`, for one image:

| part | operations |
|---|---|
| patches | 2 M D P, and L D for the position embedding |
| norm | L (4 D + 2), and L D for the sum of the residual |
| in_proj, out_proj | 4 L D E and 2 L E D |
| convolution, each direction | L E 2 K, and 4 L E for SiLU |
| x_proj, dt_proj, each direction | 2 L E (R + 2 N) and 2 L R E |
| scan, each direction | L E (7 N + 6), and 2 E N for A = -exp(A_log) |
| gate | L E (4 + 1) for SiLU(z) and its product, 2 L E for the average of the directions |
| head | 2 D C + C |

The scan in detail, for each token and channel: dt = log(1 + exp(delta + bias)) is 4; dt u is 1; for each
state exp(dt A), its product with s, (dt u) B, the sum, and the product with C are 6, adding the states up is
N - 1; D u and its sum are 2.

Shape letters: L tokens, M patches, P numbers in a patch, D width, E inner width, N states, R dt rank, K
filter width, C classes.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimtune.adapters import active_adapter, summary
from vimtune.analysis.subject import Subject
from vimtune.models import VisionMamba
from vimtune.pages.section import Section, Table


@dataclass(frozen=True)
class Sizes:
    """The sizes on which the operations depend, by the letters above."""

    tokens: int
    patches: int
    patch_values: int
    width: int
    inner: int
    states: int
    dt_rank: int
    filter_width: int
    depth: int
    num_classes: int

    @classmethod
    def of(cls, model: VisionMamba) -> Sizes:
        """Those of a model as it was built: states that an adapter adds are no part of it."""
        options = model.options
        patches = model.patch_embed.num_patches
        return cls(
            tokens=patches + 1,
            patches=patches,
            patch_values=model.patch_embed.proj.weight[0].numel(),
            width=options["embed_dim"],
            inner=options["expand"] * options["embed_dim"],
            states=options["d_state"],
            dt_rank=options["dt_rank"],
            filter_width=options["d_conv"],
            depth=options["depth"],
            num_classes=model.num_classes,
        )


@dataclass(frozen=True)
class Operations:
    """Operations of a forward pass for one image."""

    products: int
    """Of the products of matrices, which torch.utils.flop_counter counts, too."""
    scan: int
    """Of the selective scans."""
    rest: int
    """Of all else: convolutions, gates, norms, sums."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.scan + self.rest

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.scan + other.scan, self.rest + other.rest)


def scan_operations(tokens: int, inner: int, states: int) -> int:
    """Of one direction, for L tokens, E channels and N states: L E (7 N + 6) + 2 E N."""
    return tokens * inner * (7 * states + 6) + 2 * inner * states


def layer_operations(sizes: Sizes) -> Operations:
    """Of one block."""
    L, D, E, N, R = sizes.tokens, sizes.width, sizes.inner, sizes.states, sizes.dt_rank
    projectors = 4 * L * D * E + 2 * L * E * D
    inside = 2 * (2 * L * E * (R + 2 * N) + 2 * L * R * E)
    convolutions = 2 * L * E * (2 * sizes.filter_width + 4)
    gate = L * E * (4 + 1 + 2)
    norm = L * (4 * D + 2) + L * D
    return Operations(projectors + inside, 2 * scan_operations(L, E, N), convolutions + gate + norm)


def model_operations(sizes: Sizes) -> Operations:
    """Of the whole model: patches, blocks, final norm, head."""
    D, C = sizes.width, sizes.num_classes
    around = Operations(
        products=2 * sizes.patches * sizes.patch_values * D + 2 * D * C,
        scan=0,
        rest=sizes.tokens * D + sizes.tokens * (4 * D + 2) + C,
    )
    layer = layer_operations(sizes)
    blocks = Operations(*(sizes.depth * count for count in (layer.products, layer.scan, layer.rest)))
    return around + blocks


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of a forward pass in training mode, parameters and
    images apart; each piece of memory counts once."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), images)}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # A piece of memory that is given back could be another one's a moment later.

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    was_training = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images)
    finally:
        model.train(was_training)
    return sum(kept.values())


def bytes_per_image(model: nn.Module, image: Tensor) -> int:
    """What one image more (C, H, W) adds to `kept_bytes`, which leaves out what depends on weights alone."""
    return kept_bytes(model, image.expand(2, -1, -1, -1).clone()) - kept_bytes(model, image[None].clone())


def analyze(subject: Subject) -> Section:
    """Operations, parameters, and what training one image keeps in memory."""
    before, after = subject.vims()
    sizes = Sizes.of(before)
    layer, whole = layer_operations(sizes), model_operations(sizes)
    # A merged file does not say what was trained.
    counts = summary(after)
    trainable = None if active_adapter(after) is None else counts.trainable
    image = subject.batches[0][0] if subject.batches else _random_image(before)
    full = copy.deepcopy(before).requires_grad_(True)
    memory = {"full fine-tuning": bytes_per_image(full, image)}
    said = (
        f"{counts.total:,} parameters, of which a merged file does not say which were trained; full "
        f"fine-tuning keeps {_mebibytes(memory['full fine-tuning'])} MiB for an image."
    )
    if trainable is not None:
        memory["as it was trained"] = bytes_per_image(after, image)
        said = (
            f"{trainable:,} of {counts.total:,} parameters were trained, {counts.head:,} of them in the "
            f"head; training keeps {_mebibytes(memory['as it was trained'])} MiB for an image, full "
            f"fine-tuning {_mebibytes(memory['full fine-tuning'])}."
        )
    numbers: dict[str, Any] = {
        "sizes": asdict(sizes),
        "layer": {**asdict(layer), "total": layer.total},
        "model": {**asdict(whole), "total": whole.total},
        "parameters": {"total": counts.total, "trainable": trainable, "head": counts.head},
        "activation_bytes_per_image": memory,
    }
    return Section(
        title="Operations, parameters, memory",
        explanation="Operations of a forward pass for one image by the formulas of vimtune.analysis.cost: "
        "each addition, multiplication and elementary function is one, so a product of matrices has 2 m k "
        "n. They are those of the plain model, which a merged adapter does not change. Memory is what "
        "autograd keeps for the backward pass for each image of a batch, measured here on this device, "
        "backend and precision (fp32); with an adapter it does not keep what only gradients of frozen "
        "weights need.",
        findings=[
            f"{whole.total / 1e9:.3f} GFLOP for an image: {_share(whole.products, whole)} products of "
            f"matrices, {_share(whole.scan, whole)} scans, {_share(whole.rest, whole)} all else.",
            said,
        ],
        numbers=numbers,
        tables=[
            Table(
                "Operations for one image, in millions",
                ["part", "products", "scan", "rest", "total"],
                [
                    [
                        name,
                        *(f"{value / 1e6:,.3f}" for value in (own.products, own.scan, own.rest, own.total)),
                    ]
                    for name, own in (("one block", layer), (f"model, {sizes.depth} blocks", whole))
                ],
            )
        ],
    )


def _random_image(model: VisionMamba) -> Tensor:
    shape = model.in_chans, *model.patch_embed.img_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.cls_token.device)


def _mebibytes(count: int) -> str:
    """A number of bytes in units of 2^20."""
    return f"{count / 2**20:.2f}"


def _share(part: int, whole: Operations) -> str:
    return f"{100 * part / whole.total:.1f} %"
