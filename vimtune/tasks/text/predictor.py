"""Answers for a user's texts with an adapter file: a class, a choice or a completion for each.

Shape letters: B rows, L tokens, C choices.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vimtune.adapters import AdapterFileError, AdapterInfo, load_adapter, read_adapter_info
from vimtune.data.text import Example, Line, TextFormat
from vimtune.fields import options_of
from vimtune.language.refusals import StatesRefused
from vimtune.ops import use_backend
from vimtune.recipe import Recipe, load_recipe
from vimtune.tasks.answers import Answer, Choice, Completion
from vimtune.tasks.components import PredictOptions
from vimtune.tasks.origin import recipe_of_adapter
from vimtune.tasks.predictor import LeftOut, Predictor, check_counts
from vimtune.tasks.text.heads import ClassHead, Head, LikelihoodHead, RatingHead
from vimtune.tasks.text.job import settings_of
from vimtune.tasks.text.models import build_base, language_model, open_tokenizer
from vimtune.tasks.text.settings import LanguageModelSettings, TextPredictOptions
from vimtune.tasks.text.tokens import Encoder
from vimtune.text import counted, quote

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextPredictor(Predictor):
    """What predictors of texts have in common.

    Attributes:
        model: the language model or classifier, on `device` and in evaluation mode.
        tokenizer: of the model.
        max_length: tokens of a sequence; the beginning of longer ones is cut.
        form: how a user's entries look.
        classes: names of the model's classes, if it has any.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
    """

    model: Any
    tokenizer: Any
    max_length: int
    form: TextFormat
    classes: Sequence[str]
    device: torch.device
    backend: str = "auto"

    def predict(
        self,
        inputs: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        /,
        *,
        top_k: int = 3,
        batch_size: int = 32,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
    ) -> Iterator[Answer]:
        """Answer in order.

        Args:
            inputs: texts, or entries with the fields that a line of the task's files has; or one of these.
                The answer may be left out of an entry; it is not looked at.
            top_k: classes or choices that are named for each; all of them if there are fewer.
            batch_size: inputs that go through the model together.
            temperature: what the outputs for the choices are divided by before they become probabilities,
                such as the one that `vimtune.evaluate` fits; 1 for completions, which have none.
            max_new_tokens: the most tokens of a completion.

        Raises:
            ValueError: an entry that is wrong, a number that is no whole number from 1 on, a temperature that
                is not above 0, or outputs of the model that are not finite.
        """
        check_counts(top_k=top_k, batch_size=batch_size, max_new_tokens=max_new_tokens)
        options = TextPredictOptions(
            top_k=top_k, batch_size=batch_size, temperature=temperature, max_new_tokens=max_new_tokens
        )
        lines: list[Line] = []
        for number, given in enumerate(_several(inputs), 1):
            place = f"input {number}"
            if isinstance(given, str):
                lines.append(self.form.entry(place, given))
            else:
                lines += self.form.ask_about([Line(place, dict(given))])
        return self._answers(self.form.asked(lines, self.classes), options)

    def answers(
        self, inputs: Sequence[Any], options: PredictOptions, leave_out: Callable[[LeftOut], None]
    ) -> Iterator[Answer]:
        """Answer for the command line; no text is left out."""
        assert isinstance(options, TextPredictOptions)
        return self._answers(inputs, options)

    @torch.no_grad()
    def _answers(self, asked: Sequence[Any], options: TextPredictOptions) -> Iterator[Answer]:
        encoder = Encoder(self.tokenizer, self.max_length)
        for start in range(0, len(asked), options.batch_size):
            batch = asked[start : start + options.batch_size]
            with use_backend(self.backend):
                found = self._batch(encoder, batch, options)
            yield from found
        if encoder.cut:
            logger.warning(
                "beginnings of %s cut off, which had more than %d tokens",
                counted(encoder.cut, "sequences"),
                self.max_length,
            )

    @abstractmethod
    def _batch(self, encoder: Encoder, asked: Sequence[Any], options: TextPredictOptions) -> Sequence[Answer]:
        """The answers to one batch of questions, or of prompts."""


def _several(inputs: Any) -> list[str | Mapping[str, Any]]:
    """The texts and entries that a user gives.

    Raises:
        ValueError: something else, or something else among them.
    """
    expected = "texts, or entries with the fields of a line of the task's files"
    if isinstance(inputs, str | Mapping):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise ValueError(f"inputs = {quote(inputs)}: expected {expected}")
    found = list(inputs)
    for number, given in enumerate(found):
        if not isinstance(given, str | Mapping):
            raise ValueError(f"inputs[{number}] = {quote(given)}: expected {expected}")
    return found


@dataclass(kw_only=True)
class ChoicePredictor(TextPredictor):
    """Says which class a text has, or which choice answers a question.

    Attributes:
        head: what is asked of the model, and how its answers are judged.
    """

    kind: ClassVar[type[Answer]] = Choice
    head: Head

    def _batch(self, encoder: Encoder, asked: Sequence[Any], options: TextPredictOptions) -> list[Choice]:
        items = self.head.scoring_items(encoder, asked)
        tally = self.head.tally(asked, items, characters=False)
        tally.add(self.model, self.head.batch(items).to(self.device).tensors)
        return [
            _choice(example, judged.log_likelihoods, options)
            for example, judged in zip(asked, tally.judged(), strict=True)
        ]


def _choice(example: Example, values: Sequence[float], options: TextPredictOptions) -> Choice:
    """The likeliest choices by log-likelihoods, or outputs of a head, (C,)."""
    scores = torch.tensor(values, dtype=torch.float64)
    if not scores.isfinite().all():
        raise ValueError(
            f"the model's outputs for {quote(example.prompt)} are not finite: the adapter or its base "
            "weights are damaged or diverged; train again, or give other base weights with --checkpoint"
        )
    best = (scores / options.temperature).softmax(0).topk(min(options.top_k, len(values)))
    indices = best.indices.tolist()
    return Choice(example.prompt, indices, [example.choices[i] for i in indices], best.values.tolist())


@dataclass(kw_only=True)
class CompletionPredictor(TextPredictor):
    """Writes what follows a prompt: at each step the likeliest token."""

    kind: ClassVar[type[Answer]] = Completion

    def _answers(self, asked: Sequence[Any], options: TextPredictOptions) -> Iterator[Answer]:
        if options.temperature != 1:
            raise ValueError(
                f"temperature = {options.temperature:g}: a completion takes the likeliest token at each "
                "step, and a temperature changes no order. Leave it out"
            )
        return super()._answers(asked, options)

    def _batch(self, encoder: Encoder, asked: Sequence[Any], options: TextPredictOptions) -> list[Completion]:
        rows = [row.tokens for row in encoder.prompts(asked)]
        try:
            written = self._write_together(rows, options.max_new_tokens)
        except StatesRefused:
            written = [self._write_alone(row, options.max_new_tokens) for row in rows]
        return [self._completion(*pair) for pair in zip(asked, written, strict=True)]

    def _write_together(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """What follows each row, whose states are kept from token to token."""
        longest, end = max(map(len, rows)), self.tokenizer.eos_token_id
        # What is written goes behind the last token, so padding is on the left here.
        tokens = torch.tensor([[end] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return self._generate(tokens, mask, count, use_cache=True)

    def _write_alone(self, row: Sequence[int], count: int) -> list[int]:
        """What follows one row, which is read anew for each token: for rules that need the whole text."""
        tokens = torch.tensor([list(row)])
        return self._generate(tokens, torch.ones_like(tokens), count, use_cache=False)[0]

    def _generate(self, tokens: Tensor, mask: Tensor, count: int, use_cache: bool) -> list[list[int]]:
        """At most `count` tokens behind each row of (B, L)."""
        end = self.tokenizer.eos_token_id
        written = self.model.generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            use_cache=use_cache,
        )
        found: list[list[int]] = written[:, tokens.shape[1] :].tolist()
        return found

    def _completion(self, prompt: str, tokens: list[int]) -> Completion:
        end = self.tokenizer.eos_token_id
        ended = end in tokens
        text = self.tokenizer.decode(tokens[: tokens.index(end)] if ended else tokens)
        blanks = prompt[len(prompt.rstrip()) :]  # the model was asked to write them, too
        return Completion(prompt, text.removeprefix(blanks), ended)


def open_predictor(
    task: TextTask, adapter: Path, base: Mapping[str, Any], device: torch.device, backend: str, force: bool
) -> ChoicePredictor | CompletionPredictor:
    """Create the model that answers with an adapter; the arguments are those of `Task.open_predictor`.

    Raises:
        ValueError: tokenizer, weights or an adapter that do not fit; the message says which.
    """
    info = read_adapter_info(adapter)
    recipe = recipe_for(task, adapter, base)
    data, backbone = settings_of(recipe)
    completes = task.form.is_completed(info.classes)
    if completes and task.head == "classifier":
        raise AdapterFileError(f"{quote(str(adapter))} does not name the classes of its head")
    head = _head(task, info)
    if completes:
        model: Any = language_model(recipe, backbone)
    else:
        model = build_base(recipe, backbone, head.outputs, task.pooling)
    load_adapter(model, adapter, force=force)
    tokenizer = open_tokenizer(backbone, model, info, force)
    shared: dict[str, Any] = {
        "model": model.to(device).eval(),
        "tokenizer": tokenizer,
        "max_length": data.max_length,
        "form": task.form,
        "classes": info.classes,
        "device": device,
        "backend": backend,
    }
    return CompletionPredictor(**shared) if completes else ChoicePredictor(**shared, head=head)


def _head(task: TextTask, info: AdapterInfo) -> Head:
    """What an adapter was trained to answer with."""
    if task.head == "likelihood":
        return LikelihoodHead()
    return RatingHead() if info.num_classes == RatingHead.outputs else ClassHead(info.num_classes)


def recipe_for(task: TextTask, adapter: Path, base: Mapping[str, Any]) -> Recipe:
    """The keys of the recipe of an adapter that say which model it has and how that reads texts."""
    stored = recipe_of_adapter(adapter, base)
    needed = {*options_of(LanguageModelSettings), "max_length", "seed"}
    values = {name: value for name, value in stored.items() if name in needed}
    return load_recipe(None, {**values, **base, "task": task.name})
