"""Where the tokens of contexts end, what is learnt, what is cut, and which tokenizers are refused."""

from __future__ import annotations

import pytest
from language_models import train_tokenizer

from vimtune.data.text import Example
from vimtune.tasks.text.tokens import Encoder, slots_of


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the answer is here and there"] * 3, size=280)


def example(context, *continuations, answer=0):
    return Example(
        (context,) * len(continuations), continuations, continuations, answer, context, continuations[answer]
    )


def texts(tokenizer, row):
    """What is read before the scored tokens, and what is scored."""
    middle = len(row.tokens) - row.scored
    return tokenizer.decode(row.tokens[:middle]), tokenizer.decode(row.tokens[middle:])


def test_answers_are_learnt_with_the_end_of_the_text(tokenizer):
    (row,) = Encoder(tokenizer, 100).training([example("the answer", " is here")])
    assert texts(tokenizer, row) == ("the answer", " is here<|endoftext|>")


def test_blanks_at_the_end_of_a_context_move_to_the_continuation(tokenizer):
    (row,) = Encoder(tokenizer, 100).choices([example("the answer \n ", "is")])
    assert texts(tokenizer, row) == ("the answer", " \n is")
    (row,) = Encoder(tokenizer, 100).choices([example("  ", "is")])  # nothing is left before it
    assert texts(tokenizer, row) == ("<|endoftext|>", "  is")


def test_choices_are_numbered_over_all_examples(tokenizer):
    examples = [example("a", " b", " c"), example("d", " e", " f", " g")]
    assert [row.slot for row in Encoder(tokenizer, 100).choices(examples)] == [0, 1, 2, 3, 4]
    assert slots_of(examples) == [range(0, 2), range(2, 5)]
    assert [row.slot for row in Encoder(tokenizer, 100).questions(examples)] == [0, 2]


def test_long_sequences_lose_their_beginning_and_are_counted(tokenizer):
    encoder = Encoder(tokenizer, 10)
    whole, cut = encoder.choices([example("x", " y"), example("x" * 50, " y")])
    assert encoder.cut == 1 and len(cut.tokens) == 11 and len(whole.tokens) < 11
    assert texts(tokenizer, cut)[1] == " y" == texts(tokenizer, whole)[1]
    (row,) = encoder.choices([example("x", " " + "y" * 50)])
    assert encoder.cut == 2 and row.scored == 10  # the first token has nothing before it


@pytest.mark.parametrize("number", [9, 10, 11, 20, 21, 35])
def test_of_a_long_text_without_a_context_every_token_is_predicted_once(tokenizer, number):
    text = "".join(chr(ord("a") + index % 26) for index in range(number))
    encoder = Encoder(tokenizer, 10)
    rows = encoder.training([example("", text)])
    assert encoder.cut == 0 and all(len(row.tokens) <= 11 for row in rows)
    assert "".join(texts(tokenizer, row)[1] for row in rows) == text + "<|endoftext|>"
    assert all(row.slot == 0 for row in encoder.choices([example("", text)]))
