"""Values that nobody should give, for tests of everything that reads values of users."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A recipe that begins with an adapter imports this late, which may take longer than `at_once` allows.
import vimtune.tasks.origin  # noqa: F401


@contextmanager
def at_once() -> Iterator[None]:
    """Fails when the block takes more than a few seconds of this process: what hangs on an input takes
    minutes, and a busy machine or a collection of garbage a second."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


TEXTS = {
    "empty": "",
    "blank": " ",
    "NUL": "a\0b",
    "lone surrogate": "\ud800",
    "byte that is not UTF-8": "\udce9",
    "control characters": "\x1b[31mred\r\n\x07",
    "reordering": "\u202etxt.exe",
    "long": "x" * 5000,
    "many digits": "9" * 5000,
    "very many digits": "9" * 100_000,
    "hexadecimal": "0x" + "f" * 5000,
    "no digits": "0x_",
    "sexagesimal": ":".join(["1"] * 20_000),
    "infinite": "1e400",
    "long range": "0-99999999999",
    "falling range": "5-1",
    "comma": ",",
    "equals": "=",
    "no name": "=b",
    "no value": "a=",
    "a name twice": "a=1,a=2",
    "brace": "{",
    "bracket": "[",
    "open list": "[1",
    "list as key": "{[1]: 2}",
    "number as key": "{1: 2}",
    "alias": "[&a 1, *a]",
    "alias before its anchor": "[*a]",
    "tag": "[!!int x]",
    "python tag": "[!!python/object/apply:os.getcwd []]",
    "merge key": "{<<: {a: 1}}",
    "a date that is none": "[2001-13-45]",
    "deep list": "[" * 5000,
    "deep mapping": "{a: " * 5000,
    "deep blocks": "- " * 5000,
}

VALUES = {
    **TEXTS,
    "huge": 10**400,
    "huge negative": -(10**400),
    "too long to be written": 10**5000,
    "33 bits": 2**32,
    "65 bits": 2**64,
    "infinity": math.inf,
    "not a number": math.nan,
    "true": True,
    "half": 0.5,
    "bytes": b"bytes",
    "an object": object(),
    "a function": print,
    "a set": {1},
    "a date": datetime.date(2001, 1, 1),
    "list of an empty list": [[]],
    "list of nothing": [None],
    "list of a huge number": [10**5000],
    "deep": nested(100_000),
    "mapping of nothing": {"a": None},
    "mapping with number keys": {1: 2},
    "mapping with an empty key": {"": 2},
    "mapping of a huge number": {"a": 10**5000},
    "mapping of NaN": {"a": math.nan},
    "deep mapping of Python": {"a": nested(100_000)},
    "mapping of mappings": {"a": {"b": [1, {"c": 2}]}},
    "fields of wrong types": {"rank": [1]},
    "a method with a wrong field": {"prodial": {"rank": None}},
    "reserved options": {"seed": 0, "pretrained": True},
}
