"""What makes training by commands of documents a matter of a second."""

from __future__ import annotations

from vimtune import language

TINY = (
    "--model test_vim --model-kwargs depth=1 --no-pretrained --epochs 1 --warmup-epochs 0 --num-workers 0 "
    "--device cpu"
)

TINY_TEXTS = "--model mamba_tiny --peft lora --rank 2 --epochs 1 --device cpu"
try:
    language.require_transformers()
    HAS_TRANSFORMERS = True
except ValueError:
    HAS_TRANSFORMERS = False
