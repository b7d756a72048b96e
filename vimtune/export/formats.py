"""What a format of exported files is, and which ones there are.

Shape letters: B batch, C classes, H and W height and width.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vimtune.weight_files import ONNX, PT2

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMATS = {
    ONNX: "vimtune.export.onnx_format.OnnxFormat",
    PT2: "vimtune.export.pt2_format.Pt2Format",
}
"""The formats by the ending of their files' names -> class."""

INPUT, OUTPUT = "images", "logits"
"""Names of what goes into an exported graph and of what comes out."""


@dataclass(frozen=True)
class About:
    """What a file says besides the graph, as plain values."""

    task: str
    """What the model was trained for, such as "classification". Probabilities are the softmax of the logits,
    and for "multilabel", where an image may have several labels, their sigmoids."""
    model: str
    """Name of the model in the registry."""
    options: dict[str, Any]
    """Arguments of its creation."""
    classes: list[str]
    """Names of the classes, one for each logit."""
    preprocessing: dict[str, Any]
    """How an image becomes an input: "img_size" (height, width), "crop_pct", "crop_mode", "interpolation",
    and for values in [0, 1] "mean" and "std"; `vimtune.data.transforms` says what they mean."""

    def metadata(self) -> dict[str, str]:
        """The same as texts: texts as they are, the rest as JSON."""
        values = asdict(self)
        return {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()
        }


class ExportFormat(ABC):
    """A kind of files that other programs run."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages of the extra `export` that writing and checking need."""

    @abstractmethod
    def write(self, model: nn.Module, image: Sequence[int], about: About, path: Path) -> None:
        """Write a model.

        Args:
            model: in evaluation mode, on the CPU; it takes images (B, *image) for any B and gives (B, C).
            image: shape of one image: channels, height, width.
            about: what is written beside it.
            path: the file.
        """

    @abstractmethod
    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """A function that runs a file: images (B, channels, H, W) to logits (B, C), fp32 on the CPU."""


def format_of(path: Path) -> ExportFormat:
    """The format that the name of a file asks for.

    Raises:
        ValueError: what it needs is not installed; the message says how to install it.
    """
    suffix = path.suffix.lower()
    module, _, name = FORMATS[suffix].rpartition(".")
    kind: type[ExportFormat] = getattr(import_module(module), name)
    missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"a file {suffix} needs {', '.join(missing)}: pip install 'vimtune[export]' (or name a file "
            f"{PT2}, which needs torch alone)"
        )
    return kind()
