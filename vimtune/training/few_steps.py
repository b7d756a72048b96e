"""What is said of a run that was over before it could learn much.

With few examples and the default batch size, an epoch is a single step: 30 photos and ten epochs make ten
steps. The scores of such a run say more about its length than about the method, and nothing else shows it.
"""

from __future__ import annotations

import math

from vimtune.recipe import Recipe
from vimtune.tasks.job import Loader
from vimtune.text import counted

ENOUGH = 50
"""A run of fewer optimizer steps is told of; docs/training.md has scores by the number of steps."""
SMALLEST_BATCH = 4
"""No smaller batch is advised: its gradients would be mostly noise."""


def few_steps_warning(recipe: Recipe, train: Loader, steps: int) -> str | None:
    """What to say of a run that has taken all of its `steps`; None where they are enough, or where the recipe
    itself asks for a short run (`max_steps`, `limit`).

    Args:
        recipe: the settings of the run.
        train: the batches of its training examples.
        steps: how many optimizer steps its epochs have made.
    """
    settings = recipe.optimisation
    # A task of another package may have no `limit`.
    asked_for = settings.max_steps is not None or getattr(recipe.data, "limit", None) is not None
    if asked_for or steps >= ENOUGH:
        return None
    per_epoch = settings.steps_of(len(train))
    advice = f"--epochs {math.ceil(ENOUGH / per_epoch)}"
    batch_size = _smaller_batch(train.num_examples * settings.epochs, settings.grad_accum)
    if batch_size is not None:
        batches = math.ceil(train.num_examples / batch_size)
        more = settings.steps_of(batches) * settings.epochs
        advice += f", or --batch-size {batch_size} ({more} steps in {counted(settings.epochs, 'epochs')})"
    return (
        f"the run was over after {counted(steps, 'optimizer steps')}, {per_epoch} in each epoch of "
        f"{train.num_examples:,} training {recipe.task.examples}: hardly enough to learn from. "
        f"For at least {ENOUGH} steps give {advice}"
    )


def _smaller_batch(examples: int, grad_accum: int) -> int | None:
    """The largest power of two with which a run over so many `examples`, each counted once an epoch, takes
    enough steps; None where that would be smaller than is advised."""
    largest = examples // (ENOUGH * grad_accum)
    return 1 << (largest.bit_length() - 1) if largest >= SMALLEST_BATCH else None
