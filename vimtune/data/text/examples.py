"""What a line of a text data set stands for, and a split of such examples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vimtune.data.drawing import draw_of_each_class, draw_some, protocol_sizes
from vimtune.data.errors import DatasetError


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
    left = [index for index in range(total) if index not in drawn]
    how = f"drawn with seed {seed}"
    return _part(split, split.name, left, how), _part(split, "val", sorted(drawn), how)


def draw_protocol(split: TextSplit, size: int, seed: int) -> tuple[TextSplit, TextSplit]:
    """Draw `size` examples: of 1000, 800 to train on, and 200 as the part "val", which selects.

    Raises:
        DatasetError: there are fewer examples.
    """
    sizes = protocol_sizes(size)
    if len(split.examples) < size:
        raise DatasetError(
            f"train_size = {size} needs {sizes['train']} examples to train on and {sizes['val']} to select "
            f"by, and there are {len(split.examples):,}: lower train_size ({split.source})"
        )
    drawn = draw_some(len(split.examples), size, seed)
    how = f"for train_size {size} drawn with seed {seed}"
    val, train = drawn[: sizes["val"]], drawn[sizes["val"] :]
    return _part(split, split.name, sorted(train), how), _part(split, "val", sorted(val), how)


def draw_protocol_part(split: TextSplit, size: int, seed: int) -> TextSplit:
    """What `draw_protocol` draws for "train" or "val", of examples that are divided into these already.

    Raises:
        DatasetError: there are fewer examples.
    """
    sizes = protocol_sizes(size)
    if len(split.examples) < sizes[split.name]:
        raise DatasetError(
            f"train_size = {size} needs {sizes['train']} train and {sizes['val']} val examples, and "
            f"{split.name!r} has {len(split.examples):,}: lower train_size ({split.source})"
        )
    drawn = sorted(draw_some(len(split.examples), sizes[split.name], seed))
    return _part(split, split.name, drawn, f"for train_size {size} drawn with seed {seed}")


def draw_at_most(split: TextSplit, limit: int | None, seed: int) -> TextSplit:
    """At most `limit` examples, in the order of the split; all of it where it has no more, or without a
    limit."""
    if limit is None or len(split.examples) <= limit:
        return split
    drawn = sorted(draw_some(len(split.examples), limit, seed))
    return _part(split, split.name, drawn, f"for limit {limit} drawn with seed {seed}")


def draw_shots(split: TextSplit, shots: int, seed: int) -> TextSplit:
    """Draw `shots` examples of each class.

    Raises:
        DatasetError: the examples have no classes, or a class has fewer.
    """
    if not split.classes:
        raise DatasetError(
            f"shots = {shots} needs texts with labels, and {split.source} has none: give train_size"
        )
    labels = [example.answer for example in split.examples]
    drawn = draw_of_each_class(labels, split.classes, shots, seed, split.source)
    return _part(split, split.name, drawn, f"{shots} of each class drawn with seed {seed}")


def _part(split: TextSplit, name: str, indices: Sequence[int], how: str) -> TextSplit:
    """The examples at `indices`; `how` says how these came about."""
    source = f"{split.source}, of which {len(indices):,} {how}"
    return replace(split, name=name, examples=tuple(split.examples[i] for i in indices), source=source)
