"""In which forms an adapter is passed on: a format is a class here and a line in the table.

Each writes a folder as its readers expect it on the hub, with what it takes to load it from there.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vimtune.registry import Registry, require_complete
from vimtune.run_folder import ADAPTER_FILE, PEFT_CONFIG, PEFT_TENSORS
from vimtune.text import quote

if TYPE_CHECKING:
    import torch

    from vimtune.adapters import AdapterInfo


@dataclass(frozen=True)
class Source:
    """The adapter that is to be passed on."""

    adapter: Path
    """Its file."""
    info: AdapterInfo
    """What the file says about itself."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Where the base weights are now, see `Task.open_predictor`."""
    device: torch.device | None = None
    """Where it is computed; the CPU if None."""
    backend: str = "auto"
    """Scan backend, see `vimtune.ops`."""
    force: bool = False
    """Whether it is used although its base weights are others."""


class Format(ABC):
    """One form."""

    name: ClassVar[str]
    """Its name on the command line."""
    summary: ClassVar[str]
    """One line for the help."""
    library: ClassVar[str]
    """The library that reads it, as the hub calls it."""
    files: ClassVar[tuple[str, ...]]
    """Names of its files, or patterns; nothing else of a repository is downloaded."""
    whole_model: ClassVar[bool] = False
    """Whether what is written is a model by itself, and no adapter that needs its base."""

    def library_of(self, info: AdapterInfo) -> str:
        """The library that reads what is written of an adapter; `library`, unless that depends on it."""
        return self.library

    @abstractmethod
    def write(self, source: Source, folder: Path) -> str:
        """Write the files.

        Args:
            source: the adapter.
            folder: an empty folder.

        Returns:
            Python that loads them, in which "{place}" stands for the repository.

        Raises:
            ValueError: the format cannot express the adapter, or its base weights are not to be had.
        """


FORMATS: Registry[Format] = Registry("format")
"""The formats by name."""


class OwnFormat(Format):
    """vimtune's adapter file, which has weights, head, class names and preprocessing."""

    name = "vimtune"
    summary = "adapter file with head, class names and preprocessing, for vimtune"
    library = "vimtune"
    files = (ADAPTER_FILE,)

    def write(self, source: Source, folder: Path) -> str:
        if source.base:
            name, value = next(iter(source.base.items()))
            raise ValueError(
                f"{name} = {quote(str(value))}: format {self.name!r} keeps the adapter alone, and base "
                "weights are not read. Leave it out"
            )
        from safetensors.torch import save_file

        from vimtune.adapters import ADAPTER_FORMAT, read_adapter
        from vimtune.adapters.info import write_info
        from vimtune.exchange.local_paths import without_paths

        info, tensors = read_adapter(source.adapter)
        info = dataclasses.replace(info, extra=without_paths(info.extra))
        text = write_info(info, "what the adapter file says")
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": ADAPTER_FORMAT, "info": text})
        return (
            "from vimtune import load_predictor, pull\n"
            'predictor = load_predictor(pull("{place}", "downloaded"))'
        )


class PeftFormat(Format):
    """The format of HF peft."""

    name = "peft"
    summary = "LoRA, DoRA, OFT, C3A or IA3 in the format of HF peft"
    library = "peft"
    files = (PEFT_CONFIG, PEFT_TENSORS)

    def write(self, source: Source, folder: Path) -> str:
        from vimtune.exchange.base import base_on_hub, code_for_base
        from vimtune.exchange.peft.files import save_peft

        opened: Any = _opened(source)
        save_peft(opened.model, folder, base_model=base_on_hub(source.info))
        loading = 'from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, "{place}")'
        return f"{code_for_base(source.info)}\n{loading}"


class MergedFormat(Format):
    """Plain weights: of images for timm, of texts for transformers."""

    name = "merged"
    summary = "merged weights: timm's format for images, transformers' for texts"
    library = "timm"
    files = (
        "config.json",
        "model*.safetensors",
        "*.index.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    )
    whole_model = True

    def library_of(self, info: AdapterInfo) -> str:
        return "timm" if info.model else "transformers"

    def write(self, source: Source, folder: Path) -> str:
        import torch

        from vimtune.tasks.origin import task_of

        device = source.device or torch.device("cpu")
        task = task_of(source.info)
        return task.merge_to_share(source.adapter, folder, source.base, device, source.backend, source.force)


def _opened(source: Source) -> Any:
    """A predictor of the adapter's task, which has the model."""
    import torch

    from vimtune.tasks.origin import task_of

    return task_of(source.info).open_predictor(
        source.adapter, source.base, source.device or torch.device("cpu"), source.backend, source.force
    )


for _kind in (OwnFormat, PeftFormat, MergedFormat):
    require_complete(_kind, f"format {_kind.name!r}")
    FORMATS.add(_kind.name, _kind())
