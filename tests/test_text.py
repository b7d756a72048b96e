"""Text of users is shown, never obeyed: no escape sequence, no formula, no megabytes."""

from __future__ import annotations

import csv
import io
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from vimtune.text import counted, csv_cell, csv_text, printable, quote, shorten, unicode_text


@pytest.mark.parametrize("text", ["rose", "Löwenzahn", "桜", "été d'or", "👩‍🌾", "$x_1$", "[red]"])
def test_visible_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["a\x1b[31m", "a\nb", "a\rb", "a\x07", "a\u202eb", "a\udcffb", "a\u2028", "\x9b2J"]
)
def test_what_a_terminal_would_obey_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable() and shown.encode("utf-8") and "\\" in shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, list(range(10**6)), {i: i for i in range(1000)}, 10**9999, b"\0" * 10**6, [["x" * 10**7]]],
    ids=["text", "list", "dict", "number", "bytes", "text in lists"],
)
def test_messages_do_not_repeat_megabytes(value):
    assert len(quote(value)) < 400


def test_quote_of_a_structure_that_contains_itself_ends():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert "nested" in quote(nested)


PIXELS = torch.zeros(3, 64, 64)
Pair = namedtuple("Pair", "first second")


class Lazy:
    """What fails when it is asked for its shape, as an array of a closed file does."""

    @property
    def shape(self):
        raise RuntimeError("closed")

    def __repr__(self):
        return "<closed array>"


class Described:
    """No array, although it has a shape, as descriptions of inputs have."""

    shape = (3, 64, 64)

    def __repr__(self):
        return "Described(3, 64, 64)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (PIXELS, "a Tensor of shape (3, 64, 64)"),
        (torch.nn.Parameter(PIXELS), "a Parameter of shape (3, 64, 64)"),
        (PIXELS.numpy(), "an ndarray of shape (3, 64, 64)"),
        (np.zeros(5), "an ndarray of shape (5,)"),
        (memoryview(b"abc"), "a memoryview of shape (3,)"),
        ([PIXELS, 3], "[a Tensor of shape (3, 64, 64), 3]"),
        ((PIXELS,), "(a Tensor of shape (3, 64, 64),)"),
        ({"image": [PIXELS], "label": "cat"}, "{'image': [a Tensor of shape (3, 64, 64)], 'label': 'cat'}"),
        (torch.tensor(3), "tensor(3)"),
        (np.float64(0.5), repr(np.float64(0.5))),
        (torch.Tensor, "<class 'torch.Tensor'>"),
        (torch.Size([3, 4]), "torch.Size([3, 4])"),
        (Lazy(), "<closed array>"),
        (Described(), "Described(3, 64, 64)"),
        (Pair(1, [2]), "Pair(first=1, second=[2])"),
        ([(), (1,), (1, "a"), [], {}, {1: 2}], "[(), (1,), (1, 'a'), [], {}, {1: 2}]"),
    ],
)
def test_of_arrays_messages_say_the_shape_and_of_anything_else_the_value(value, shown):
    assert quote(value) == shown


def test_messages_do_not_fetch_the_numbers_of_a_device():
    class OnDevice(torch.Tensor):
        def __repr__(self):
            raise AssertionError("its numbers would be brought from the device")

    tensor = PIXELS.as_subclass(OnDevice)
    assert quote({"image": tensor}) == "{'image': an OnDevice of shape (3, 64, 64)}"


def test_what_is_large_inside_of_something_small_is_described():
    assert quote([[0] * 1000, 10**5000]) == "[a list of 1000 items, a whole number of 16610 bits]"
    assert quote(OrderedDict.fromkeys(range(1000))) == "an OrderedDict of 1000 items"


def test_text_that_is_not_unicode_is_written_out():
    assert unicode_text("é\udce9\n😀") == "é\\udce9\n😀"


def test_shorten_keeps_both_ends():
    short = shorten("a" * 100 + "b" * 100, 40)
    assert short.startswith("aaa") and short.endswith("bbb") and len(short) <= 40
    assert shorten("short", 40) == "short"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_is_never_a_formula(text):
    assert csv_cell(text) == f"'{text}"
    assert csv_cell("rose") == "rose"


@pytest.mark.parametrize(
    "name", ["two\nlines.jpg", "a\rb.jpg", "\x1b[31m.jpg", 'say "x", y.jpg', "桜.jpg", ""]
)
def test_a_file_about_inputs_gives_their_names_back(name):
    text = csv_text([["path", "loss"], [name, -0.5], ["=1+1", None]])
    assert text.startswith("path,loss\n") and text.endswith("\n'=1+1,\n")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows == [["path", "loss"], [name, "-0.5"], ["'=1+1", ""]]


@pytest.mark.parametrize(
    ("number", "what", "expected"),
    [
        (1, "corrupt images", "1 corrupt image"),
        (0, "images", "0 images"),
        (1024, "batches", "1,024 batches"),
        (1, "batches", "1 batch"),
        (1, "classes", "1 class"),
        (1, "processes", "1 process"),
        (1, "examples", "1 example"),
    ],
)
def test_one_is_counted_in_the_singular(number, what, expected):
    assert counted(number, what) == expected
