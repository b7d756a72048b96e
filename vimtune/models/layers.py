"""The layers of Vision Mamba (Zhu et al. 2024, arXiv 2401.09417) around its mixer: patches, norm, blocks.

Shape letters: B batch, L tokens (patches and class token), M patches, D width.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_function
from torch import Tensor, nn

from vimtune.adapters import shared_effective_weights
from vimtune.models.mixer import BiMambaMixer
from vimtune.models.options import ModelOptions
from vimtune.ops import add_rms_norm, has_add_rms_norm

__all__ = ["Block", "Blocks", "PatchEmbed", "RMSNorm", "at_least_fp32", "check_images"]


@register_notrace_function
def check_images(images: Tensor, channels: int, size: tuple[int, int]) -> None:
    """Raise ValueError, with the remedy, for what is no batch of images of this size."""
    if images.dim() != 4:
        raise ValueError(
            f"model takes a batch of images (B, C, H, W), got {images.dim()} dimensions; "
            "give a single image a batch dimension with image.unsqueeze(0)"
        )
    if images.shape[1] != channels:
        raise ValueError(
            f"model takes images of {channels} channels (B, C, H, W), got {images.shape[1]}; "
            "convert them, or create the model with this number as in_chans"
        )
    if images.shape[2] != size[0] or images.shape[3] != size[1]:
        raise ValueError(
            f"model takes images of {size[0]} x {size[1]} pixels (H x W), got "
            f"{images.shape[2]} x {images.shape[3]}; "
            "resize them, or create the model with this img_size"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"model takes normalised images of floating point numbers, got {images.dtype}; "
            "divide by 255, then subtract the mean and divide by the standard deviation"
        )


@register_notrace_function
def at_least_fp32(x: Tensor) -> Tensor:
    """The residual stream stays in fp32 whatever the activations are."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension; statistics in fp32, output as the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the dtype of the weight."""
        weight = self.weight
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps).to(weight.dtype)


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) to patch tokens (B, M, D) in row-major order; patches may overlap."""

    def __init__(self, options: ModelOptions, **factory: Any) -> None:
        super().__init__()
        self.img_size = options.size
        self.grid_size = options.grid
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(
            options.in_chans,
            options.embed_dim,
            kernel_size=options.patch_size,
            stride=options.step,
            **factory,
        )
        self.patch_size = options.patch_size
        self.overlapping = options.step != options.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to patch tokens (B, M, D).

        Raises:
            ValueError: no batch of images of the model's size and channels.
        """
        check_images(x, self.proj.in_channels, self.img_size)
        if self.overlapping:
            return self.proj(x).flatten(2).transpose(1, 2)
        # As a matrix product: convolutions of three channels are what libraries are slow at.
        height, width = self.grid_size
        side = self.patch_size
        x = x[:, :, : height * side, : width * side].unflatten(2, (height, side)).unflatten(4, (width, side))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """Pre-norm residual block: x + drop_path(mixer(norm(x)))."""

    adapter_calls: ClassVar[tuple[str, ...]] = ("update",)
    """Methods that rules of adapters may surround."""

    def __init__(self, dim: int, mixer: BiMambaMixer, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, flow: dict[str, Tensor] | None = None) -> Tensor:
        """Tokens (B, L, D) to (B, L, D); `flow` is what earlier layers hand on."""
        return self.update(x, flow)

    def update(self, x: Tensor, flow: dict[str, Tensor] | None = None) -> Tensor:
        """All that the block does, by a name that rules of adapters can surround; as `forward`."""
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript drops this branch only in this form)
            if self.has_norm_kernel(x):
                normed, x = add_rms_norm(None, x, self.norm.weight, self.norm.eps, self.mixer.backend)
                return x + self.branch(normed, flow)
        return x + self.branch(self.norm(x), flow)

    @torch.jit.ignore
    def has_norm_kernel(self, x: Tensor) -> bool:
        """Whether the backend of the mixer has a kernel for the norm of tokens `x`, and nothing is in its
        way: no tracing, no hooks on the norm, no other norm in its place."""
        if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return False
        return (
            isinstance(self.mixer, BiMambaMixer)
            and has_add_rms_norm(self.mixer.backend, x.device)
            and _is_only(RMSNorm.forward, self.norm)
        )

    def branch(self, normed: Tensor, flow: dict[str, Tensor] | None = None) -> Tensor:
        """What the block adds to its input, from the norm of that input."""
        return self.drop_path(self.mixer(normed, flow))


class Blocks(nn.Sequential):
    """Blocks in sequence.

    Where a backend has a kernel for it, each residual add is done together with the norm of the next
    block (`add_rms_norm`). No block then returns its sum, so hooks on blocks or their norms, tracing,
    and whoever calls the blocks one by one (gradient checkpointing, `forward_intermediates`) have the
    plain sequence. Hooks on mixers and all that is inside them run in both.
    """

    def forward(self, x: Tensor, flow: dict[str, Tensor] | None = None) -> Tensor:
        """Tokens (B, L, D) to (B, L, D); `flow` passes from layer to layer."""
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript drops this branch only in this form)
            if self._can_fuse(x):
                return self._forward_fused(x, flow)
        for block in self:
            x = block(x) if flow is None else block(x, flow)
        return x

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether every block can be taken apart, and the backend of its mixer has the kernel."""
        return all(
            isinstance(block, Block)
            and type(block).update is Block.update
            and _is_only(Block.forward, block)
            and block.has_norm_kernel(x)
            for block in self
        )

    def _forward_fused(self, x: Tensor, flow: dict[str, Tensor] | None) -> Tensor:
        branch = None
        with shared_effective_weights(self):
            for block in cast(Iterable[Block], self):
                norm = block.norm
                normed, x = add_rms_norm(branch, x, norm.weight, norm.eps, block.mixer.backend)
                branch = block.branch(normed, flow)
        return x if branch is None else x + branch


def _is_only(forward: Callable[..., Tensor], module: nn.Module) -> bool:
    """Whether calling `module` runs `forward` and nothing else: no hooks, no other forward in its place."""
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return not hooks and type(module).forward is forward and "forward" not in module.__dict__
