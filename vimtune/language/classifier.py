"""A classification head on a language model.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vimtune.adapters import share_sources
from vimtune.text import quote

Pooling = Literal["last", "mean"]
"""Which hidden state is classified: that of the last token of a sequence, or the mean over its tokens."""


class PooledClassifier(nn.Module):
    """Class logits of whole sequences, from the hidden states of a language model.

    `inject` takes `head` for the head of the model: it is trained beside any method and saved in the adapter
    file.
    """

    def __init__(self, backbone: nn.Module, width: int, num_classes: int, pooling: Pooling = "last") -> None:
        """Put a new head on `backbone`.

        Args:
            backbone: from tokens (B, L) to hidden states (B, L, D), such as `model.backbone` of
                transformers' language models.
            width: D.
            num_classes: outputs of the head.
            pooling: what is classified.

        Raises:
            ValueError: no such pooling.
        """
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling = {quote(pooling)}: expected one of {', '.join(get_args(Pooling))}")
        like = next(backbone.parameters())
        self.backbone = backbone
        self.head = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
        self.num_classes = num_classes
        self.pooling = pooling
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The head, by the name under which timm's models give it."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of sequences (B, L).

        Args:
            input_ids: (B, L), padded on the right, where no token that counts can see it.
            attention_mask: (B, L), 1 for tokens and 0 for padding; all are tokens if None.
        """
        hidden = self.backbone(input_ids, use_cache=False)[0]
        return self.head(self.pool(hidden, attention_mask).to(self.head.weight.dtype))

    def pool(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, D) to the one that is classified (B, D)."""
        if attention_mask is None:
            return hidden[:, -1] if self.pooling == "last" else hidden.mean(1)
        lengths = attention_mask.sum(1)
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        real = attention_mask[..., None].to(hidden.dtype)
        return (hidden * real).sum(1) / lengths[:, None]


def pooled_classifier(model: Any, num_classes: int, pooling: Pooling = "last") -> PooledClassifier:
    """A classifier on the backbone of a language model, which the two share.

    Args:
        model: a language model of transformers.
        num_classes: outputs of the new head.
        pooling: "last" takes the hidden state of the last token, "mean" the mean over all.

    Raises:
        ValueError: no such pooling.
    """
    classifier = PooledClassifier(model.backbone, model.config.hidden_size, num_classes, pooling)
    share_sources(classifier, model)
    return classifier
