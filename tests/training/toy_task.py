"""A task that has no images: which of three continuations follows a sequence of tokens?

Importing this module registers the task, as a package of a user would. B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

import vimtune
from vimtune.fields import option
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.seeds import derive_seed
from vimtune.tasks import (
    Batch,
    Evaluation,
    Forward,
    Job,
    Loader,
    Score,
    Tally,
    Task,
    Tensors,
    register_task,
)

VOCABULARY, LENGTH, CHOICES, PADDING = 11, 10, 3, 0


def sequence(start: int, length: int) -> list[int]:
    """Tokens 1 to V - 1, each the third after the one before."""
    return [1 + (start + 3 * place) % (VOCABULARY - 1) for place in range(length)]


class Sequences(Loader):
    """Sequences of different lengths, padded to `LENGTH`; for evaluation with three continuations each."""

    def __init__(self, split: str, number: int, recipe: Recipe, processes: Processes, train: bool) -> None:
        self.split, self.num_examples = split, number
        self.source = f"{number} generated sequences"
        self.train, self.seed, self.batch_size = train, recipe.run.seed, recipe.optimisation.batch_size
        self.rank, self.world_size = processes.rank, processes.world_size
        self.epoch = self.start_batch = 0
        draw = torch.Generator().manual_seed(len(split))
        starts = torch.randint(0, VOCABULARY, (number,), generator=draw).tolist()
        lengths = torch.randint(4, LENGTH + 1, (number,), generator=draw).tolist()
        self.examples = list(zip(starts, lengths, strict=True))

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.examples).encode()).hexdigest()

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = list(range(len(self.examples)))
        if self.train:
            seed = derive_seed(self.seed, "order", self.epoch)
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
        for number in range(self.start_batch, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            first, last = (len(whole) * (self.rank + more) // self.world_size for more in (0, 1))
            yield self.collate([self.examples[index] for index in whole[first:last]])

    def collate(self, examples: list[tuple[int, int]]) -> Batch:
        if self.train:
            tokens = torch.full((len(examples), LENGTH), PADDING)
            for row, (start, length) in zip(tokens, examples, strict=True):
                row[:length] = torch.tensor(sequence(start, length))
            return Batch({"tokens": tokens}, int((tokens[:, 1:] != PADDING).sum()))
        tokens = torch.full((len(examples), CHOICES, LENGTH), PADDING)
        answer_starts = torch.tensor([length // 2 for _, length in examples], dtype=torch.int64)
        for rows, (start, length) in zip(tokens, examples, strict=True):
            for choice, row in enumerate(rows):  # the first choice is right; the others end shorter and wrong
                end = length if choice == 0 else max(length // 2 + 1, length - choice)
                row[:end] = torch.tensor(sequence(start, end))
                row[length // 2 : end] += choice
            rows[rows >= VOCABULARY] -= VOCABULARY - 1
        return Batch({"tokens": tokens, "answer_starts": answer_starts}, len(examples))


class Bigrams(nn.Module):
    """Predicts each token from the one before it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.unembed = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) tokens to (B, L, V) logits."""
        return self.unembed(self.dropout(self.mix(self.embed(tokens)).tanh()))


def log_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each token but the first, given those before it: (B, L - 1); 0 for padding."""
    values = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return values * (tokens[:, 1:] != PADDING)


class Likelihoods(Tally):
    """Counts the examples whose right continuation is the likeliest, as a whole and per token."""

    def __init__(self) -> None:
        names = ("hits", "norm", "loss", "count")
        self.totals = {name: torch.zeros((), dtype=torch.float64) for name in names}

    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        tokens = tensors["tokens"]
        flat = tokens.flatten(0, 1)
        values = log_likelihoods(forward(flat), flat).view(*tokens.shape[:2], -1)
        answered = torch.arange(1, LENGTH, device=tokens.device) >= tensors["answer_starts"][:, None, None]
        answered = answered & (tokens[..., 1:] != PADDING)
        sums = (values * answered).sum(-1)
        return {
            "hits": (sums.argmax(1) == 0).sum(),
            "norm": ((sums / answered.sum(-1)).argmax(1) == 0).sum(),
            "loss": -sums[:, 0].double().sum(),
            "count": torch.ones_like(tokens[:, 0, 0]).sum(),
        }

    def count(self, judged: Tensors) -> None:
        for name, value in judged.items():
            self.totals[name] += value

    def evaluation(self) -> Evaluation:
        hits, norm, loss, count = (float(total) for total in self.totals.values())
        number = max(1.0, count)
        scores = {"acc": 100 * hits / number, "acc_norm": 100 * norm / number, "nats": loss / number}
        return Evaluation(loss / number, scores, int(count))


class Continuations(Job):
    """The model on its sequences."""

    noise = 0.0

    def prepare(self, tensors: Tensors, seed: int) -> Tensors:
        """Make a share `noise` of the tokens illegible."""
        tokens = tensors["tokens"]
        draw = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
        return {"tokens": tokens.where(draw >= self.noise, PADDING), "targets": tokens}

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        targets = tensors["targets"]
        return -log_likelihoods(forward(tokens=tensors["tokens"]), targets).sum()

    def start_tally(self, loader: Loader) -> Likelihoods:
        return Likelihoods()


@register_task("continuation")
@dataclass(frozen=True, kw_only=True)
class Continuation(Task):
    """Which continuation follows?"""

    summary = "which of three continuations follows a sequence"
    unit = "tokens"
    short_unit = "tok"
    examples = "sequences"
    scores = (
        Score("acc", "accuracy"),
        Score("acc_norm", "accuracy per token"),
        Score("nats", "nats", percent=False, higher_is_better=False),
    )

    noise: Annotated[float, Ge(0), Lt(1)] = option(0.0, "share of the tokens that are made illegible")

    def open(self, recipe: Recipe, processes: Processes) -> Job:
        def loader(split: str, number: int, **options: Any) -> Sequences:
            return Sequences(split, number, recipe, processes, **options)

        torch.manual_seed(derive_seed(recipe.run.seed, "model"))
        model = Bigrams(recipe.backbone.drop_path)
        vimtune.inject(
            model, recipe.method.peft, targets=recipe.method.targets, **recipe.method.method_kwargs
        )
        selection = loader("val", 20, train=False)
        job = Continuations(
            model=model.to(processes.device),
            train=loader("train", 37, train=True),
            selection=selection,
            final=selection,
            usual_count=recipe.optimisation.batch_size * LENGTH // 2,
        )
        job.noise = self.noise
        return job
