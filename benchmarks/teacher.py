"""A convolutional network for small images: the teacher of configs/tiny_imagenet_pretrain.yaml.

    python train_vim.py --import benchmarks.teacher --config configs/tiny_imagenet_pretrain.yaml \\
        --variant teacher

It is a model of a user's own package: importing this module makes it known to recipes, commands and files.
`resnet_gn_64` is timm's ResNet with two changes. It begins with one convolution of 3 x 3 where ResNet reduces
images fourfold, because those of 64 pixels have no detail to lose; and it has group normalisation (Wu & He
2018, arXiv 1803.08494), whose whole state are its parameters, where ResNet has running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le, Len
from timm.layers import GroupNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import vimtune
from vimtune.schema import STRICT

STEM_WIDTH = 64
"""Channels after the first convolution."""

Blocks = Annotated[int, Ge(1), Le(50)]
"""Number of blocks of a stage."""


@dataclass
class TeacherOptions:
    """What recipes and files may say about the model."""

    __pydantic_config__: ClassVar[Any] = STRICT

    num_classes: Annotated[int, Ge(0), Le(100_000)] = 200
    drop_path_rate: Annotated[float, Ge(0), Le(0.9)] = 0.0
    stem_stride: Annotated[int, Ge(1), Le(2)] = 1
    """Step of the first convolution. With 2 all costs a fourth."""
    layers: Annotated[list[Blocks], Len(4, 4)] = field(default_factory=lambda: [2, 2, 2, 2])
    """Blocks of each stage, [2, 2, 2, 2] as in ResNet-18, [3, 4, 6, 3] as in ResNet-34."""


default_cfgs = generate_default_cfgs(
    {
        "resnet_gn_64": {
            "input_size": (3, 64, 64),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "num_classes": 200,
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)
"""timm's configuration of the model: what images it takes."""


@register_model
def resnet_gn_64(
    pretrained: bool = False, stem_stride: int = 1, layers: tuple[int, ...] = (2, 2, 2, 2), **kwargs: Any
) -> ResNet:
    """ResNet of basic blocks for images of 64 pixels, with group normalisation."""
    model: ResNet = build_model_with_cfg(
        ResNet,
        "resnet_gn_64",
        pretrained,
        block=BasicBlock,
        layers=tuple(layers),
        norm_layer=partial(GroupNorm, num_groups=32),
        **kwargs,
    )
    model.conv1 = nn.Conv2d(3, STEM_WIDTH, 3, stem_stride, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


vimtune.register_model(
    "resnet_gn_64",
    summary="ResNet for images of 64 pixels, 11 M parameters: a teacher",
    options=TeacherOptions,
)
