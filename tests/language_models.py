"""Small language models and tokenizers of transformers, for tests. Needs transformers and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

tokenizers = pytest.importorskip("tokenizers", reason="the language side needs tokenizers")
transformers = pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], size: int = 320) -> transformers.PreTrainedTokenizerFast:
    """A byte-pair tokenizer of `size` tokens, whose merges are those that `texts` suggest."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": END}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class PlainScorer(nn.Module):
    """The obvious way to the loss of each sequence: all logits at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, places: Tensor | None = None) -> Tensor:
        logits = self.model(input_ids).logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(len(labels), -1).sum(1)


def tiny_mamba(vocabulary: int, seed: int = 0) -> transformers.MambaForCausalLM:
    """A Mamba of two layers with random weights, drawn wide enough that its answers differ."""
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model
