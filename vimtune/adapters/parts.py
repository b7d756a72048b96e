"""What rules around a call are told of the text that its tokens belong to.

A language model that writes token by token gets a text in parts, and one that is given several texts at once
gets some of them with padding. A module to which this happens says so by its method `part_of_text`, which
takes the further arguments of its calls and gives a `TextPart`, or None for whole texts without padding.

Shape letters: B batch, L tokens, n tokens that a rule has put before a text, D channels, K kept tokens, E
channels of what is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

Step = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""What `TextPart.go_on` runs: takes the tokens (B, n + L, D) and what was kept of the K before them,
(B, K, E), and gives the changed tokens and what later parts may need of them, (B, n + L, E)."""


class TextPart(ABC):
    """The tokens of one call as a part of their texts."""

    @property
    @abstractmethod
    def begins(self) -> bool:
        """Whether the tokens are the first of their texts."""

    @abstractmethod
    def go_on(self, x: Tensor, length: int, step: Step) -> Tensor:
        """What `step` makes of tokens behind those that it was given in the parts before.

        What it keeps lies with the states of the model, so that it is copied, put in the order of beams and
        forgotten with them.

        Args:
            x: (B, n + L, D), the n tokens first.
            length: K, of how many tokens something is kept.
            step: is given 0 for padding, which stands on the left of all that belongs to the text, and 0 for
                what was before the first token; None in the place of what was kept if a text begins.

        Returns:
            The changed tokens, in the order of `x`.
        """

    @abstractmethod
    def numbered(self, number: int) -> TextPart:
        """The same for the rule by this number, counted from 0, among those of the call that mix tokens: each
        keeps something of its own."""

    @abstractmethod
    def refuse_mixing(self) -> None:
        """Refuse a rule that mixes tokens and knows nothing of parts.

        Raises:
            ValueError: always.
        """

    @abstractmethod
    def check_change(self, given: Tensor, changed: Tensor) -> None:
        """Refuse tokens that a rule adds to a text that has begun: they would enter the states again with
        each part.

        Args:
            given: the first argument of the call, (B, L, D).
            changed: what rules make of it.

        Raises:
            ValueError: the number of tokens has changed, and the part is not the first one.
        """
