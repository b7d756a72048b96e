"""Merge an adapter of images into a file of plain weights, and prove that nothing changed.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vimtune import adapters
from vimtune.adapters import read_adapter_info
from vimtune.files import OutputError
from vimtune.models import MODELS, create_listed_model
from vimtune.models.merged import MergedInfo, read_merged, write_merged
from vimtune.ops import use_backend
from vimtune.output import check_output, write_output
from vimtune.preprocessing import Preprocessing
from vimtune.run_folder import MERGED
from vimtune.schema import check
from vimtune.tasks.images.predictor import load_image_predictor
from vimtune.tasks.merging import Merged, Precision, dtype_of, prove
from vimtune.tasks.origin import find_base
from vimtune.text import quote
from vimtune.weight_files import SAFETENSORS

NUM_IMAGES = 8
"""Random images on which the merged model has to compute what base and adapter do."""


def merge_images(
    adapter: Path,
    output: Path,
    checkpoint: Path | None,
    device: torch.device,
    backend: str,
    force: bool,
    precision: Precision,
    task: str,
) -> Merged:
    """Write the merged weights as plain safetensors and check the file that was written.

    The file (see `vimtune.models.merged`) is read back into a fresh model without adapters and has to give
    the logits of base plus adapter; otherwise no file is left behind.

    Args:
        adapter: the file.
        output: the .safetensors file to write.
        checkpoint: base weights of the adapter; those it was trained on if None.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        force: merge although the base weights differ from those that the adapter was trained on.
        precision: type of the weights in the file.
        task: name of the task of which the adapter is.

    Raises:
        ValueError: the adapter cannot be loaded, or `output` cannot be a weights file.
        MergeError: the logits differ by more than rounding explains.
    """
    info = read_adapter_info(adapter)
    base = find_base(adapter, info) if checkpoint is None else checkpoint
    check_output(output, (SAFETENSORS,), [adapter] if base is None else [adapter, base])
    if not _is_utf8(output.absolute()):
        raise OutputError(
            f"cannot write {quote(str(output))}: its path is not UTF-8, as safetensors needs it"
        )
    predictor = load_image_predictor(adapter, checkpoint=base, device=device, backend=backend, force=force)
    config: Any = predictor.model.pretrained_cfg
    shape = (NUM_IMAGES, config["input_size"][0], *predictor.transform.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = predictor.logits(images)
    merged: Any = adapters.merge(predictor.model).to(dtype_of(precision))
    written = MergedInfo(
        model=MODELS.get(info.model["name"]).architecture,
        options={**merged.creation["kwargs"], "num_classes": merged.num_classes},
        classes=info.classes,
        preprocessing=predictor.transform.config,
        task=task,
    )
    results: list[Merged] = []

    def write(temporary: Path) -> None:
        write_merged(temporary, merged.state_dict(), written)
        fresh, _ = read_merged(temporary)
        fresh = fresh.to(predictor.device).eval()
        with torch.no_grad(), use_backend(backend):
            logits = fresh(images.to(predictor.device))
        proof = prove(logits, expected, f"{NUM_IMAGES} replayed images", precision)
        results.append(Merged(written.model, proof, _loading_code(output, written)))

    write_output(output, write)
    return results[0]


def merge_for_timm(
    adapter: Path,
    folder: Path,
    checkpoint: Path | None,
    device: torch.device,
    backend: str,
    force: bool,
    task: str,
) -> str:
    """Write model.safetensors and config.json, as `timm.create_model("hf-hub:user/name")` reads them.

    Args:
        adapter: the file.
        folder: an empty folder.
        checkpoint, device, backend, force, task: as for `merge_images`.

    Returns:
        Python that loads them, with "{place}" for the repository.

    Raises:
        ValueError: as `merge_images`.
    """
    merge_images(adapter, folder / MERGED, checkpoint, device, backend, force, "fp32", task)
    model, info = read_merged(folder / MERGED)
    settings = check(Preprocessing, info.preprocessing, "the preprocessing")
    config: Any = model.pretrained_cfg
    # timm rounds its own way, which differs by a pixel at most.
    crop_mode = "center" if settings.crop_mode == "center_rounded" else settings.crop_mode
    pretrained = {
        "input_size": [config["input_size"][0], *settings.img_size],
        "fixed_input_size": True,
        **{name: getattr(settings, name) for name in ("mean", "std", "interpolation", "crop_pct")},
        "crop_mode": crop_mode,
        "num_classes": model.num_classes,
        "first_conv": config["first_conv"],
        "classifier": config["classifier"],
        "custom_load": False,
        **({"label_names": info.classes} if info.classes else {}),
    }
    values = {
        "architecture": info.model,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {
            name: value for name, value in _unusual_options(info).items() if name != "num_classes"
        },
        "pretrained_cfg": pretrained,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return 'import timm, vimtune\nmodel = timm.create_model("hf-hub:{place}", pretrained=True)'


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _loading_code(path: Path, info: MergedInfo) -> str:
    """Python that loads a merged file as a plain model, with timm's own loader."""
    arguments = {"checkpoint_path": str(path), **_unusual_options(info)}
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"import timm, vimtune\nmodel = timm.create_model({info.model!r}, {shown})"


def _unusual_options(info: MergedInfo) -> dict[str, Any]:
    """The options of a merged model in which it differs from what its name stands for."""
    with torch.device("meta"):  # Only the options are of interest.
        usual = create_listed_model(info.model, {}).creation["kwargs"]
    return {name: value for name, value in info.options.items() if name not in usual or value != usual[name]}
