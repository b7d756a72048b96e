"""The mixers of transformers' Mamba and Mamba-2 models, computed by our operations.

Each is a subclass of transformers' own mixer with another `forward`, and takes its place by `accelerate`.
Parameters, keys, configuration, cache and everything around the mixers stay transformers'. The cache of a
layer holds the last K inputs of its convolution (B, channels, K) and the state of its scan, for Mamba
(B, E, N), for Mamba-2 (B, H, P, N).

Every weight is read through its module at each call, so that rules of adapters (`vimtune.adapters`) act in
training, evaluation, prefill and cached decoding alike. Modules that transformers' mixers call are called
here, too, where somebody else has replaced them or waits for the call by a hook; in the place of one that
they read as well, a module of another class is refused. Padding never enters a state: at masked tokens the
input of the scan and its time step are 0, and the cache keeps the last real inputs of the convolution.

Shape letters: B batch, L tokens, D width, E inner width, N states, R dt rank, K filter width; of Mamba-2
H heads, P channels of a head (E = H P), G groups.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from vimtune.language.padding import last_tokens, text_order
from vimtune.language.parts import MixerPart
from vimtune.language.refusals import may_be_read, refuse_packing, require_plain
from vimtune.ops import (
    DirectionWeights,
    SsdMixerOptions,
    SsdWeights,
    causal_conv1d,
    causal_mixer,
    causal_prompt,
    causal_step,
    scan_step,
    selective_scan,
    ssd,
    ssd_mixer,
    ssd_mixer_step,
    ssd_step,
    stateful_scan,
)
from vimtune.ops.gated_norm import gated_rms_norm
from vimtune.ops.mixer import add_offset
from vimtune.ops.ssd_mixer import forward_inputs, split_projected

NO_TIME = -1e4
"""What the time step of a masked token is before softplus, which makes exactly 0 of it in any dtype."""


class FastMixer:
    """What the mixers have in common beside what transformers' classes give them, (B, L, D) to (B, L, D)."""

    backend = "auto"
    """Backend of convolution and scan, see `vimtune.ops`."""
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    out_proj: nn.Linear
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache_params: Cache | None = None,
        **others: Any,
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D).

        Args:
            hidden_states: (B, L, D).
            cache: states after the tokens before; brought up to date. None to start and to keep nothing.
            attention_mask: (B, at least L), 0 at padding; its last L columns are for these tokens.
            cache_params: the name of `cache` in transformers before 5.24.
            others: what models hand on to whatever has a use for it.

        Raises:
            ValueError: several sequences are packed into one, which only transformers' kernels know.
        """
        refuse_packing(others)
        cache = cache_params if cache is None else cache
        mask = token_mask(attention_mask, hidden_states)
        result: Tensor = self.out_proj(self.scan(self.in_proj(hidden_states), None, cache, mask))
        return result

    def part_of_text(self, cache: Cache | None = None, mask: Tensor | None = None) -> MixerPart | None:
        """What rules around `scan` are told of the text; the arguments are those of `scan`."""
        if cache is None and mask is None:
            return None
        return MixerPart(cache, None if mask is None else mask[..., 0], self.layer_idx)

    def scan(
        self,
        projected: Tensor,
        flow: dict[str, Tensor] | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """All that lies between the projections: the output of in_proj to the input of out_proj.

        Rules of adapters may surround it.

        Args:
            projected: the output of in_proj, (B, L, channels). A rule may put n more tokens before the first
                ones of a text, also where that is padded on the left: padding is then moved before those, so
                that nothing lies between them and the text.
            flow: what earlier layers hand on; transformers' layers hand on nothing.
            cache: as in `forward`.
            mask: (B, L, 1), False at padding, whatever a rule adds.
            more: further arguments of `scan_in_order`.

        Returns:
            The input of out_proj, (B, n + L, E), in the order and the dtype of `projected`.
        """
        if mask is None:
            return self.scan_in_order(projected, cache, None, **more)
        projected, real, restore = text_order(projected, mask[..., 0])
        return restore(self.scan_in_order(projected, cache, real[..., None], **more))

    @abstractmethod
    def scan_in_order(self, projected: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """The same with a mask of all tokens, (B, L, 1)."""


class FastMambaMixer(FastMixer, MambaMixer):  # type: ignore[misc]  # transformers is untyped
    """Mixer of a Mamba layer, (B, L, D) to (B, L, D).

        x, z = in_proj(h)
        u    = SiLU(conv(x));  dt, B, C = x_proj(u)
        y    = scan(u, softplus(dt_proj(dt)), -exp(A_log), B, C, D) * SiLU(z)
        out  = out_proj(y)

    The number of states is that of `A_log`.
    """

    def scan_in_order(
        self,
        xz: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
        offsets: tuple[Tensor] | None = None,
    ) -> Tensor:
        """All that lies between the projections.

        Args:
            xz: the output of in_proj, (B, L, 2 E).
            cache: as in `FastMixer.forward`.
            mask: (B, L, 1), False at padding.
            offsets: what C reads beside the states, (E, N), of the only direction.

        Returns:
            The input of out_proj, (B, L, E), in the dtype of `xz`.

        Raises:
            ValueError: conv1d or dt_proj is of a class of somebody else, see `require_plain`.
        """
        require_plain(self, "conv1d", nn.Conv1d.forward)
        require_plain(self, "dt_proj", nn.Linear.forward)
        x_proj_is_read = may_be_read(self.x_proj, nn.Linear.forward)
        offset = None if offsets is None else offsets[0]
        if mask is None and x_proj_is_read:
            found = self._scan_in_one(xz, self.weights()._replace(offset=offset), cache)
            if found is not None:
                return found
        x, z = xz.chunk(2, dim=-1)
        u = convolve(self, x, cache, mask)
        num_states, rank = self.A_log.shape[1], self.dt_proj.weight.shape[1]
        projected = F.linear(u, self.x_proj.weight.to(u.dtype)) if x_proj_is_read else self.x_proj(u)
        dt, B, C = torch.split(projected, [rank, num_states, num_states], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight.to(dt.dtype))
        if mask is not None:
            delta = delta.masked_fill(~mask, NO_TIME)
        A, bias = -torch.exp(self.A_log.float()), self.dt_proj.bias
        state = None if cache is None else state_before(self, cache)
        if cache is None:
            y = selective_scan(u, delta, A, B, C, self.D, z, bias, True, backend=self.backend)
        elif state is not None and u.shape[1] == 1:
            now = (u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0], bias, True, state)
            y, state = scan_step(*now)
            y = y[:, None]
        else:
            y, state = stateful_scan(u, delta, A, B, C, self.D, z, bias, True, state, self.backend)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return y if offset is None else add_offset(y, C, offset, z)

    def _scan_in_one(self, xz: Tensor, weights: DirectionWeights, cache: Cache | None) -> Tensor | None:
        """The same in one operation, where there is one: without a cache, for a prompt, and for one token.

        Args:
            xz: the output of in_proj, (B, L, 2 E).
            weights: those between the projections.
            cache: brought up to date if there is a result.
        """
        if cache is None:
            return causal_mixer(xz, weights, self.backend)
        if cache.get_recurrent_state(self.layer_idx) is None:
            found = causal_prompt(xz, weights, self.backend)
            if found is None:
                return None
            y, last = found
            x, _ = xz.chunk(2, dim=-1)
            remember(self, cache, x, None)
            cache.update_recurrent_state(last, self.layer_idx)
            return y
        places = states_of_a_step(self, cache, xz)
        if places is None:
            return None
        step = causal_step(xz[:, 0], *places, weights, self.backend)
        return None if step is None else step[:, None]

    def weights(self) -> DirectionWeights:
        """The weights between the projections, as adapters have them."""
        return DirectionWeights(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
        )


class FastMamba2Mixer(FastMixer, Mamba2Mixer):  # type: ignore[misc]  # transformers is untyped
    """Mixer of a Mamba-2 layer, (B, L, D) to (B, L, D); its inside is defined by `vimtune.ops.ssd_mixer`."""

    def scan_in_order(self, projected: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """All that lies between the projections.

        Args:
            projected: the output of in_proj with its rows z | x | B | C | dt, (B, L, 2 E + 2 G N + H).
            cache: as in `FastMixer.forward`.
            mask: (B, L, 1), False at padding.

        Returns:
            The input of out_proj, (B, L, E), in the dtype of `projected`.

        Raises:
            ValueError: conv1d is of a class of somebody else, see `require_plain`.
        """
        require_plain(self, "conv1d", nn.Conv1d.forward)
        weights, options = self.weights(), self.options()
        if not may_be_read(self.norm, MambaRMSNormGated.forward):
            z, xBC, dt = split_projected(projected, weights)
            return self.norm(self._scan_ungated(xBC, dt, weights, options, cache, mask), z)
        if cache is None:
            return ssd_mixer(projected, weights, options, mask, self.backend)
        if mask is None and (places := states_of_a_step(self, cache, projected)) is not None:
            step = ssd_mixer_step(projected[:, 0], *places, weights, options, self.backend)
            if step is not None:
                return step[:, None]
        z, xBC, dt = split_projected(projected, weights)
        y = self._scan_ungated(xBC, dt, weights, options, cache, mask)
        norm = options.norm_groups, options.eps, self.backend
        return gated_rms_norm(y, z, weights.norm_weight, *norm)

    def _scan_ungated(
        self,
        xBC: Tensor,
        dt: Tensor,
        weights: SsdWeights,
        options: SsdMixerOptions,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Tensor:
        """What the gated norm sees, (B, L, E), of `xBC` (B, L, E + 2 G N) and `dt` (B, L, H) from in_proj."""
        inputs, how = forward_inputs(convolve(self, xBC, cache, mask), dt, weights, options, mask)
        x, dt, A, B, C, D, dt_bias, _ = inputs
        state = None if cache is None else state_before(self, cache)
        if state is not None and x.shape[1] == 1:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, dt_bias, *how, state)
            y = y[:, None]
        else:
            y, state = ssd(x, dt, A, B, C, D, dt_bias, *how, state, self.backend)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return y.flatten(2)

    def weights(self) -> SsdWeights:
        """The weights between the projections, as adapters have them."""
        return SsdWeights(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight,
        )

    def options(self) -> SsdMixerOptions:
        """Sizes and limits of the configuration. Norms of older versions of transformers know no groups."""
        inner: int = self.intermediate_size
        norm_groups = inner // getattr(self.norm, "group_size", inner)
        return SsdMixerOptions(self.n_groups, norm_groups, self.norm.variance_epsilon, *self.time_step_limit)


def token_mask(attention_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The mask of the present tokens (B, L, 1), False at padding; None if there is none."""
    return None if attention_mask is None else attention_mask[:, -hidden.shape[1] :, None].bool()


def states_of_a_step(mixer: FastMixer, cache: Cache, projected: Tensor) -> tuple[Tensor, Tensor] | None:
    """The last inputs of the convolution and the state of the scan in the cache, to be changed in place.

    Args:
        mixer: whose states they are.
        cache: that of the model.
        projected: the output of in_proj, (B, L, columns).

    Returns:
        None for several tokens, at the start, and where the cache can be rolled back and keeps more inputs.
    """
    recent, state = cache.get_conv_state(mixer.layer_idx), cache.get_recurrent_state(mixer.layer_idx)
    if projected.shape[1] != 1 or state is None:
        return None
    keeps_more = getattr(cache.layers[mixer.layer_idx], "record_past", False)
    fits = recent.shape[-1] == mixer.conv1d.weight.shape[-1]
    return (recent, state) if fits and not keeps_more else None


def state_before(mixer: FastMixer, cache: Cache) -> Tensor | None:
    """The state of the scan before these tokens; None at the start. The cache is changed in place, so that
    autograd gets a copy."""
    state: Tensor | None = cache.get_recurrent_state(mixer.layer_idx)
    return state.clone() if state is not None and torch.is_grad_enabled() else state


def convolve(mixer: FastMixer, x: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
    """SiLU(conv(x)) behind the tokens that the cache remembers: `x` (B, L, channels) to the same shape.

    At masked tokens it is 0, and they are 0 for the convolution of other tokens.
    """
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    if mask is not None:
        x = x * mask
    before = None if cache is None else cache.get_conv_state(mixer.layer_idx)
    if before is None:
        y, seen = causal_conv1d(x, weight, bias, silu=True, backend=mixer.backend), x
    else:
        width = weight.shape[1]
        seen = torch.cat([before[..., -width:].transpose(1, 2).to(x.dtype), x], dim=1)
        if x.shape[1] == 1:
            y = torch.einsum("bke,ek->be", seen[:, 1:], weight.to(x.dtype))[:, None]
            y = F.silu(y if bias is None else y + bias)
        else:
            y = causal_conv1d(seen, weight, bias, silu=True, backend=mixer.backend)[:, width:]
    if cache is not None:
        remember(mixer, cache, seen, mask)
    return y if mask is None else y * mask


def remember(mixer: FastMixer, cache: Cache, seen: Tensor, mask: Tensor | None) -> None:
    """Keep the last real inputs of a convolution in the cache.

    Args:
        mixer: whose convolution it is.
        cache: that of the model.
        seen: inputs (B, T, channels), which end with those of the present tokens.
        mask: (B, L, 1), False at padding among the present tokens; None if there is none.
    """
    window = last_tokens(seen, mixer.conv1d.weight.shape[-1], None if mask is None else mask[..., 0])
    cache.update_conv_state(window.transpose(1, 2), mixer.layer_idx)
