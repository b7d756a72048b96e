"""What a task says of an adapter that it has merged into its base weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Precision = Literal["fp32", "fp16", "bf16"]
"""In which type weights are written."""
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Largest logit error that rounding explains, relative to the largest logit, by the type of the weights."""


class MergeError(ValueError):
    """The merged model does not compute what base and adapter compute."""


@dataclass(frozen=True)
class MergeProof:
    """Logits before and after."""

    max_error: float
    """Largest absolute difference of two logits."""
    max_logit: float
    """Largest absolute logit before merging."""
    inputs: str
    """What they were computed from, such as "8 images"."""


@dataclass(frozen=True)
class Merged:
    """Plain weights that were written."""

    model: str
    """What they belong to."""
    proof: MergeProof
    loading_code: str
    """Python that loads them."""


def dtype_of(precision: Precision) -> torch.dtype:
    """The type of torch that is called by this name."""
    import torch  # This comes late, because `--help` does without torch.

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def prove(found: Tensor, expected: Tensor, inputs: str, precision: Precision = "fp32") -> MergeProof:
    """Compare the logits of a merged model with those before.

    Raises:
        MergeError: they differ by more than rounding explains; the message says that nothing was written.
    """
    found, expected = found.float().cpu(), expected.float().cpu()
    error = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    proof = MergeProof(error, expected.abs().max().item(), inputs)
    if error <= TOLERANCES[precision] * max(proof.max_logit, 1.0):
        return proof
    raise MergeError(
        f"the merged model differs: maximum logit error {error:.1e} at logits up to {proof.max_logit:.1f}; "
        "nothing was written"
    )
