"""Vision Mamba (Vim) for timm's registry (Zhu et al. 2024, arXiv 2401.09417).

Same function and parameter keys as the official implementation with its published settings: class
token in the middle of the sequence, absolute position embedding, RMSNorm, pre-norm residual in fp32.

Shape letters: B batch, L tokens (patches and class token), M patches, D width.
"""

import logging
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vimtune.adapters import (
    has_call_rules,
    head_has_rules,
    inject,
    note_casts,
    note_loading,
    note_seed,
)
from vimtune.adapters.slots import WeightSlot
from vimtune.fields import options_of
from vimtune.methods import METHODS
from vimtune.models.checkpoint import checkpoint_filter_fn, pretrained_loading
from vimtune.models.fetching import name_the_file
from vimtune.models.layers import Block, Blocks, PatchEmbed, RMSNorm, at_least_fp32
from vimtune.models.mixer import BiMambaMixer
from vimtune.models.options import OPTIONS, ModelOptions
from vimtune.models.registry import VIM_MODELS, ModelEntry
from vimtune.models.weights import WEIGHTS, weights_of
from vimtune.ops import backend_names, bidirectional_scan, bidirectional_scan_from, with_chosen_backend
from vimtune.schema import check
from vimtune.text import quote, suggest

__all__ = ["VisionMamba"]

logger = logging.getLogger(__name__)

INITIALISATION = 1
"""Number of the rule by which weights are drawn at random; another rule gets another number.

Adapters trained on random weights know those by the seed, which means other weights under another rule.
"""

register_notrace_module(WeightSlot)  # The value of a parameter under an adapter is one node of an FX graph.
# They look at shapes and devices, so each is one node of an FX graph.
register_notrace_function(bidirectional_scan)
register_notrace_function(bidirectional_scan_from)


def _resolve_options(values: Mapping[str, Any]) -> ModelOptions:
    """The constructor's arguments, checked.

    Raises:
        ValueError: a value of another type or out of range, or sizes that do not fit together.
    """
    plain = {name: _plain(value) for name, value in values.items()}
    options = check(ModelOptions, plain, "the set of model options")
    options.check_sizes()
    if options.backend not in backend_names():
        raise ValueError(
            f"unknown backend {quote(options.backend)}.{suggest(options.backend, backend_names())} "
            f"Known: {', '.join(backend_names())}"
        )
    return options


def _plain(value: Any) -> Any:
    """Whole numbers of other libraries as Python's."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
    return operator.index(value)


_UNDECAYED = {"pos_embed", "cls_token", *BiMambaMixer.undecayed}
"""Names of the parameters that weight decay leaves alone."""


class Flow(dict[str, Tensor]):
    """What the layers of a forward pass hand on.

    A class of its own is one thing to torch.utils._pytree, of which FSDP makes use: of a plain dictionary
    each block would get a copy, and what it writes there would be lost.
    """


class VisionMamba(nn.Module):
    """Vision Mamba with timm's model interface and the official parameter keys."""

    adapter_calls: ClassVar[tuple[str, ...]] = ("encode",)
    """Methods that rules of adapters may surround."""
    directions: ClassVar[int] = 2
    """The blocks go through the tokens in both directions."""
    batch_first: ClassVar[bool] = True
    """All layers are given (B, ...)."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        initial_state: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build a randomly initialised model.

        Args:
            img_size: height and width of the images in pixels; an int means square.
            patch_size: side of a patch in pixels.
            stride: distance between patches in pixels; `patch_size` if None, smaller makes them overlap.
            in_chans: image channels.
            num_classes: outputs of the head; 0 leaves the head out.
            global_pool: "token" (the class token, as trained), "avg" (mean of the patch tokens) or "".
            embed_dim: D.
            depth: number of blocks.
            d_state: states per channel.
            d_conv: width of the causal convolution.
            expand: inner width over D.
            dt_rank: rank of the time step projection; ceil(D / 16) if None.
            initial_state: whether the scans of each block begin with a state and a convolution tail, which
                are parameters, zeros at first.
            drop_rate: dropout before the head.
            pos_drop_rate: dropout after the position embedding.
            drop_path_rate: stochastic depth of the last block; grows linearly from 0.
            backend: scan backend, see `vimtune.ops`.
            device: where the parameters lie; torch's default if None.
            dtype: of the parameters; torch's default if None.

        Raises:
            ValueError: a value of another type or out of range (`vimtune.models.options` has the ranges),
                sizes that do not fit together, or an unknown backend.
        """
        given = locals()
        options = _resolve_options({name: given[name] for name in OPTIONS})
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        generator = torch.get_rng_state()
        self.num_classes = options.num_classes
        self.in_chans = options.in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = options.embed_dim
        self.global_pool = global_pool
        self.grad_checkpointing = False

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
        self.patch_embed = PatchEmbed(options, **factory)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim, **factory))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        build_mixer = partial(
            BiMambaMixer,
            embed_dim,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            initial_state=initial_state,
            num_residuals=depth,
            backend=backend,
            **factory,
        )
        # A sequence has the keys `layers.0`, ... and can be scripted, sliced and checkpointed.
        self.layers = Blocks(
            *(
                Block(embed_dim, build_mixer(), drop_path_rate * index / max(depth - 1, 1), **factory)
                for index in range(depth)
            )
        )
        self.norm_f = RMSNorm(embed_dim, **factory)
        self.feature_info = [
            {"module": f"layers.{index}", "num_chs": embed_dim, "reduction": options.step}
            for index in range(depth)
        ]
        self._init_weights()
        self.options = {**asdict(options), "stride": options.step, "dt_rank": options.rank}
        """All arguments besides device and dtype, resolved, as plain values."""
        note_seed(self, generator, partial(VisionMamba, **self.options), INITIALISATION)

    def _init_weights(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def cls_position(self) -> int:
        """Index of the class token in the sequence."""
        return self.patch_embed.num_patches // 2

    # timm's model interface

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimiser should not decay (timm's hook)."""
        # In an adapted model the names of the tensors that take the place of these contain their names.
        return {name for name, _ in self.named_parameters() if not _UNDECAYED.isdisjoint(name.split("."))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort the parameters into the stem and the blocks, for timm's layer decay.

        Args:
            coarse: part of timm's signature; the groups are the same either way.
        """
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each block is computed again in the backward pass, which saves memory for time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head; `nn.Identity` if the model has none."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one of `num_classes` outputs (0: none) and, if given, the pooling.

        Raises:
            ValueError: the head is owned by an adapter (`merge` or delete the adapters first), or no number
                of classes or no pooling.
        """
        if head_has_rules(self):
            raise ValueError(
                "the head belongs to an adapter: merge or delete the adapters before replacing it"
            )
        options = _resolve_options(
            {
                **self.options,
                "num_classes": num_classes,
                "global_pool": self.global_pool if global_pool is None else global_pool,
            }
        )
        self.num_classes = num_classes
        self.global_pool = self.options["global_pool"] = options.global_pool
        place: dict[str, Any] = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **place) if num_classes > 0 else nn.Identity()
        self._init_head()

    @torch.jit.ignore
    def follow_options(self) -> None:
        """Have the parameters that `options` ask for, where merging an adapter or undoing it has changed
        them."""
        for block in cast(Iterable[Block], self.layers):
            block.mixer.set_initial_state(self.options["initial_state"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VisionMamba":
        return super()._apply(note_casts(self, fn), recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        note_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _embed(self, x: Tensor) -> Tensor:
        """Image to tokens (B, M + 1, D) with the class token in the middle, in at least fp32."""
        x = self.patch_embed(x)
        position = self.patch_embed.num_patches // 2
        cls_token = self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
        x = torch.cat([x[:, :position], cls_token, x[:, position:]], dim=1)
        return self.pos_drop(at_least_fp32(x) + self.pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to normalised tokens (B, M + 1, D), the class token at `cls_position`."""
        return self.norm_f(self.encode(self._embed(x), self._new_flow())[-1])

    @torch.jit.ignore
    def _new_flow(self) -> dict[str, Tensor] | None:
        """A place for what layers hand on.

        A model without rules for calls has none and calls its blocks with the tokens alone, so that they may
        be replaced by any module."""
        return Flow() if has_call_rules(self) else None

    def encode(
        self,
        tokens: Tensor,
        flow: dict[str, Tensor] | None = None,
        take: list[int] | None = None,
        depth: int | None = None,
    ) -> list[Tensor]:
        """Tokens through the blocks, the one way for all that uses them; rules of adapters may surround it.

        Args:
            tokens: (B, L, D).
            flow: what one layer hands on to later ones, the same mapping for all layers of a forward pass.
                The plain model writes nothing there. Whoever does writes under a name of its own layer, so
                that a layer that is recomputed (gradient checkpointing) finds what it found before.
            take: indices of blocks whose outputs are wanted besides the last one; none if None.
            depth: how many blocks to run; all if None.

        Returns:
            The outputs of the blocks in `take`, then that of the last block, each (B, L, D).
        """
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript drops this branch only in this form)
            if self.grad_checkpointing or take is not None or depth is not None:
                return self._encode_one_by_one(tokens, flow, take or [], depth)
        return [self.layers(tokens, flow)]

    @torch.jit.ignore
    def _encode_one_by_one(
        self, x: Tensor, flow: dict[str, Tensor] | None, take: list[int], depth: int | None
    ) -> list[Tensor]:
        taken: list[Tensor] = []
        handed = () if flow is None else (flow,)
        for index, block in enumerate(self.layers[:depth]):
            if self.grad_checkpointing:
                x = checkpoint(with_chosen_backend(block), x, *handed, use_reentrant=False)
            else:
                x = block(x, *handed)
            if index in take:
                taken.append(x)
        return [*taken, x]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` to logits (B, num_classes), or pooled features (B, D)."""
        position = self.patch_embed.num_patches // 2
        if self.global_pool == "token":
            x = x[:, position]
        elif self.global_pool == "avg":
            x = (x.sum(1) - x[:, position]) / self.patch_embed.num_patches
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised as `pretrained_cfg` says, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Run the model and keep the outputs of some blocks.

        Args:
            x: images (B, C, H, W).
            indices: which blocks: all if None, the last n for an int, or a list.
            return_prefix_tokens: return pairs (map, class token (B, 1, D)) instead of maps.
            norm: apply the final norm to the intermediates.
            stop_early: skip the blocks after the last one asked for.
            output_fmt: "NCHW" for feature maps (B, D, H', W') or "NLC" for patch tokens (B, M, D).
            intermediates_only: leave the final tokens out of the result.

        Returns:
            The intermediates, or (final tokens, intermediates).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        depth = max_index + 1 if stop_early else len(self.layers)
        *taken, x = self.encode(self._embed(x), self._new_flow(), list(take_indices), depth)
        if norm:
            taken = [self.norm_f(tokens) for tokens in taken]

        position = self.cls_position
        intermediates: list[Any] = []
        for tokens in taken:
            features = torch.cat([tokens[:, :position], tokens[:, position + 1 :]], dim=1)
            if output_fmt == "NCHW":
                features = features.transpose(1, 2).unflatten(2, self.patch_embed.grid_size).contiguous()
            cls_token = tokens[:, position : position + 1]
            intermediates.append((features, cls_token) if return_prefix_tokens else features)
        return intermediates if intermediates_only else (self.norm_f(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices=...)` does not need; returns the indices taken."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = cast(Blocks, self.layers[: max_index + 1])
        if prune_norm:
            self.norm_f = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a registered Vim, then inject the adapter that the `peft*` options describe.

    `peft`: method name(s), `peft_targets`, `peft_layers`: where, `peft_kwargs`: the method's fields.
    """
    peft = kwargs.pop("peft", None)
    peft_options = {name: kwargs.pop(name, None) for name in ("peft_targets", "peft_layers", "peft_kwargs")}
    if peft is None and any(value is not None for value in peft_options.values()):
        given = ", ".join(name for name, value in peft_options.items() if value is not None)
        raise ValueError(f'{given} without peft: name the method too, such as peft="prodial"')
    method_options = _method_options(peft_options["peft_kwargs"])
    _check_options(kwargs)
    _check_feature_class(kwargs)
    out_indices = kwargs.pop("out_indices", 3)
    name = _name_with_tag(variant, kwargs.get("pretrained_cfg"))
    if pretrained:
        name_the_file(name, kwargs)
    with pretrained_loading(name, pretrained):
        model = build_model_with_cfg(
            VisionMamba,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **kwargs,
        )
    backbone: Any = model.model if kwargs.get("features_only") else model
    _mention_unseen_pixels(backbone.patch_embed)
    backbone.creation = {"name": name, "kwargs": backbone.options}
    owners: tuple[Any, ...] = (model, backbone)
    for owner in owners:  # Each has a dictionary of its own, from which timm reads what images to prepare.
        owner.pretrained_cfg["input_size"] = (backbone.in_chans, *backbone.patch_embed.img_size)
    if peft is not None:
        inject(
            backbone,
            peft,
            targets=peft_options["peft_targets"],
            layers=peft_options["peft_layers"],
            **method_options,
        )
    return model


def _method_options(given: Any) -> Mapping[str, Any]:
    """The options of a method as `peft_kwargs` has them.

    Raises:
        ValueError: it has none by name.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"peft_kwargs = {quote(given)}: expected options of the method by their names, such as "
            '{"rank": 8}'
        )
    for name, keyword in _KEYWORDS_OF_INJECT.items():
        if name in given:
            raise ValueError(
                f"peft_kwargs: {name} = {quote(given[name])} is no option of a method: give it as {keyword}"
            )
    return given


_KEYWORDS_OF_INJECT = {
    "model": "model_name",
    "method": "peft",
    "targets": "peft_targets",
    "layers": "peft_layers",
}
"""Arguments that `inject` is given from other options, and the keywords of `timm.create_model` for these."""


def _name_with_tag(variant: str, tag: Any) -> str:
    """The name by which a model with these weights can be created again: with a tag where one was asked for
    that is among ours."""
    name = f"{variant}.{tag}"
    return name if isinstance(tag, str) and weights_of(name) is not None else variant


def _check_feature_class(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a way to get features that this model does not have."""
    if "feature_cls" not in options:
        return
    given = options["feature_cls"]
    if not options.get("features_only"):
        raise ValueError(f"feature_cls = {quote(given)} without features_only=True: expected both or neither")
    if (given.lower() if isinstance(given, str) else given) not in ("getter", FeatureGetterNet):
        raise ValueError(
            f"feature_cls = {quote(given)}: expected 'getter', which is the default, so leave it out. 'hook' "
            "and 'fx' give tokens, the class token among them, in the place of maps; 'list' and 'dict' run "
            "the modules of a model in a row, which a Vim is not. For tokens call forward_intermediates with "
            "output_fmt='NLC'"
        )


def _mention_unseen_pixels(patches: PatchEmbed) -> None:
    step = patches.proj.stride[0]
    rows, columns = ((side - patches.patch_size) % step for side in patches.img_size)
    if rows or columns:
        logger.warning(
            "patches of %d pixels at a distance of %d do not fill an image of %d x %d pixels: the last "
            "%d rows and %d columns are not seen",
            patches.patch_size,
            step,
            *patches.img_size,
            rows,
            columns,
        )


_FACTORY_OPTIONS = {
    "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "feature_cls", "out_indices",
    "pretrained_strict", "pretrained_model_args",
}  # fmt: skip
"""What timm's factory functions understand besides the constructor's arguments, in all versions supported.

The check of names lets these pass and refuses what is neither here nor an option of the model.
"""
_PEFT_OPTIONS = {"peft", "peft_targets", "peft_layers", "peft_kwargs"}
"""The options that `_create_vim` takes out before names are checked; known here to be suggested."""


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError on a misspelt option, with the closest real one."""
    known = {*OPTIONS, "device", "dtype"} | _FACTORY_OPTIONS
    for name in sorted(options.keys() - known):
        if any(name in options_of(method) for _, method in METHODS.items()):
            raise ValueError(
                f"{name!r} is an option of a method, not of the model: give it as "
                f"peft_kwargs={{{name!r}: {quote(options[name])}}}, beside peft"
            )
        offered = known | _PEFT_OPTIONS | {"pretrained", "checkpoint_path"}  # timm takes these itself.
        raise ValueError(f"unknown model option {name!r}.{suggest(name, offered)}")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def _hub(repository: str, filename: str) -> dict[str, Any]:
    return _cfg(
        hf_hub_id=f"hustvl/{repository}",
        hf_hub_filename=filename,
        paper_ids="arXiv:2401.09417",
        origin_url="https://github.com/hustvl/Vim",
    )


def _small_image_cfg(**kwargs: Any) -> dict[str, Any]:
    # Squashed, because that is how the embedded weights were trained and scored.
    return _cfg(**{"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash", **kwargs})


def _small_image_cfgs(model: str) -> dict[str, dict[str, Any]]:
    """The configuration of a model for each of its weights that this project publishes, or one without."""
    published = {
        weights.name: _small_image_cfg(file=str(weights.path), num_classes=weights.num_classes)
        for weights in WEIGHTS
        if weights.model == model
    }
    return published or {model: _small_image_cfg()}


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _hub("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_patch16_stride8_224.in1k": _hub("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_224.in1k": _hub("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_patch16_stride8_224.in1k": _hub("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base_patch16_224.in1k": _hub("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
        **_small_image_cfgs("vim_tiny_patch8_64"),
        **_small_image_cfgs("vim_nano_patch8_64"),
        "test_vim": _small_image_cfg(input_size=(3, 32, 32), num_classes=10),
    }
)
"""timm's configuration of each model by its name and tag: where its weights are, and what images it takes."""


def _entry_point(variant: ModelEntry) -> Callable[..., nn.Module]:
    """The function by which timm creates a model of the table."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_vim(variant.name, pretrained, **{**variant.sizes, **kwargs})

    create.__name__ = create.__qualname__ = variant.name
    create.__doc__ = f"{variant.summary}."
    return create


for _variant in VIM_MODELS:
    globals()[_variant.name] = register_model(_entry_point(_variant))
