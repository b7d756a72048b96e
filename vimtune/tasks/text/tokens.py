"""From examples to the tokens that a model reads, divided as lm-evaluation-harness 0.4.13 divides them.

Published accuracies depend on where the tokens of a context end and those of its continuation begin, so this
follows the harness to the letter (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vimtune.data.errors import DatasetError
from vimtune.data.text import Example
from vimtune.text import quote

Pair = tuple[str, str]
"""A context and the continuation that is scored after it."""


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __len__(self) -> int: ...

    def __call__(self, text: list[str], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One sequence that goes through a model."""

    tokens: tuple[int, ...]
    scored: int
    """How many tokens at its end are scored; 0 where the model gives one answer for the whole sequence."""
    slot: int = 0
    """Which choice the model's answer belongs to: its number among those of all examples (`slots_of`). Where
    the model gives an answer for each choice in turn, the first of them."""


@dataclass(frozen=True)
class Item:
    """Rows that go through a model in one batch."""

    rows: tuple[Row, ...]
    answer: int = 0
    """Index of what is right among the answers that the model gives to these rows together."""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)


class Encoder:
    """Makes rows of texts.

    Attributes:
        cut: how many sequences were longer than the limit and have lost their beginning.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        """An encoder.

        Args:
            tokenizer: of the model.
            max_length: the most tokens that the model reads; the one after them is predicted only.
        """
        self._tokenizer, self._longest = tokenizer, max_length + 1
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = eos if bos is None else bos
        assert first is not None and eos is not None, "check_tokenizer has been asked"
        self._first, self._end = first, eos
        self.cut = 0

    def choices(self, examples: Sequence[Example]) -> list[Row]:
        """The sequences by which the choices of examples are scored: rows of the slots of `slots_of`.

        A text without a context (see `_windows`) may take several rows.

        Raises:
            DatasetError: a continuation that has no token of its own.
        """
        pairs = [pair for e in examples for pair in zip(e.contexts, e.continuations, strict=True)]
        divided = enumerate(self._divided(pairs))
        return [row for slot, (pair, parts) in divided for row in self._rows(pair, *parts, slot)]

    def training(self, examples: Sequence[Example]) -> list[Row]:
        """The sequences from which the right answers are learnt, each with the end of the text after it.

        Raises:
            DatasetError: an answer that has no token of its own.
        """
        pairs = [(e.prompt, e.completion) for e in examples]
        return [
            row
            for pair, (context, answer) in self._divided(pairs)
            for row in self._rows(pair, context, [*answer, self._end], 0)
        ]

    def questions(self, examples: Sequence[Example]) -> list[Row]:
        """The contexts of examples whose choices are classes: a row for each.

        Raises:
            DatasetError: a context that has no token.
        """
        texts = [example.contexts[0] for example in examples]
        tokens = self._encode(texts)
        for text, found in zip(texts, tokens, strict=True):
            if not found:
                raise DatasetError(f"the tokenizer makes no token of the text {quote(text)}")
        starts = [slots.start for slots in slots_of(examples)]
        return [self._fitting(row, 0, start) for row, start in zip(tokens, starts, strict=True)]

    def prompts(self, texts: Sequence[str]) -> list[Row]:
        """The sequences that a model is to complete.

        Blanks at the end of a text belong to the completion, as in `training`. A text of blanks alone asks
        for any text: it becomes the token that begins one.
        """
        kept = [_move_blanks(text, "")[0] for text in texts]
        tokens = iter(self._encode([text for text in kept if text]))
        return [self._fitting(next(tokens) if text else [self._first], 0, 0) for text in kept]

    def _divided(self, pairs: Sequence[Pair]) -> Iterable[tuple[Pair, tuple[list[int], list[int]]]]:
        """For each pair the tokens of its context and those of its continuation."""
        moved = [_move_blanks(*pair) for pair in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved if context))
        known = dict(zip(contexts, self._encode(contexts), strict=True))
        whole = self._encode([context + continuation for context, continuation in moved if context])
        alone = self._encode([text for context, text in moved if not context], add_special_tokens=False)
        wholes, alones = iter(whole), iter(alone)
        for pair, (context, _) in zip(pairs, moved, strict=True):
            if context:
                own = known[context]
                yield pair, (own, next(wholes)[len(own) :])
            else:
                tokens = next(alones)
                # A text may begin with that token itself; the harness does not put it there twice.
                begins = tokens[:1] == [self._first]
                yield pair, (tokens[:1], tokens[1:]) if begins else ([self._first], tokens)

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        """The tokens of each text."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(texts, return_attention_mask=False, **options)["input_ids"]
        return found

    def _rows(self, pair: Pair, context: list[int], scored: list[int], slot: int) -> list[Row]:
        """The row of a context and the tokens after it; several for a long text without a context."""
        if not scored:
            raise DatasetError(
                f"the tokenizer has no token of its own for {quote(pair[1])} after {quote(pair[0][-40:])}: "
                "nothing is left to score. Use another tokenizer, or begin the continuation with a blank"
            )
        if not pair[0] and len(context) + len(scored) > self._longest:
            return list(self._windows([*context, *scored], slot))
        return [self._fitting([*context, *scored], len(scored), slot)]

    def _windows(self, tokens: list[int], slot: int) -> Iterable[Row]:
        """A text as rows of the longest possible length, in which each of its tokens is predicted once."""
        for start in range(0, len(tokens) - 1, self._longest - 1):
            window = tuple(tokens[start : start + self._longest])
            yield Row(window, len(window) - 1, slot)

    def _fitting(self, tokens: list[int], scored: int, slot: int) -> Row:
        """The row of a sequence, without its beginning where it is too long."""
        if len(tokens) > self._longest:
            self.cut += 1
            tokens = tokens[-self._longest :]
        return Row(tuple(tokens), min(scored, len(tokens) - 1), slot)


def slots_of(examples: Sequence[Example]) -> list[range]:
    """The numbers of the choices of each example, when those of all examples are counted together."""
    slots, start = [], 0
    for example in examples:
        slots.append(range(start, start + len(example.continuations)))
        start += len(example.continuations)
    return slots


def _move_blanks(context: str, continuation: str) -> Pair:
    """The pair with the blanks at the end of the context moved to the continuation.

    Tokenizers join a blank with the word after it, so the tokens of a context that ends with one would not be
    those of the whole text.
    """
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
