"""The models by name, and what files and recipes may say about them. Nothing here imports torch.

A file or a recipe may come from anybody, and what it says about a model becomes arguments of a function. So
it may name the models of this table alone, which are no addresses to load something from, and give the
options alone that the schema of that model has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vimtune.models.weights import WEIGHTS, weights_of
from vimtune.registry import Registry
from vimtune.text import quote, suggest


def _options_of_vim() -> type:
    from vimtune.models.options import ModelOptions  # This comes late: `--list` does without the schema.

    return ModelOptions


@dataclass(frozen=True)
class ModelEntry:
    """What is known about a model before it is created."""

    name: str
    """Its name in timm's registry."""
    summary: str
    """One line for `--list`."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Options in which it differs from the defaults of its class."""
    load_options: Callable[[], type] = _options_of_vim
    """Gives the dataclass whose fields are the options that files and recipes may set."""
    origin: str = "vimtune.models.vim"
    """Where it is defined: another definition may not take its name, a new version of the same may."""

    @property
    def architecture(self) -> str:
        """The name without the tag that says with which weights the model begins."""
        weights = weights_of(self.name)
        return self.name if weights is None else weights.model


MODELS: Registry[ModelEntry] = Registry("model")
"""All models by name."""

TINY = {"embed_dim": 192, "depth": 24}
"""Sizes of Vim-Ti (Zhu et al. 2024, arXiv 2401.09417)."""
SMALL = {"embed_dim": 384, "depth": 24}
"""Sizes of Vim-S."""
BASE = {"embed_dim": 768, "depth": 24}
"""Sizes of Vim-B."""
NANO = {"embed_dim": 96, "depth": 12}
"""Sizes of a model of our own that can be trained on a CPU."""
PATCH8_64 = {"img_size": 64, "patch_size": 8}
"""Sizes for images of 64 pixels, which patches of 8 pixels cut into 64."""

VIM_MODELS = (
    ModelEntry("vim_tiny_patch16_224", "Vim-Ti, 7 M parameters, 196 patches", TINY),
    ModelEntry(
        "vim_tiny_patch16_stride8_224",
        "Vim-Ti+, overlapping patches of stride 8, 729 patches",
        {**TINY, "stride": 8},
    ),
    ModelEntry("vim_small_patch16_224", "Vim-S, 26 M parameters, 196 patches", SMALL),
    ModelEntry(
        "vim_small_patch16_stride8_224",
        "Vim-S+, overlapping patches of stride 8, 729 patches",
        {**SMALL, "stride": 8},
    ),
    ModelEntry("vim_base_patch16_224", "Vim-B, 98 M parameters, 196 patches", BASE),
    ModelEntry(
        "vim_tiny_patch8_64",
        "Vim-Ti for images of 64 pixels, 7 M parameters, 64 patches",
        {**TINY, **PATCH8_64},
    ),
    ModelEntry(
        "vim_nano_patch8_64",
        "Vim-nano for images of 64 pixels, 1 M parameters: trains on a CPU",
        {**NANO, **PATCH8_64},
    ),
    ModelEntry(
        "test_vim",
        "For tests: 20 thousand parameters, images of 32 pixels",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3},
    ),
)
"""The models of `vimtune.models.vim`, which makes each of them known to timm."""

for _entry in VIM_MODELS:
    MODELS.add(_entry.name, _entry)
for _weights in WEIGHTS:
    _plain = next(_entry for _entry in VIM_MODELS if _entry.name == _weights.model)
    _summary = f"{_weights.model} with weights of {_weights.summary}"
    MODELS.add(_weights.name, dataclasses.replace(_plain, name=_weights.name, summary=_summary))


def register_model(name: str, *, summary: str, options: type) -> None:
    """Make a model of your own known to recipes, commands, `--list`, `predict` and adapter files.

    Register it with timm under the same name (`timm.models.register_model`). vimtune creates it by
    `timm.create_model(name, pretrained=..., num_classes=..., **options)` and needs of it what timm's models
    have: `pretrained_cfg` with "input_size" (channels, height, width), "mean" and "std", `num_classes`,
    `get_classifier()`, and a forward pass from images (B, C, H, W) to logits (B, num_classes). The size of
    the images is looked up in the `default_cfgs` of its module (`timm.models.generate_default_cfgs`); without
    these the model is created once more, to be asked for it. `create_listed_model` refuses a model
    that lacks the attributes, and supplies two that may be missing: `creation`, the name and the options
    given, and a `set_grad_checkpointing` that refuses to be switched on.

    Args:
        name: its name in timm's registry.
        summary: one line for `--list`.
        options: a dataclass whose fields are the options that recipes and files may set, each with a type and
            a default. It has `num_classes`, and `img_size` and `drop_path_rate` if the recipe's keys img_size
            and drop_path may be given. An `img_size: int` gets the side of square images; any other type gets
            (height, width). Set `__pydantic_config__ = vimtune.schema.STRICT` on it to refuse
            values of other types instead of converting them.

    Raises:
        ValueError: the name is taken, the summary is no line, or `options` is no dataclass with
            `num_classes`.
    """
    if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
        raise ValueError(
            f"model {quote(name)}: summary = {quote(summary)}: expected one line that --list shows"
        )
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        raise ValueError(f"model {quote(name)}: options = {quote(options)}: expected a dataclass")
    if "num_classes" not in {item.name for item in dataclasses.fields(options)}:
        raise ValueError(
            f"model {quote(name)}: {options.__name__} needs a field num_classes, the outputs of the head"
        )
    origin = f"{options.__module__}.{options.__qualname__}"
    MODELS.add(name, ModelEntry(name, summary, load_options=lambda: options, origin=origin))


def list_models() -> dict[str, str]:
    """Names of all models with a line each."""
    return {name: entry.summary for name, entry in MODELS.items()}


def option_names(name: str) -> tuple[str, ...]:
    """Names of the options of a model.

    Raises:
        ValueError: unknown model.
    """
    return tuple(item.name for item in dataclasses.fields(MODELS.get(name).load_options()))


def check_model_name(name: Any, what: str = "the model", error: type[ValueError] = ValueError) -> str:
    """`name` if it is a model of the table, and so no address to load something from.

    Raises:
        ValueError: (or the subclass `error`) it is not.
    """
    if not isinstance(name, str) or name not in MODELS:
        raise error(
            f"{what}: expected a known model, found {quote(name)}.{MODELS.hints(name)} "
            f"Known: {', '.join(MODELS)}"
        )
    return name


def check_model_options(
    name: str,
    options: Any,
    what: str = "the set of model options",
    error: type[ValueError] = ValueError,
) -> dict[str, Any]:
    """Options that a file or a recipe gives for a model, each compared with its schema; none is added.

    Raises:
        ValueError: (or the subclass `error`) something that is no option, or a value out of range.
    """
    if not isinstance(options, Mapping):
        raise error(f"{what}: expected a mapping of options, found {quote(options)}")
    # Most recipes give none, and then the schema, which takes a while to build, is not needed.
    if not options:
        return {}
    known = option_names(name)
    for key in options:
        if key not in known:
            raise error(
                f"{what}: unknown model option {quote(key)}.{suggest(str(key), known)} "
                f"Known: {', '.join(known)}"
            )
    from vimtune.schema import check

    checked: Any = check(MODELS.get(name).load_options(), dict(options), what, error)
    return {key: getattr(checked, key) for key in options}


def check_creation(creation: Any, what: str, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """What a file says about the creation of a model: {"name": ..., "kwargs": ...}, or {} for nothing.

    Raises:
        ValueError: (or the subclass `error`) anything else, a model that is not in the table, or a wrong
            option.
    """
    if creation == {}:
        return {}
    if not isinstance(creation, Mapping) or set(creation) != {"name", "kwargs"}:
        raise error(f"{what}: expected the name and the kwargs of a model, found {quote(creation)}")
    name = check_model_name(creation["name"], what, error)
    options = check_model_options(name, creation["kwargs"], f"{what}: the set of model options", error)
    return {"name": name, "kwargs": options}
