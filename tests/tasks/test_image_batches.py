"""Where the images of a split are kept."""

from __future__ import annotations

import pytest

from vimtune.data import build_transform, create_dataset
from vimtune.recipe import Recipe
from vimtune.tasks.images import job
from vimtune.training.distributed import Processes


@pytest.mark.parametrize(
    "asked, often, once",
    [("auto", "auto", "none"), ("none",) * 3, ("host",) * 3, ("device", "device", "auto")],
)
def test_what_is_read_once_gets_a_place_on_the_device_if_that_was_asked_for(asked, often, once, monkeypatch):
    given = []
    create = job.create_loader

    def create_loader(*arguments, cache, **options):
        given.append(cache)
        return create(*arguments, cache="none", **options)

    monkeypatch.setattr(job, "create_loader", create_loader)
    images = create_dataset("synthetic_flowers", "test", img_size=(32, 32), species=2, test_per_species=1)
    transform = build_transform("none", (32, 32), train=False)
    recipe = Recipe(cache=asked, num_workers=0)
    for read_once in (False, True):
        job.open_batches(recipe, images, transform, Processes(), shuffle=False, once=read_once)
    assert given == [often, once]
