"""What a line of a text data set stands for, and a split of such examples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Example:
    """A question with its possible continuations, and the same as a text to train on.

    `contexts`, `continuations` and `choices` have one entry for each choice. Scoring asks how likely the
    continuation is after its context; most data sets have one context for all choices, Winogrande has one
    continuation for all. `choices` are the texts whose characters are counted where likelihoods are compared
    per character (acc_norm).
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    prompt: str
    """What the training text begins with; nothing of it is learnt."""
    completion: str
    """What follows the prompt: the right answer, which is learnt."""

    @classmethod
    def question(
        cls, context: str, choices: Iterable[str], answer: int, prompt: str | None = None
    ) -> Example:
        """A question whose choices follow one context after a blank.

        Args:
            context: what stands before each choice.
            choices: the answers, without the blank.
            answer: index of the right one.
            prompt: what the training text begins with; the context if None.
        """
        choices = tuple(choices)
        return cls(
            contexts=(context,) * len(choices),
            continuations=tuple(f" {choice}" for choice in choices),
            choices=choices,
            answer=answer,
            prompt=context if prompt is None else prompt,
            completion=f" {choices[answer]}",
        )


@dataclass(frozen=True)
class TextSplit:
    """The examples of one split."""

    name: str
    """Such as "train"."""
    examples: tuple[Example, ...]
    source: str
    """One line saying where they come from."""
    classes: tuple[str, ...] = ()
    """What the choices of every example mean, where all examples have the same ones; else empty."""

    def fingerprint(self) -> str:
        """A hash that changes when an example does, wherever the file lies."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr(example).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def split_off(split: TextSplit, share: float, seed: int) -> tuple[TextSplit, TextSplit]:
    """Divide a split at random: what is left to train on, and the part "val", which is kept out of training.

    Args:
        split: the training data.
        share: size of the part "val", above 0 and below 1. Both parts have an example at least.
        seed: of the draw.

    Raises:
        ValueError: there are not two examples to divide.
    """
    total = len(split.examples)
    if total < 2:
        raise ValueError(f"{split.source}: expected two examples at least, to train on and to select by")
    count = min(max(1, round(share * total)), total - 1)
    drawn = frozenset(random.Random(seed).sample(range(total), count))

    def part(name: str, inside: bool) -> TextSplit:
        examples = tuple(e for index, e in enumerate(split.examples) if (index in drawn) is inside)
        shown = f"{split.source}, of which {len(examples):,} drawn with seed {seed}"
        return replace(split, name=name, examples=examples, source=shown)

    return part(split.name, inside=False), part("val", inside=True)
