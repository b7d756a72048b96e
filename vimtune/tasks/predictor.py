"""What a task gives `vimtune predict`: a model that answers what a user asks.

Nothing here imports torch when it is imported, because `--help` reads the tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vimtune.tasks.components import PredictOptions
from vimtune.text import quote

if TYPE_CHECKING:
    from vimtune.tasks.answers import Answer


@dataclass(frozen=True)
class LeftOut:
    """An input for which there is no answer, while the others have theirs."""

    name: str
    """What was asked about, such as the path of an image."""
    reason: str
    """Why there is no answer."""
    accepted: bool
    """Whether the user has said that such inputs may be left out."""


class Predictor(ABC):
    """A model with an adapter, ready for what a user asks; `vimtune.load_predictor` makes it."""

    kind: ClassVar[type[Answer]]
    """What its answers are."""
    all_or_nothing: ClassVar[tuple[type[Exception], ...]] = ()
    """Errors by which a user's options end everything: what was answered before is not kept."""

    @abstractmethod
    def predict(
        self,
        inputs: Sequence[Any],
        /,
        *,
        top_k: int = 3,
        batch_size: int = 32,
        temperature: float = 1.0,
    ) -> Iterator[Answer]:
        """Answer in order.

        Args:
            inputs: what is asked about; derived classes say what that is.
            top_k: classes that are named for each; all of them if there are fewer.
            batch_size: inputs that go through the model together.
            temperature: what its outputs are divided by before they become probabilities, such as the one
                that `vimtune.evaluate` fits. It changes no order.

        Raises:
            ValueError: an input that is wrong, a number that is no whole number from 1 on, a temperature that
                is not above 0, or outputs of the model that are not finite.
        """

    @abstractmethod
    def answers(
        self, inputs: Sequence[Any], options: PredictOptions, leave_out: Callable[[LeftOut], None]
    ) -> Iterator[Answer]:
        """`predict` for the command line.

        Args:
            inputs: what `Task.read_inputs` has found.
            options: the options that the task has for this.
            leave_out: called for an input that cannot be read, where the options say so.
        """


def check_counts(**counts: int) -> None:
    """Make sure that numbers are whole ones from 1 on.

    Raises:
        ValueError: one is not; the message has its name.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {quote(value)}: expected a whole number >= 1")
