"""Make a corpus of English prose, and a tokenizer for it, from a folder of books of Project Gutenberg.

    git clone https://github.com/rcdm-uga/Gutenberg_Text books
    python benchmarks/text_corpus.py books corpus --megabytes 620

Writes `train.jsonl`, a book a line in a random order that is always the same, and `tokenizer.json`, byte-pair
encoding of 16,384 tokens, trained on the first books. Headers and licences of Project Gutenberg, books in
other languages and second copies of a book are left out. `vimtune train --task text --data-dir corpus` trains
on it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

VOCABULARY = 16_384
END = "<|endoftext|>"
TOKENIZER_BOOKS = 200
SHORTEST = 20_000
"""Characters of the shortest book that is taken."""
_START = re.compile(r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^\n]*\n")
_END = re.compile(r"\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg")


def main() -> None:
    options = parse_options()
    options.corpus.mkdir(parents=True, exist_ok=True)
    files = sorted(options.books.rglob("*.txt"))
    random.Random(0).shuffle(files)
    left, count = options.megabytes * 1e6, 0
    with open(options.corpus / "train.jsonl", "w", encoding="utf-8") as out:
        for text in books(files):
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            left, count = left - len(text), count + 1
            if left <= 0:
                break
    print(f"{count:,} books, {options.megabytes - left / 1e6:,.0f} million characters")
    train_tokenizer(options.corpus)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", type=Path, help="folder with the books as .txt")
    parser.add_argument("corpus", type=Path, help="folder to be written")
    parser.add_argument("--megabytes", type=int, default=620, help="millions of characters to take")
    return parser.parse_args()


def books(files: list[Path]) -> Iterator[str]:
    """The texts of English books, each once, a paragraph a line."""
    seen = set()
    for file in files:
        text = file.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        if "Language: " in text[:4000] and "Language: English" not in text[:4000]:
            continue
        begin = _START.search(text[:6000])
        text = text[begin.end() :] if begin else text[1000:]
        end = _END.search(text)
        text = text[: end.start()] if end else text
        if text[2000:4000] in seen:
            continue
        seen.add(text[2000:4000])
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
        text = "\n".join(part for part in paragraphs if len(part) > 1 and "\ufffd" not in part)
        if len(text) >= SHORTEST:
            yield text


def train_tokenizer(corpus: Path) -> None:
    """Byte-pair encoding of the first books, with a token for the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(corpus / "train.jsonl", encoding="utf-8") as lines:
        tokenizer.train_from_iterator(
            (json.loads(line)["text"] for line in islice(lines, TOKENIZER_BOOKS)), trainer
        )
    tokenizer.save(str(corpus / "tokenizer.json"))


if __name__ == "__main__":
    main()
