"""A convolutional network for small images: the teacher of configs/tiny_imagenet_pretrain.yaml.

    python train_vim.py --import benchmarks.teacher --config configs/tiny_imagenet_pretrain.yaml \\
        --variant teacher

It is a model of a user's own package: importing this module makes it known to recipes, commands and files.
`resnet_gn_64` is timm's ResNet with three changes. Its first stage sees the images of 64 pixels in full,
where ResNet reduces its larger ones fourfold before. It has group normalisation (Wu & He 2018, arXiv
1803.08494), whose whole state are its parameters, where ResNet has running statistics. And it standardises
the weights of its convolutions (Qiao et al. 2019, arXiv 1903.10520), with which group normalisation learns
about as well as batch normalisation does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le, Len
from timm.layers import GroupNorm, StdConv2d
from timm.layers.fast_norm import fast_group_norm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import vimtune
from vimtune.schema import STRICT

Blocks = Annotated[int, Ge(1), Le(50)]
"""Number of blocks of a stage."""


@dataclass
class TeacherOptions:
    """What recipes and files may say about the model."""

    __pydantic_config__: ClassVar[Any] = STRICT

    num_classes: Annotated[int, Ge(0), Le(100_000)] = 200
    drop_path_rate: Annotated[float, Ge(0), Le(0.9)] = 0.0
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


class Norm(GroupNorm):
    """Group normalisation in the precision of autocast; torch would cast the images to fp32 and back."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W)."""
        normalised: Tensor = fast_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return normalised


@register_model
def resnet_gn_64(pretrained: bool = False, layers: tuple[int, ...] = (2, 2, 2, 2), **kwargs: Any) -> ResNet:
    """ResNet of basic blocks for images of 64 pixels, with group normalisation and standardised weights."""
    model: ResNet = build_model_with_cfg(
        ResNet,
        "resnet_gn_64",
        pretrained,
        block=BasicBlock,
        layers=tuple(layers),
        norm_layer=Norm,
        **kwargs,
    )
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Sequential()
    standardise(model)
    return model


def standardise(module: nn.Module) -> None:
    """Replace the convolutions inside of `module` by ones that standardise their weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            twin = StdConv2d(child.in_channels, child.out_channels, child.kernel_size[0], child.stride[0])
            twin.load_state_dict(child.state_dict())
            setattr(module, name, twin)
        else:
            standardise(child)


vimtune.register_model(
    "resnet_gn_64",
    summary="ResNet for images of 64 pixels, 11 M parameters: a teacher",
    options=TeacherOptions,
)
