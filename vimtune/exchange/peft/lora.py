"""HF peft's LORA: our LoRA, whatever is a low-rank difference, and DoRA.

Of a linear layer its tensors are ours. Of a convolution `lora_A` is a convolution with r outputs and `lora_B`
one of one pixel. Of an embedding of tokens (tokens, width) it has the factors of the transposed weight, and
DoRA's magnitudes are those of its columns.

What is no plain LoRA here, a start from principal components or rules for rows of a weight, is written as the
LoRA of its factors (`WeightRule.low_rank`), which has a larger rank and computes the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from vimtune.adapters.rules.dora import Axis, DoRARule
from vimtune.adapters.rules.lora import LoRARule
from vimtune.exchange.peft.form import (
    AdaptedModule,
    GivenModule,
    Pattern,
    PeftConfig,
    PeftForm,
    Size,
    Text,
    Translated,
    Written,
    by_pattern,
    demand_names,
    refuse_kind,
)
from vimtune.text import quote

BASE_KEEPING = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of LoRA in HF peft that leave the base weights as they are. Others, such as "pissa", "olora",
"corda" and "loftq", take a part of them away."""
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
"""Classes of modules for which HF peft has LoRA and we have the same."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(PeftConfig):
    """`peft.LoraConfig` as far as it means something here; other settings have to be off."""

    r: Size = 8
    """Rank; the tensors have it, too."""
    lora_alpha: Annotated[float, Gt(0)] = 8.0
    """Scale before division by the rank."""
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the input of A."""
    use_rslora: bool = False
    """Whether the scale is divided by the root of the rank."""
    use_dora: bool = False
    """Whether it is DoRA."""
    rank_pattern: dict[Pattern, Size] = field(default_factory=dict)
    """Ranks of single modules; the tensors have them, too."""
    alpha_pattern: dict[Pattern, Annotated[float, Gt(0)]] = field(default_factory=dict)
    """Scales of single modules."""
    init_lora_weights: bool | Text = True
    """How training started; `BASE_KEEPING` has those starts that leave the base weights as they are."""
    eva_config: Any = None
    """Settings of such a start."""
    megatron_core: Text | None = None
    """Name of a package for models that are spread over machines."""
    qalora_group_size: int | None = None
    """A setting of QALoRA, which has to be off."""
    runtime_config: dict[Text, bool] | None = None
    """Where peft keeps tensors."""


class LoRAForm(PeftForm):
    """See the text of this module."""

    config = LoRAConfig
    names = (
        "lora_A.weight",
        "lora_B.weight",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
    )

    def write(self, modules: Sequence[AdaptedModule]) -> Written:
        tensors: dict[str, Tensor] = {}
        ranks, alphas, dropouts = {}, {}, set()
        kinds = {type(adapted.rule) is DoRARule for adapted in modules}
        for adapted in modules:
            refuse_kind(adapted.path, adapted.module, KINDS)
            _refuse_groups(adapted.path, adapted.module)
            down, up, scale, dropout = _factors(adapted)
            named = _to_file(adapted.module, up, down, getattr(adapted.rule, "magnitude", None))
            tensors |= {f"{adapted.path}.{name}": value for name, value in named.items()}
            ranks[adapted.path] = len(down)
            alpha = scale * len(down)
            alphas[adapted.path] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
            dropouts.add(dropout)
        if len(kinds) > 1:
            raise ValueError("some weights have DoRA and some LoRA, and a file of HF peft has one for all")
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": max(dropouts),  # one for all, which matters only where training goes on
            "use_dora": kinds == {True},
            "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
            "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        }
        return Written(settings, tensors)

    def read(self, config: LoRAConfig, modules: Sequence[GivenModule]) -> Translated:
        start = config.init_lora_weights
        if start not in BASE_KEEPING:
            raise ValueError(
                f"init_lora_weights is {quote(start)}, and such a start changes the base weights, to which "
                "the tensors then belong. HF peft writes them for the weights as they were: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        options, tensors = {}, {}
        for given in modules:
            refuse_kind(given.path, given.module, KINDS)
            _refuse_groups(given.path, given.module)
            own = _from_file(given, config.use_dora)
            tensors[given.path] = own
            acts_on_input = isinstance(given.module, nn.Linear)
            options[given.path] = {
                "rank": len(own["branch.lora_A"]),
                "alpha": float(by_pattern(config.alpha_pattern, given.path, config.lora_alpha)),
                "dropout": float(config.lora_dropout) if acts_on_input else 0.0,
                "scaling": "rslora" if config.use_rslora else "standard",
            }
            if config.use_dora:
                options[given.path]["axis"] = _axis(given.module)
        return Translated("dora" if config.use_dora else "lora", options, tensors)


def _factors(adapted: AdaptedModule) -> tuple[Tensor, Tensor, float, float]:
    """A (r, in), B (out, r), the scale of B A, and dropout on its input.

    Raises:
        ValueError: the rule adds no such product.
    """
    rule, axis = adapted.rule, _axis(adapted.module)
    if isinstance(rule, DoRARule) and rule.axis != axis:
        raise ValueError(
            f"{adapted.path} has DoRA with axis {rule.axis!r}, and HF peft has it with {axis!r} for a "
            f"{type(adapted.module).__name__}: merge the adapter instead"
        )
    if isinstance(rule, LoRARule) and type(rule) in (LoRARule, DoRARule) and rule.branch.start_A is None:
        branch = rule.branch
        dropout = branch.dropout.p if isinstance(branch.dropout, nn.Dropout) else 0.0
        return branch.lora_A, branch.lora_B, float(branch.scale), dropout
    found = rule.low_rank(adapted.weight)
    if found is None:
        raise ValueError(
            f"{adapted.path} has a {type(rule).__name__}, which is no low-rank difference as HF peft's LoRA "
            "is: merge the adapter instead"
        )
    return found[1], found[0], 1.0, 0.0


def _axis(module: nn.Module) -> Axis:
    """For what DoRA of HF peft has magnitudes in such a module."""
    return "input" if isinstance(module, nn.Embedding) else "output"


def _to_file(module: nn.Module, up: Tensor, down: Tensor, magnitude: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a module as HF peft has them."""
    if isinstance(module, nn.Embedding):
        named = {"lora_embedding_A": up.T, "lora_embedding_B": down.T}
    elif isinstance(module, nn.Linear):
        named = {"lora_A.weight": down, "lora_B.weight": up}
    else:
        kernel = cast(nn.Conv1d, module).weight.shape[1:]
        ones = [1] * (len(kernel) - 1)
        named = {
            "lora_A.weight": down.unflatten(1, tuple(kernel)),
            "lora_B.weight": up.reshape(*up.shape, *ones),
        }
        magnitude = None if magnitude is None else magnitude.reshape(1, -1, *ones)
    return named if magnitude is None else {**named, "lora_magnitude_vector": magnitude}


def _from_file(given: GivenModule, use_dora: bool) -> dict[str, Tensor]:
    """The tensors of our rule for a module.

    Raises:
        ValueError: others than those of the type, or of other forms.
    """
    tensors = {name.removesuffix(".weight"): tensor for name, tensor in given.tensors.items()}
    is_embedding = isinstance(given.module, nn.Embedding)
    names = ["lora_embedding_A", "lora_embedding_B"] if is_embedding else ["lora_A", "lora_B"]
    names += ["lora_magnitude_vector"] if use_dora else []
    first, second, *magnitude = demand_names(GivenModule(given.path, given.module, tensors), *names)
    if first.dim() < 2 or second.dim() < 2:
        raise ValueError(f"{given.path} has factors that are no matrices")
    down, up = (second.T, first.T) if is_embedding else (first.flatten(1), second.flatten(1))
    own = {"branch.lora_A": down, "branch.lora_B": up}
    return {**own, "magnitude": magnitude[0].flatten()} if magnitude else own


def _refuse_groups(path: str, module: nn.Module) -> None:
    """Raise ValueError for a convolution whose outputs do not read all inputs, of which HF peft's LoRA is
    another one."""
    if getattr(module, "groups", 1) != 1:
        raise ValueError(
            f"{path} is a convolution in {module.groups} groups, for which HF peft has no such LoRA: leave "
            "it out"
        )
