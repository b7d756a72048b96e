"""Where the images of a split are kept."""

from __future__ import annotations

import pytest
import torch

from vimtune.data import build_transform, create_dataset, create_loader
from vimtune.data.loading import loader
from vimtune.data.loading.resident.store import DoesNotFitError
from vimtune.data.loading.samples import Samples


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize(
    ("asked", "once", "kept"),
    [
        ("auto", False, "device"),
        ("auto", True, ""),
        ("device", False, "device"),
        ("device", True, "device"),
        ("host", False, "host"),
        ("host", True, ""),
        ("none", False, "few"),
        ("none", True, ""),
    ],
)
def test_what_is_read_once_is_kept_on_the_device_if_that_was_asked_for(asked, once, kept, room, monkeypatch):
    places = []

    def fill_store(*arguments):
        if not room:
            raise DoesNotFitError("there is no room")
        places.append("device")
        return fill(*arguments)

    fill = loader.fill_store
    monkeypatch.setattr(loader, "_is_gpu", lambda device: True)
    monkeypatch.setattr(loader, "fill_store", fill_store)
    monkeypatch.setattr(Samples, "fill_cache", lambda self: places.append("host"))
    monkeypatch.setattr(Samples, "keep_few", lambda self: places.append("few"))
    images = create_dataset("synthetic_flowers", "test", img_size=(32, 32), species=2, test_per_species=1)
    settings = {
        "batch_size": 2,
        "shuffle": False,
        "drop_last": False,
        "num_workers": 0,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    transform = build_transform("none", (32, 32), train=False)
    if kept == "device" and not room:
        if asked == "device" and not once:
            with pytest.raises(DoesNotFitError):
                create_loader(images, transform, cache=asked, once=once, **settings)
            return
        kept = "" if once else "few"
    create_loader(images, transform, cache=asked, once=once, **settings)
    assert places == ([kept] if kept else [])
