"""Few texts: so many of each class, or so many in all."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from vimtune.data import DatasetError
from vimtune.data.text import (
    Example,
    TextSplit,
    draw_protocol,
    draw_protocol_part,
    draw_shots,
    split_off,
)


def texts(count: int, classes: tuple[str, ...] = ("no", "yes")) -> TextSplit:
    examples = tuple(Example.question(f"text {number}", ("no", "yes"), number % 2) for number in range(count))
    return TextSplit("train", examples, "a file", classes)


def test_the_protocol_divides_so_many_that_were_drawn() -> None:
    train, val = draw_protocol(texts(40), 20, seed=1)
    assert [train.name, val.name, len(train.examples), len(val.examples)] == ["train", "val", 16, 4]
    assert not set(train.examples) & set(val.examples)
    assert set(train.examples) | set(val.examples) < set(texts(40).examples)
    assert train.source == "a file, of which 16 for train_size 20 drawn with seed 1"
    assert draw_protocol(texts(40), 20, seed=2)[0].fingerprint() != train.fingerprint()
    with pytest.raises(DatasetError, match="needs 33 examples to train on and 8 to select by"):
        draw_protocol(texts(40), 41, seed=1)


def test_the_protocol_takes_its_parts_from_files_of_their_own() -> None:
    train, val = texts(40), dataclasses.replace(texts(5), name="val")
    few = draw_protocol_part(train, 20, seed=1)
    assert (few.name, len(few.examples)) == ("train", 16) and set(few.examples) < set(train.examples)
    assert few.source == "a file, of which 16 for train_size 20 drawn with seed 1"
    assert len(draw_protocol_part(val, 20, seed=1).examples) == 4
    with pytest.raises(DatasetError, match=r"needs 24 train and 6 val examples, and 'val' has 5"):
        draw_protocol_part(val, 30, seed=1)


def test_shots_are_so_many_of_each_class_and_none_of_those_that_select() -> None:
    train, val = split_off(texts(40), 0.25, seed=0)
    few = draw_shots(train, 3, seed=0)
    assert Counter(example.answer for example in few.examples) == {0: 3, 1: 3}
    assert not set(few.examples) & set(val.examples)
    with pytest.raises(DatasetError, match=r"shots = 30 needs 30 examples of each class, and 2 of 2 classes"):
        draw_shots(train, 30, seed=0)
    with pytest.raises(DatasetError, match="needs texts with labels, and a file has none: give train_size"):
        draw_shots(texts(4, classes=()), 1, seed=0)
