"""Texts that are made of lines: the data sets of language tasks, read from their official files or the hub.

`Example` (`examples.py`) is what all of them become: a question with its possible continuations, and the text
on which a model is trained. A format is one file beside this one: schemas of its lines that say which example
a line stands for, and a `TextFormat` that names its files. Nothing here imports torch.
"""

from vimtune.data.text.arc import ARC_CHALLENGE, ARC_EASY
from vimtune.data.text.asked import read_asked
from vimtune.data.text.boolq import BOOLQ
from vimtune.data.text.examples import (
    Example,
    TextSplit,
    draw_at_most,
    draw_protocol,
    draw_protocol_part,
    draw_shots,
    split_off,
)
from vimtune.data.text.hellaswag import HELLASWAG
from vimtune.data.text.lines import Line, read_lines
from vimtune.data.text.own import OWN, own_texts
from vimtune.data.text.piqa import PIQA
from vimtune.data.text.places import HubPlace, TextFormat, open_text
from vimtune.data.text.winogrande import WINOGRANDE

__all__ = [
    "ARC_CHALLENGE",
    "ARC_EASY",
    "BOOLQ",
    "HELLASWAG",
    "OWN",
    "PIQA",
    "WINOGRANDE",
    "Example",
    "HubPlace",
    "Line",
    "TextFormat",
    "TextSplit",
    "draw_at_most",
    "draw_protocol",
    "draw_protocol_part",
    "draw_shots",
    "open_text",
    "own_texts",
    "read_asked",
    "read_lines",
    "split_off",
]
