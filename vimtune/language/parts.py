"""Parts of texts in the mixers of language models: what rules of adapters keep in the cache of the model.

transformers' caches can hold several states of each kind for a layer, of which Mamba and Mamba-2 have one. A
rule that mixes tokens has a further one there, of the kind of a convolution: it holds what the rule has kept
of the last K tokens (B, E, K), oldest first. The cache then copies, resets and reorders it with the others.

Shape letters: B batch, L tokens, n tokens that a rule has put before a text, D channels, K kept tokens, E
channels of what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from vimtune.adapters.parts import Step, TextPart
from vimtune.language.padding import last_tokens, text_order
from vimtune.language.refusals import StatesRefused


@dataclass(frozen=True)
class MixerPart(TextPart):
    """Tokens that a mixer gets, with its cache or with a mask of padding."""

    cache: Cache | None
    """None to start and to keep nothing."""
    mask: Tensor | None
    """(B, L), False at padding; None if there is none."""
    layer: int
    """The number of the mixer's layer in the cache."""
    number: int = 0
    """That of the rule among those that mix tokens."""

    @property
    def begins(self) -> bool:
        return self.cache is None or self.cache.get_recurrent_state(self.layer) is None

    def numbered(self, number: int) -> MixerPart:
        return replace(self, number=number)

    def refuse_mixing(self) -> None:
        raise StatesRefused(
            "a rule at scan() makes each token depend on others and has no around_part, so that it knows "
            "neither those before in cached decoding nor which of them are padding: give use_cache=False (or "
            "set model.config.use_cache = False) and no attention_mask"
        )

    def check_change(self, given: Tensor, changed: Tensor) -> None:
        if changed.shape[1] != given.shape[1] and not self.begins:
            raise StatesRefused(
                f"a rule at scan() makes {changed.shape[1]} tokens of {given.shape[1]} that go on with a "
                "text of which states are kept: let its around_part leave them alone, or give use_cache=False"
            )

    def go_on(self, x: Tensor, length: int, step: Step) -> Tensor:
        before = None if self.begins else self._kept(length)
        if self.mask is None:
            changed, values = step(x, before)
            self._keep(values, before, length, None)
            return changed
        tokens, mask, restore = text_order(x, self.mask)
        changed, values = step(tokens.masked_fill(~mask[..., None], 0), before)
        self._keep(values, before, length, mask)
        return restore(changed)

    def _kept(self, length: int) -> Tensor | None:
        """What the rule has kept of the last `length` tokens (B, K, E); None if that is nothing, as of tokens
        that were read before the rule was there."""
        assert self.cache is not None
        layer, state = self.cache.layers[self.layer], self._state
        if state >= layer.number_of_states:
            return None
        kept: Tensor | None = self.cache.get_conv_state(self.layer, state_idx=state)
        if kept is None:
            return None
        if layer.conv_kernel_size[state] < length:
            raise StatesRefused(
                f"a rule at scan() needs what was kept of the last {length} tokens, and the cache has it of "
                f"{layer.conv_kernel_size[state]}, which another adapter has begun: read the text from its "
                "first token on after changing adapters"
            )
        # A cache that can be rolled back keeps more, and at first less.
        return F.pad(kept[..., -length:], (max(length - kept.shape[-1], 0), 0)).transpose(1, 2)

    def _keep(self, values: Tensor, before: Tensor | None, length: int, mask: Tensor | None) -> None:
        """Keep what a rule says of the present tokens (B, n + L, E), of the last `length` ones; `before` is
        what was kept of those before, `mask` (B, n + L) False at padding."""
        if self.cache is None:
            return
        layer, state = self.cache.layers[self.layer], self._state
        _make_room(layer, state)
        if not layer.has_previous_state[state] and layer.conv_kernel_size[state] != length:
            layer.is_conv_states_initialized[state] = False  # It was that of another adapter before a reset.
        if mask is None:
            values = values[:, -length:]  # The cache puts them behind those before.
        else:
            if before is not None:
                values = torch.cat([before.to(values.dtype), values], 1)
            values = last_tokens(values, length, mask)
        kept = values.transpose(1, 2)
        self.cache.update_conv_state(kept, self.layer, state_idx=state, conv_kernel_size=length)

    @property
    def _state(self) -> int:
        """The number of the rule's state; 0 is the mixer's own."""
        return 1 + self.number


def _make_room(layer: LinearAttentionLayer, state: int) -> None:
    """Let a layer of a cache have a state by this number, nothing yet."""
    if state < layer.number_of_states:
        return
    wider = LinearAttentionLayer(number_of_states=state + 1)
    for name, entries in vars(wider).items():
        if isinstance(entries, dict):
            setattr(layer, name, {**entries, **getattr(layer, name)})
    layer.number_of_states = state + 1
