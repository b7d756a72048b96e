"""Tokenizers of language models."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vimtune.language.registry import LANGUAGE_MODELS, NEOX_TOKENIZER
from vimtune.text import printable, quote

END_OF_TEXT = "<|endoftext|>"
"""The token that begins, ends and pads a text."""
MOST_UNUSED = 1024
"""A vocabulary may be this much larger than the tokenizer: it is padded to a multiple of such a number at
most."""

PROBE = "Don't  stop: ÀÉ naïve \ufb01 12345 3.14\t\n\n    def f(x):\r\n 日本 🙂 "
"""A text in which tokenizers differ that have the same vocabulary: capitals, accents, digits, blanks, other
scripts."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model; it has a token for padding.

    Args:
        name: as for `create_language_model`, where a file of weights stands for its folder; also a
            tokenizer.json, and any folder or repository with a tokenizer.

    Raises:
        ValueError: there is none.
    """
    source = name
    if name in LANGUAGE_MODELS:
        known = LANGUAGE_MODELS.get(name).tokenizer
        if known is None:
            return byte_tokenizer()
        source = known
    path = Path(source)
    # As a path the empty name would be the working folder.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not (source and path.exists()):
        raise ValueError(
            f"tokenizer {quote(source)}: expected a model of the table, a repository of the hub "
            "(owner/name), or a folder or file that exists"
        )
    try:
        if path.is_file() and path.suffix == ".json":
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END_OF_TEXT)
        else:
            local = path.parent if path.is_file() else path
            if local.is_dir() and not any(local.glob("tokenizer*")):
                raise ValueError(
                    f"{printable(str(local))} has no tokenizer.json; the tokenizer of the state-spaces "
                    f"models is {NEOX_TOKENIZER}"
                )
            tokenizer = AutoTokenizer.from_pretrained(str(local), trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"tokenizer {quote(source)}: {_first_line(error)}") from error
    except Exception as error:  # tokenizers raises plain Exception for files that it cannot read
        raise ValueError(f"tokenizer {quote(source)} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without training: the 256 bytes of UTF-8, token 256 ends a text.

    Any text comes back from its tokens as it was.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **ends)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Refuse a tokenizer that does not belong to a model.

    Args:
        tokenizer: the tokenizer.
        model: a language model of transformers, or any module with its `backbone`.

    Raises:
        ValueError: the tokenizer has tokens that the model does not know, or so few that it is another one's,
            or it has no token for the end of a text.
    """
    tokens, vocabulary = len(tokenizer), cast(Any, model.backbone).config.vocab_size
    if not vocabulary - MOST_UNUSED < tokens <= vocabulary:
        raise ValueError(
            f"the tokenizer has {tokens:,} tokens and the model a vocabulary of {vocabulary:,}: give the "
            "tokenizer with which the model was trained"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no token for the end of a text: give one with an eos_token, as those of "
            "language models have"
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that changes when a text may become other tokens.

    It is that of the vocabulary, of the merges where there are any, and of what becomes of `PROBE`. The whole
    tokenizer.json would not do: what it holds depends on the version of the package that writes it.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    merges = [] if fast is None else json.loads(fast.to_str())["model"].get("merges", [])
    decisive = [
        sorted(tokenizer.get_vocab().items()),
        [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],  # either, by version
        tokenizer(PROBE)["input_ids"],
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().split("\n", 1)[0])
