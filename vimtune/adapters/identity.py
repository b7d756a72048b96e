"""Which base weights an adapter belongs to.

An adapter is worth nothing on other weights than those it was trained on, and its file does not hold
them. So it holds their identity, twice:

- `bits`: a hash of the values that the model computed with. Where weights were drawn at random, resized
  to another image size or rounded to another dtype, these bits depend on the machine and the settings.
- `origin`: a hash of where the values came from. For each parameter this is the hash of the values that
  were loaded, before they were resized or rounded, or the state of the random generator and what was
  created with it.

Parameters that the adapter replaces as a whole (those of bitfit, everything under full fine-tuning) do not
count: what it computes does not depend on them. What training has made of them does. They have an identity
of their own, for whoever compares the model after training with the one before it.

Either one suffices to recognise the weights. An origin is only ever claimed for a value that is still
the one that came from there: the model remembers what a value was made from together with the hash of
that value, and whatever changed it since, be it training, `load_state_dict` or a hand, the parameter's
origin is then its present bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vimtune.adapters.manage import demand_adapter
from vimtune.adapters.rule import Tuned
from vimtune.adapters.slots import base_parameters, iter_weight_slots
from vimtune.adapters.wrappers import unwrap
from vimtune.models.options import ARCHITECTURE
from vimtune.text import quote

_SOURCES = "_vimtune_sources"
"""Attribute of a model under which it is remembered where its values come from."""
_ORIGINAL = "_vimtune_original"
"""Attribute of a tensor that was made from another one; it holds the digests of both."""


@dataclass(frozen=True)
class BaseIdentity:
    """Identity of the base weights under an adapter; see the module's text."""

    origin: str
    """Hash of where the values came from."""
    bits: str
    """Hash of the values that the model computed with."""


@dataclass
class _Seed:
    """How the weights of a model were drawn."""

    generator: bytes
    """State of torch's generator for the CPU when creation began."""
    create: partial[Any]
    """Creates the model anew, with the same draws."""
    rule: int
    """Number of the rule by which weights are drawn."""
    digest: str = ""
    """Digest of all that decides the draws; empty until somebody asks for it."""
    draws: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)
    """(parameter, dtype) -> digest of the drawn value in that dtype, as far as somebody asked for it."""

    def draw(self, wanted: Mapping[str, torch.dtype]) -> None:
        """Draw the weights anew, unless the digests of these parameters in these dtypes are at hand."""
        if self.draws.keys() >= set(wanted.items()):
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.frombuffer(bytearray(self.generator), dtype=torch.uint8))
            weights = {name: p.detach() for name, p in self.create().named_parameters()}
        self.draws |= {
            (name, dtype): tensor_digest(weights[name].to(dtype)) for name, dtype in wanted.items()
        }
        # Generators are promised to draw the same numbers within one version of torch.
        version = ".".join(torch.__version__.split(".")[:2])
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in weights.items()]
        described = f"torch {version} rule {self.rule} {shapes}\n".encode()
        self.digest = hashlib.sha256(described + self.generator).hexdigest()


@dataclass
class _Sources:
    """Where the values of a model's base parameters came from, kept on the model itself."""

    seed: _Seed | None = None
    drawn: set[str] = field(default_factory=set)
    """Parameters that were drawn and not loaded since."""
    originals: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Parameter -> (digest of its value, digest of the value that this one was made from)."""

    def origin(self, name: str, bits: str) -> str:
        """Digest of what the value with the digest `bits` was made from, or `bits`."""
        value, original = self.originals.get(name, ("", ""))
        return original if value == bits else bits


# ---------------------------------------------------------------------------------------------
# Remembering where values come from


def note_seed(model: nn.Module, generator: Tensor, create: partial[Any], rule: int) -> None:
    """Remember that `create`, called with torch's CPU generator in this state, drew the model's weights.

    Args:
        model: the new model. One of a subclass, or not on the CPU, is known by its bits alone.
        generator: `torch.get_rng_state()` before the creation.
        create: creates the model; takes `device` and `dtype`, too.
        rule: number of the rule by which weights are drawn, counted up with each change of it.
    """
    parameters = dict(model.named_parameters())
    dtypes = {parameter.dtype for parameter in parameters.values()}
    known = all(_has_values(p) and p.device.type == "cpu" for p in parameters.values())
    if type(model) is create.func and len(dtypes) == 1 and known:
        create = partial(create, device="cpu", dtype=dtypes.pop())
        seed = _Seed(generator.numpy().tobytes(), create, rule)
        model.__dict__[_SOURCES] = _Sources(seed, set(parameters))


def note_loading(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Remember that the model's base parameters are about to get the values of a state dict.

    Only what a value loses on the way, by rounding to the parameter's dtype or by `made_from`, costs time.
    """
    sources: _Sources = model.__dict__.setdefault(_SOURCES, _Sources())
    for name, parameter in base_parameters(model):
        value = state.get(prefix + name)
        if not isinstance(value, Tensor):
            continue
        sources.drawn.discard(name)
        sources.originals.pop(name, None)
        if (hasattr(value, _ORIGINAL) or value.dtype != parameter.dtype) and _has_values(value):
            sources.originals[name] = (tensor_digest(value.to(parameter.dtype)), _digest_of_original(value))


def made_from(value: Tensor, original: Tensor) -> Tensor:
    """`value`, which remembers that it was computed from `original`, as by resizing."""
    if value is not original and _has_values(original):
        setattr(value, _ORIGINAL, (tensor_digest(value), _digest_of_original(original)))
    return value


def _digest_of_original(tensor: Tensor) -> str:
    """Digest of what `tensor` was made from, if it still is what was made, or of itself."""
    own = tensor_digest(tensor)
    made, original = getattr(tensor, _ORIGINAL, ("", ""))
    return original if made == own else own


def note_casts(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`convert`, a function that `Module._apply` maps over all tensors, which remembers casts.

    Drawn parameters need no note: their values can be drawn anew and cast as well.
    """
    sources: _Sources = model.__dict__.setdefault(_SOURCES, _Sources())
    names = {id(p): name for name, p in base_parameters(model) if name not in sources.drawn}

    def noting(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        name = names.get(id(tensor))
        if name is not None and converted.dtype != tensor.dtype and _has_values(tensor):
            sources.originals[name] = (tensor_digest(converted), sources.origin(name, tensor_digest(tensor)))
        return converted

    return noting


def share_sources(module: nn.Module, model: nn.Module) -> None:
    """Let `module` know where the values of `model` came from, whose parameters it has by the same names."""
    if _SOURCES in model.__dict__:
        module.__dict__[_SOURCES] = model.__dict__[_SOURCES]


# ---------------------------------------------------------------------------------------------
# Comparing


def base_identity(model: nn.Module, name: str | None = None) -> BaseIdentity:
    """Identity of the base weights that the active adapter, or the one named, builds on.

    Parameters that the adapter replaces as a whole (the head; everything under full fine-tuning) do
    not count: the adapter does not depend on them.
    """
    model = unwrap(model)
    return _identity(model, _foundation(model, name))


def replaced_identity(model: nn.Module, name: str | None = None) -> BaseIdentity:
    """Identity of the base weights that the active adapter, or the one named, replaces as a whole: those that
    it was trained away from. The head, whose outputs are others, is not among them."""
    model = unwrap(model)
    return _identity(model, _replaced(model, name))


def _identity(model: nn.Module, parameters: list[tuple[str, nn.Parameter]]) -> BaseIdentity:
    """Identity of some of a model's base parameters."""
    sources: _Sources = model.__dict__.get(_SOURCES, _Sources())
    seed = sources.seed
    drawn = {path: p.dtype for path, p in parameters if path in sources.drawn}
    if seed is not None and drawn:
        seed.draw(drawn)
    bits, origins = hashlib.sha256(), hashlib.sha256()
    for path, parameter in parameters:
        own = tensor_digest(parameter)
        untouched = seed is not None and path in drawn and own == seed.draws[path, parameter.dtype]
        origin = seed.digest if seed is not None and untouched else sources.origin(path, own)
        bits.update(f"{path} {own}\n".encode())
        origins.update(f"{path} {origin}\n".encode())
    return BaseIdentity(origin=origins.hexdigest(), bits=bits.hexdigest())


def base_hash(model: nn.Module, name: str | None = None) -> str:
    """SHA-256 over the values of the base weights that an adapter builds on; see `base_identity`."""
    return base_identity(model, name).bits


def has_base(model: nn.Module, bits: str, origin: str, name: str | None = None) -> bool:
    """Whether the base weights under an adapter of `model` are those with this identity.

    Without an `origin`, `bits` is the hash of the first format, which knew no other.
    """
    if not origin:
        return _first_format_hash(unwrap(model), name) == bits
    return _is_one_of(base_identity(model, name), bits, origin)


def replaced_paths(model: nn.Module, name: str | None = None) -> list[str]:
    """Paths of the parameters that the active adapter, or the one named, replaces as a whole, without the
    head's."""
    return [path for path, _ in _replaced(unwrap(model), name)]


def has_replaced(model: nn.Module, bits: str, origin: str, name: str | None = None) -> bool:
    """Whether the base weights that an adapter of `model` replaces are those with this identity."""
    return _is_one_of(replaced_identity(model, name), bits, origin)


def _is_one_of(found: BaseIdentity, bits: str, origin: str) -> bool:
    """Whether one of its two hashes is that of an identity."""
    return found.origin == origin or found.bits == bits


def architecture_differences(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What tells the model of a file from `model`: options that decide how weights are used.

    Args:
        saved: {"name": ..., "kwargs": ...} as in `AdapterInfo.model`; may be empty.
        model: the model at hand; only one created by name can be compared.
    """
    own: dict[str, Any] = getattr(model, "creation", {})
    if not saved or not own:
        return []
    # Files of the first format hold only what was given.
    pairs = [(option, saved["kwargs"].get(option), own["kwargs"].get(option)) for option in ARCHITECTURE]
    return [
        f"{option} {quote(theirs)} there and {quote(ours)} here"
        for option, theirs, ours in pairs
        if theirs is not None and ours is not None and theirs != ours
    ]


def _foundation(model: nn.Module, name: str | None) -> list[tuple[str, nn.Parameter]]:
    """(path, base parameter) of all that the adapter does not replace as a whole, sorted."""
    _, record = demand_adapter(model, name)
    replaced = _replaced_paths(model, record.name)
    return sorted((path, p) for path, p in base_parameters(model) if path not in replaced)


def _replaced(model: nn.Module, name: str | None) -> list[tuple[str, nn.Parameter]]:
    """(path, base parameter) of all that the adapter replaces as a whole besides the head, sorted."""
    _, record = demand_adapter(model, name)
    replaced = _replaced_paths(model, record.name) - set(record.head)
    return sorted((path, p) for path, p in base_parameters(model) if path in replaced)


def _replaced_paths(model: nn.Module, name: str) -> set[str]:
    """Paths of the parameters that an adapter replaces as a whole."""
    return {
        path
        for path, _, _, slot in iter_weight_slots(model)
        if name in slot and isinstance(slot[name], Tuned)
    }


def _has_values(tensor: Tensor) -> bool:
    """Whether it holds numbers. Tensors of the meta device and those of FakeTensorMode do not."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def _raw(tensor: Tensor) -> tuple[bytes, memoryview]:
    """A line that says what the tensor is, and its bytes."""
    values = tensor.detach().cpu().contiguous()
    head = f"{tuple(values.shape)} {values.dtype}\n".encode()
    return head, values.flatten().view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """Hash of the shape, dtype and values of a tensor."""
    head, values = _raw(tensor)
    digest = hashlib.sha256(head)
    digest.update(values)
    return digest.hexdigest()


def _first_format_hash(model: nn.Module, name: str | None) -> str:
    """Hash of the base weights as adapter files and run states held it that know no origin."""
    digest = hashlib.sha256()
    for path, parameter in _foundation(model, name):
        head, values = _raw(parameter)
        digest.update(f"{path} ".encode() + head)
        digest.update(values)
    return digest.hexdigest()
