"""The weights that this project publishes, by model and tag. Nothing here imports torch.

Small files lie inside the package. Larger ones lie in the folder `weights/` of the repository, beside the
package, and are found where the package runs from a checkout. Beside each file in the repository is a card,
`<model>.<tag>.md` in `weights/`, which says what the weights were made of and what they are not for.

A model may have several weights. Each has a tag, and `<model>.<tag>` is a name of the model with these
weights, in timm as in recipes and on the command line. The model's plain name means the weights that come
first here: a file that names a model without a tag was written when there were no others, so a new tag
is added after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vimtune.image_kinds import ImageKind

_PACKAGE = Path(__file__).parent / "weights"
"""The folder of the files inside the package."""
REPOSITORY = Path(__file__).parents[2] / "weights"
"""The folder of the other files and of all cards, in a checkout of the repository."""

RANDOM_WEIGHTS = "train from random weights (vimtune train --no-pretrained; in Python pretrained=False)"
"""What to do without published weights, for messages. These reach all commands that build a model, of which
not all have this flag, and whoever calls the functions."""
OTHER_WEIGHTS = f"give a file of weights (--checkpoint FILE; in Python load_checkpoint), or {RANDOM_WEIGHTS}"
"""The same where weights may come from a file."""


@dataclass(frozen=True)
class Weights:
    """Published weights of a model."""

    model: str
    """Name of the model."""
    tag: str
    """What tells these weights from others of the model."""
    summary: str
    """What they were trained on, for `--list`."""
    trained_on: ImageKind
    """What kind of images that was."""
    num_classes: int
    """Outputs of their head."""
    sha256: str
    """Hash of the file."""
    packaged: bool
    """Whether the file is part of the package."""

    @property
    def name(self) -> str:
        """Name of the model with these weights."""
        return f"{self.model}.{self.tag}"

    @property
    def path(self) -> Path:
        """Where the file is, or would be in a checkout."""
        return (_PACKAGE if self.packaged else REPOSITORY) / f"{self.name}.safetensors"

    @property
    def card(self) -> Path:
        """Where the card is in a checkout."""
        return REPOSITORY / f"{self.name}.md"


WEIGHTS = (
    Weights(
        "vim_nano_patch8_64",
        "synthetic_flowers",
        "512 species of generated flowers",
        "generated drawings",
        512,
        "cb3650099476ab97baf8609179ac13d2d4ec16d853e48f15876a09962ff9163b",
        packaged=True,
    ),
    Weights(
        "vim_tiny_patch8_64",
        "tiny_in200",
        "the 200 classes of Tiny-ImageNet",
        "photographs",
        200,
        "9a01f90aab199a6b557d0f06badafb88df2fa5d5b6486e0b80eefe62d5a97d4f",
        packaged=False,
    ),
    Weights(
        "vim_nano_patch8_64",
        "tiny_in200",
        "the 200 classes of Tiny-ImageNet",
        "photographs",
        200,
        "4f76211e4f9829dfe71bf41f78b3dda1635457958010d2d08d5592f43c9959e3",
        packaged=True,
    ),
)
"""All weights; of a model's several the first ones are those of its plain name."""


DEFAULT_MODEL = next(
    (weights.name for weights in WEIGHTS if weights.packaged and weights.trained_on == "photographs"),
    WEIGHTS[0].model,
)
"""The model with which recipes begin: one whose weights come with the package and have seen photographs, for
features of photographs are a start for drawings, too; while there are none, that of the first weights."""


def weights_of(name: str) -> Weights | None:
    """The weights that a model's name stands for, with or without a tag; None if there are none here."""
    return next((weights for weights in WEIGHTS if name in (weights.model, weights.name)), None)
