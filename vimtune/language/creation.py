"""Creating language models: by name, from the hub, from folders and files, or with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from vimtune import schema
from vimtune.adapters import note_casts
from vimtune.files import read_regular_file
from vimtune.hub_errors import HUB_ERRORS
from vimtune.language.acceleration import accelerate
from vimtune.language.configuration import config_of_entry, config_of_file
from vimtune.language.registry import LANGUAGE_MODELS
from vimtune.models.checkpoint import (
    CheckpointError,
    extract_state_dict,
    mismatches,
    read_checkpoint,
    unusable,
)
from vimtune.models.weights import RANDOM_WEIGHTS
from vimtune.text import printable, quote, suggest
from vimtune.weight_files import PLAIN_WEIGHTS

MODELS: dict[str, Any] = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
"""transformers' classes by family."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pt")
"""Where the weights of a folder are, in the order of preference; any of the names with ".index.json" behind
it says in which files they are."""


def create_language_model(
    name: str,
    *,
    pretrained: bool = True,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config_changes: Any,
) -> PreTrainedModel:
    """Create a Mamba or Mamba-2 language model of transformers, its mixers running on `vimtune.ops`.

    Args:
        name: a model of the table (`language_models()`), a repository of the Hugging Face hub ("owner/name"),
            a folder with config.json and weights, or a file of weights beside its config.json; in the layout
            of transformers or in the original one of mamba_ssm.
        pretrained: load the weights; random ones if False. Models without published weights, such as
            `mamba_tiny`, always have random ones.
        backend: scan backend, see `vimtune.ops`.
        device: where the parameters lie; torch's default if None. "meta" to count them alone.
        dtype: of the parameters; that of the weights if None.
        config_changes: fields of transformers' configuration that take other values.

    Returns:
        A `MambaForCausalLM` or `Mamba2ForCausalLM` in evaluation mode.

    Raises:
        ValueError: no such model, another architecture, a field that the configuration does not have, or
            weights that cannot be had or do not fit.
    """
    place = _find(name, pretrained)
    if place is None:
        config = config_of_entry(LANGUAGE_MODELS.get(name), config_changes)
    else:
        config = read_config(place, config_changes)
    model = _build(config, device, place if pretrained else None)
    if dtype is not None:
        cast(model, dtype)
    config.dtype = next(model.parameters()).dtype
    return accelerate(model.eval(), backend)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all parameters and buffers of a model this dtype, where they are of floating point numbers.

    An adapter of the model fits that of the file, too, for what the values were made from is remembered.
    """

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    model._apply(note_casts(model, convert))


def _find(name: str, pretrained: bool) -> Path | None:
    """The folder or file of a model; None if the table alone says what it is."""
    if name in LANGUAGE_MODELS:
        hub_id = LANGUAGE_MODELS.get(name).hub_id
        return None if hub_id is None or not pretrained else download(hub_id, pretrained)
    path = Path(name)
    if name and path.exists():  # the path of an empty name is the working folder
        return path
    if name.count("/") == 1 and path.suffix.lower() not in PLAIN_WEIGHTS:
        return download(name, pretrained)
    raise ValueError(
        f"unknown language model {quote(name)}.{suggest(name, LANGUAGE_MODELS)} Expected one of "
        f"{', '.join(LANGUAGE_MODELS)}, a repository of the hub (owner/name), or a folder or file that exists"
    )


def download(hub_id: str, weights: bool = True) -> Path:
    """The folder into which a repository of the hub has been downloaded, now or earlier.

    Args:
        hub_id: "owner/name".
        weights: the weights, too, and not the configuration alone.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*config.json"]))
        if not weights:
            return folder
        for patterns in (["*.safetensors", "*.safetensors.index.json"], ["pytorch_model*"]):
            folder = Path(snapshot_download(hub_id, allow_patterns=["*config.json", *patterns]))
            if _weight_files(folder):
                return folder
    except HUB_ERRORS as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"language model {quote(hub_id)} could not be downloaded ({printable(reason)}); give a folder "
            f"that has it (--model FOLDER), or {RANDOM_WEIGHTS}"
        ) from error
    raise ValueError(f"repository {quote(hub_id)} has no weights ({' or '.join(WEIGHT_FILES)})")


def read_config(place: Path, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a folder, or of a file of weights by the config.json beside it.

    Raises:
        ValueError: there is none, or it is not that of a Mamba or Mamba-2 model.
    """
    path = (place if place.is_dir() else place.parent) / "config.json"
    shown = printable(str(path))
    try:
        text = read_regular_file(path, schema.MAX_TEXT_BYTES).decode("utf-8")
        values = json.loads(text, object_hook=_special_float)
    except OSError as error:
        raise ValueError(
            f"{shown} cannot be read ({error.strerror}): the weights of a language model need it beside them"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{shown} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{shown} is not valid JSON: {schema.json_failure(error)}") from error
    return config_of_file(values, changes, shown)


def _special_float(values: dict[str, Any]) -> Any:
    """A number that is not finite in the form in which transformers writes it, {"__float__": "Infinity"}."""
    return float(str(values["__float__"])) if values.keys() == {"__float__"} else values


def _build(
    config: PreTrainedConfig, device: torch.device | str | None, place: Path | None
) -> PreTrainedModel:
    """The model with the weights of `place`, or with random ones."""
    kind = MODELS[config.model_type]
    if place is None:
        with torch.device(torch.get_default_device() if device is None else device):
            return kind(config)
    with torch.device("meta"):
        model = kind(config)
    load_weights(model, place)
    _read_generation_config(model, place)
    return model.to(device=torch.get_default_device() if device is None else device)


def load_weights(model: PreTrainedModel, place: Path) -> None:
    """Give a model, which may be on the meta device, the weights of a folder or file, on the CPU.

    Raises:
        CheckpointError: no weights, or weights that do not fit the model; it is then as it was.
    """
    files = _weight_files(place) if place.is_dir() else [place]
    shown = printable(str(place))
    if not files:
        raise CheckpointError(f"{shown} has no weights; expected {' or '.join(WEIGHT_FILES)}")
    content: dict[str, Any] = {}
    for file in files:
        content |= read_checkpoint(file)
    wanted = dict(model.named_parameters(remove_duplicate=True))
    state = _in_our_names(extract_state_dict(content, wanted))
    if (reason := _torn(model, state)) is not None:
        raise CheckpointError(f"{shown}: {reason}")
    problems = mismatches(state, wanted) or unusable(state, wanted)
    if problems:
        raise CheckpointError(f"{shown} does not fit its config.json: " + "; ".join(problems))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def _in_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout under transformers' names."""
    named = {}
    for name, value in state.items():
        if not name.startswith(("backbone.", "lm_head.")):
            name = f"backbone.{name}"  # a file without a head, of which nothing else would remain
        named[name.replace("backbone.embedding.", "backbone.embeddings.")] = value
    return named


def _torn(model: PreTrainedModel, state: dict[str, Tensor]) -> str | None:
    """Why a head that the file has cannot be the embedding, as the configuration says; None if it can. The
    head is taken from `state` then, for it is no parameter of its own."""
    embedding = state.get("backbone.embeddings.weight")
    if not model.config.tie_word_embeddings or embedding is None or "lm_head.weight" not in state:
        return None
    head = state.pop("lm_head.weight")
    if head.shape == embedding.shape and torch.equal(head, embedding):
        return None
    return (
        "lm_head.weight is not the embedding, which the configuration says it is: set tie_word_embeddings "
        "(tie_embeddings) to false"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, each one by a plain name."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _files_of_index(index)
    return []


def _files_of_index(index: Path) -> list[Path]:
    what = printable(str(index))
    text = read_regular_file(index, schema.MAX_TEXT_BYTES).decode("utf-8", "replace")
    values = schema.parse_json(text, what, CheckpointError)
    places = values.get("weight_map") if isinstance(values, dict) else None
    files = schema.check(dict[str, str], places, f"weight_map of {what}", CheckpointError)
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{what} names the file {quote(name)}, which is not beside it")
    return [index.parent / name for name in names]


def _read_generation_config(model: PreTrainedModel, place: Path) -> None:
    path = place / "generation_config.json"
    if not path.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(place, local_files_only=True)
    except Exception as error:  # OSError, TypeError and others, by what is wrong with the file
        reason = printable(str(error).strip().split("\n", 1)[0])
        raise ValueError(f"{printable(str(path))} cannot be used ({reason}): correct or remove it") from error
