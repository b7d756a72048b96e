"""What a rule is: one formula for a value that the model reads, or for a call that it makes.

Mamba code reads weights (`F.linear(u, self.x_proj.weight)`, fused kernels), so an adapter that only wraps
`forward` is silently dead there. A `WeightRule` therefore says which value a parameter, or some named rows of
it, effectively has. A `CallRule` surrounds a call that the model declares, such as the scan of a mixer. How
the model comes to see them is the business of `slots.py`, where they go that of `sites.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from vimtune.adapters.parts import TextPart

Call = Callable[..., Any]
"""The rest of a call: takes the (changed) first argument and gives the result."""


class Rule(nn.Module):
    """What one method does at one point of a model.

    The parameters of a rule are what its adapter trains. They and the rule's persistent buffers are saved,
    loaded and moved together. In them all values have to be finite, as inf and NaN are taken for damage:
    saving and loading refuse them. A buffer that would hold inf, such as a mask to be added, is computed anew
    in `__init__` (`register_buffer(..., persistent=False)`), or keeps a finite number or a bool instead.
    """

    may_be_off: ClassVar[bool] = False
    """Whether units of the rule may be off for all of some inputs, as behind a relu, so that single entries
    get no gradient from these."""

    lr_scale: float = 1.0
    """By how much the rule's method is said to multiply the learning rates of its tensors; whoever attaches
    the rule sets it."""

    decay_scale: float = 1.0
    """The same of their weight decay."""

    def decay(self, tensor: str, exempt: bool) -> float:
        """How strongly weight decay pulls a parameter of this rule to zero.

        By default vectors, which hold scales, magnitudes and biases, are left alone, and so is everything
        that stands for a parameter that the model exempts.

        Args:
            tensor: name of the parameter within the rule.
            exempt: whether the model exempts the base parameter from decay, as Mamba's A_log and D.

        Returns:
            A multiple of the run's weight decay; 0 for none. It is further multiplied by `decay_scale`.
        """
        return 0.0 if exempt or self.get_parameter(tensor).dim() <= 1 else 1.0

    def learning_rate(self, tensor: str) -> float:
        """How fast a parameter of this rule learns.

        Args:
            tensor: name of the parameter within the rule.

        Returns:
            A multiple of the run's learning rate, above 0. It is further multiplied by `lr_scale`.
        """
        return 1.0

    def idle_entries(self, tensor: str) -> Tensor | None:
        """The entries of a parameter of this rule that never train, by intent.

        Returns:
            A mask of the parameter's shape; None if all of them train.
        """
        return None

    def misfit(self, tensor: str, value: Tensor) -> str | None:
        """What is wrong with a value that is to be loaded into a parameter or buffer of this rule.

        Shape, dtype and finiteness have been compared before. A rule that takes a buffer for indices, say,
        looks here whether they are within range, because a file may come from anybody.

        Args:
            tensor: name of the parameter or buffer within the rule.
            value: the value that a file has for it.

        Returns:
            The end of a sentence that begins with the name, such as "are no ascending places"; None if
            nothing is wrong.
        """
        return None

    def outgrown(self) -> str | None:
        """Why this rule does not fit its module any more, which is asked when all methods have their rules.

        A rule whose tensors have the sizes of parameters of its module, such as the number of states, answers
        where a method that was named after its own has let these grow.

        Returns:
            What differs and the next step, such as "it has 16 states and the scan 18: name the method that
            adds states first"; None if the rule fits.
        """
        return None

    def simplify(self) -> None:
        """Put what only training has a use for, such as an MLP that makes the tensors, into the tensors that
        the formula needs, in place. Most rules have nothing of the kind.

        The method names the options that bring it (`Method.training_only`).
        """


class WeightRule(Rule):
    """One formula for the effective value of a parameter or of some of its rows."""

    replaces: ClassVar[bool] = False
    """Whether `effective_weight` ignores the weight that it is given."""

    batchable: ClassVar[bool] = True
    """Whether the formula may be applied to the stacked weights of several layers (`batched.py`).

    It then has to be one that `torch.func.vmap` can take: no control flow that depends on the values of
    tensors, no buffer changed in place. False also where stacking would only copy.
    """

    mergeable: ClassVar[bool] = True
    """Whether plain weights can express the rule. If not, `merge` refuses, by the name of the point."""

    perturbs: bool = False
    """Whether the rule adds something random in training that no weight can express; see `perturbation`."""

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The value that takes the place of `weight`, which is the value so far; may have another shape."""
        raise NotImplementedError

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The difference that the rule adds to a weight, whatever its values, where it is a product of two
        factors: W' = W + U D.

        With it adapters are added exactly (`vimtune.adapters.arithmetic`), rows of a mixed batch share the
        product with W (`vimtune.adapters.mixing`), and HF peft's files hold the rule as LoRA.

        Args:
            weight: W, for its shape; as a matrix it is `weight.flatten(1)`, (out, in).

        Returns:
            U (out, r) and D (r, in), all scales included; None for a rule that does not add, or adds
            something else.
        """
        return None

    def perturbation(self, x: Tensor, weight: Tensor) -> Tensor:
        """What training adds to the output of a linear layer that multiplies by the effective weight.

        Low-rank methods with dropout on the input of their branch say here what dropout changes. It is asked
        of rules that `perturbs`, in training and nowhere else, so that merging stays exact.

        Args:
            x: the layer's input (..., in).
            weight: the value that `effective_weight` is given, (out, in).

        Returns:
            A tensor (..., out).
        """
        raise NotImplementedError


class CallRule(Rule):
    """Surrounds a call that the model makes: of a linear layer, or of a method that a module declares."""

    mixes_tokens: bool = False
    """Whether what the rule does to a token depends on other ones, though it adds none. Such a rule
    needs an `around_part` of its own in language models that keep the states of a text or are told of
    padding, which refuse it otherwise: it has to know the tokens before, and which of them are padding."""

    innermost: ClassVar[bool] = False
    """Whether no other rule may stand between this one and the call: it computes a part of the call once
    more, from what that is given, or gives it more than the first argument."""

    def around(self, call: Call, x: Any, *flow: dict[str, Tensor]) -> Any:
        """What the call gives under this rule.

        Args:
            call: the call without this rule. It takes `x`, changed or not, and gives what the plain model
                would; it may be called once, several times or not at all. To an `innermost` rule it is the
                plain call, which takes its options by name, too: `scan` of a mixer has `offsets`. Tokens that
                a rule adds in a language model stand before the others.
            x: the first argument. Of a linear layer it is the input (..., in), of a mixer's `scan` the output
                of in_proj (B, L, 2 E), of a model's `encode` the tokens (B, L, D).
            flow: for calls that have it one mapping, the same for all layers of a forward pass, in which a
                rule keeps what later layers are to have. A rule writes under its own site's path alone, so
                that a layer that is recomputed (gradient checkpointing) finds what it found before.

        Returns:
            What the plain call gives, for the first argument that the caller passed: as many tokens as `x`
            has. `encode` may give a list of such tensors, or an output of transformers that holds them;
            `each_tensor` treats them alike.
        """
        raise NotImplementedError

    def around_part(self, call: Call, x: Any, part: TextPart, *flow: dict[str, Tensor]) -> Any:
        """The same where `x` are the tokens of a part of a text alone, as in a language model that writes
        token by token, or where some of them are padding.

        Overridden by rules that put tokens before a text, which do so with its first part, and by those that
        mix tokens, which keep what they need by `part.go_on`.

        Args:
            call, x, flow: those of `around`.
            part: which part it is, and what is kept from one to the next.

        Raises:
            ValueError: the rule mixes tokens and does not override this.
        """
        if self.mixes_tokens:
            part.refuse_mixing()
        return self.around(call, x, *flow)

    def fold(self, owner: nn.Module) -> Mapping[str, Tensor] | None:
        """What remains of the rule in the plain model into which an adapter is merged.

        It is asked in evaluation and without autocast, while all rules of the adapter are in force: who reads
        a parameter of `owner` gets the value that it will have there.

        Args:
            owner: the module whose call the rule surrounds.

        Returns:
            Values of parameters of `owner`, by name, with which the plain call computes what the call under
            this rule does. Parameters that `owner` does not have yet are those that it has with the options
            of `Method.merged_options`. None where no parameters can express the rule: `merge` then refuses,
            by the name of the point.
        """
        return None


_TENSORS: Any = (Tensor, Proxy)
"""Classes of tensors: a `Proxy` is one that torch.fx records."""


def each_tensor(result: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of a tensor, or of every tensor in a list, tuple or mapping such as transformers' outputs;
    what else is in these stays as it is."""
    if isinstance(result, list | tuple):
        return type(result)(each_tensor(item, function) for item in result)
    if isinstance(result, Mapping):
        return type(result)(**{name: each_tensor(item, function) for name, item in result.items()})
    return function(result) if isinstance(result, _TENSORS) else result


class Tuned(WeightRule):
    """The parameter itself is trained: a copy takes its place, the base stays as it was."""

    replaces = True
    batchable = False

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.value


class Shifted(WeightRule):
    """A difference to the parameter is trained, which starts at zero: weight decay then pulls to the start.

    Args:
        value: the parameter, for its shape.
        decay: strength of this pull, as a multiple of the run's weight decay.
    """

    batchable = False

    def __init__(self, value: Tensor, decay: float) -> None:
        super().__init__()
        self.difference = nn.Parameter(torch.zeros_like(value, requires_grad=False))
        self.strength = decay

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight + self.difference

    def decay(self, tensor: str, exempt: bool) -> float:
        return self.strength


def exact(weight: Tensor) -> AbstractContextManager[Any]:
    """No autocast: a weight computed in half precision and rounded again differs from the merged one."""
    device = weight.device.type
    # Asking this for the meta device raises an error.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight multiplies: that of autocast where there is one."""
    device = weight.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype
