"""The options of a Vision Mamba model: one schema for its constructor, for recipes and for files.

Each option has its type and its range, and everything else is refused: options of timm's factory
(`pretrained_cfg`, `cache_dir`, ...) say what to download and where to write it. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt

from vimtune.schema import STRICT

MAX_PARAMETERS = 2**32
"""Most parameters that a model may have: 16 GiB in fp32, some forty times Vim-base."""
MAX_PATCHES = 2**18
"""Most patches that an image may have."""

Pixels = Annotated[int, Ge(1), Le(2**14)]
"""A number of pixels along one side."""
Width = Annotated[int, Ge(1), Le(2**14)]
"""A number of channels, or a rank."""
Rate = Annotated[float, Ge(0), Lt(1)]
"""A probability of dropping something; at 1 nothing would be left."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Arguments of `VisionMamba`, which explains them; the defaults are the same."""

    __pydantic_config__: ClassVar[Any] = STRICT

    img_size: Pixels | tuple[Pixels, Pixels] = 224
    patch_size: Pixels = 16
    stride: Pixels | None = None
    in_chans: Annotated[int, Ge(1), Le(1024)] = 3
    num_classes: Annotated[int, Ge(0), Le(2**24)] = 1000
    global_pool: Literal["token", "avg", ""] = "token"
    embed_dim: Width = 192
    depth: Annotated[int, Ge(1), Le(1024)] = 24
    d_state: Annotated[int, Ge(1), Le(1024)] = 16
    d_conv: Annotated[int, Ge(1), Le(256)] = 4
    expand: Annotated[int, Ge(1), Le(64)] = 2
    dt_rank: Width | None = None
    initial_state: bool = False
    drop_rate: Rate = 0.0
    pos_drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    backend: str = "auto"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def step(self) -> int:
        """Distance between patches in pixels."""
        return self.patch_size if self.stride is None else self.stride

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row of the image."""
        height, width = ((side - self.patch_size) // self.step + 1 for side in self.size)
        return height, width

    @property
    def rank(self) -> int:
        """Rank of the time step projection."""
        return math.ceil(self.embed_dim / 16) if self.dt_rank is None else self.dt_rank

    @property
    def num_parameters(self) -> int:
        """Numbers that the model's parameters hold."""
        D, E, N, R = self.embed_dim, self.expand * self.embed_dim, self.d_state, self.rank
        direction = E * (N + 1 + self.d_conv + 1 + R + 2 * N + R + 1)
        if self.initial_state:
            direction += E * (N + self.d_conv - 1)
        stem = D * (self.in_chans * self.patch_size**2 + 1) + D * (math.prod(self.grid) + 2)
        head = (D + 1) * self.num_classes
        return stem + self.depth * (2 * direction + 3 * D * E + D) + D + head

    def check_sizes(self) -> None:
        """Raise ValueError when sizes do not fit together or the model would be enormous."""
        if min(self.size) < self.patch_size:
            raise ValueError(f"img_size {self.size} is smaller than patch_size {self.patch_size}")
        if math.prod(self.grid) > MAX_PATCHES:
            raise ValueError(
                f"images of {self.size[0]} x {self.size[1]} pixels have {math.prod(self.grid):,} patches, "
                f"at most {MAX_PATCHES:,} are possible: choose a smaller img_size or larger patches"
            )
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"a model with these options has {self.num_parameters:,} parameters, at most "
                f"{MAX_PARAMETERS:,} are possible: choose smaller sizes"
            )


OPTIONS = tuple(field.name for field in fields(ModelOptions))
"""Names of all options."""
ARCHITECTURE = (
    "patch_size", "stride", "in_chans", "embed_dim", "depth", "d_state", "d_conv", "expand", "dt_rank",
    "initial_state",
)  # fmt: skip
"""Names of the options that decide which weights there are and how they are used; `img_size` does not."""
