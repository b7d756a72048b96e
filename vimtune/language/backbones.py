"""The models below the heads of transformers' Mamba and Mamba-2, with a call that adapters may surround.

They are transformers' own classes, by their own names, so that files state the same architecture. What is
added is the call `encode`, for rules that put tokens before a text.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from vimtune.adapters.rule import each_tensor
from vimtune.language.padding import text_order


class EncodingModel:
    """What both models have in common beside what transformers' classes give them."""

    adapter_calls: ClassVar[tuple[str, ...]] = ("encode",)
    """Methods that rules of adapters may surround."""
    directions: ClassVar[int] = 1
    """The layers go through the tokens from the first to the last."""
    config: Any
    embeddings: Any

    @property
    def embed_dim(self) -> int:
        """D."""
        width: int = self.config.hidden_size
        return width

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any
    ) -> Any:
        """Hidden states of a text, as transformers' model gives them and with its arguments.

        What comes behind a cache that has states goes on with these, without the call: what a rule has put
        before the text is in them.
        """
        plain: Any = super()
        cache = options.get("cache", options.get("cache_params"))
        begins = cache is None or cache.get_recurrent_state(0) is None
        if not begins or (input_ids is None) == (inputs_embeds is None):
            return plain.forward(input_ids, inputs_embeds, **options)
        return self.encode(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds, **options)

    def encode(self, tokens: Tensor, flow: dict[str, Tensor] | None = None, **options: Any) -> Any:
        """A text from its first token on, through all layers; rules of adapters may surround it.

        Args:
            tokens: embedded, (B, L, D). A rule may put n more before them, also where the text is padded
                on the left: padding is then moved before those, so that nothing lies between them and
                the text.
            flow: what layers hand on; transformers' layers hand on nothing.
            options: the other arguments of transformers' model. A mask is (B, L) whatever a rule adds.

        Returns:
            What transformers' model returns, whose tensors are (B, n + L, D) in the order of `tokens`.
        """
        plain: Any = super()
        mask: Tensor | None = options.get("attention_mask")
        if mask is None:
            return plain.forward(inputs_embeds=tokens, **options)
        tokens, options["attention_mask"], restore = text_order(tokens, mask)
        return each_tensor(plain.forward(inputs_embeds=tokens, **options), restore)


class MambaModel(EncodingModel, modeling_mamba.MambaModel):  # type: ignore[misc]  # transformers is untyped
    """transformers' Mamba without a head, from tokens (B, L) to hidden states (B, L, D)."""


class Mamba2Model(EncodingModel, modeling_mamba2.Mamba2Model):  # type: ignore[misc]
    """transformers' Mamba-2 without a head, from tokens (B, L) to hidden states (B, L, D)."""
