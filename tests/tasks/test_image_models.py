"""The image models of other packages: the size of their images, as they state and take it."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Annotated

import pytest
import timm
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import nn

import vimtune
from vimtune.data import create_dataset
from vimtune.models import register_model
from vimtune.models.registry import MODELS
from vimtune.schema import STRICT
from vimtune.tasks.images import job


class Net(nn.Module):
    """A model that states its `pretrained_cfg` itself, so that timm's registry does not know it."""

    def __init__(self, num_classes=10, img_size=48):
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        self.pretrained_cfg = {"input_size": (3, 48, 40), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.in_proj, self.head = nn.Linear(3, 4), nn.Linear(4, num_classes)

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(self.in_proj(images.mean((2, 3))))


def sized_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
    return Net(**options)


@pytest.fixture
def register(monkeypatch):
    """Registers `sized_net` with an option `img_size` of some type, for the length of a test."""
    monkeypatch.setattr(MODELS, "_things", dict(MODELS._things))
    if not timm.is_model("sized_net"):
        timm.models.register_model(sized_net)

    def register(annotation, default=48):
        fields = [("num_classes", int, 10), ("img_size", annotation, default)]
        options = make_dataclass("SizedOptions", fields, kw_only=True)
        options.__pydantic_config__ = STRICT
        register_model("sized_net", summary="a net", options=options)

    return register


def recipe(**options):
    return vimtune.Recipe(model="sized_net", pretrained=False, peft="ft", targets="in_proj", **options)


def test_a_model_may_state_the_size_of_its_images_itself(register):
    register(int)
    assert job.image_size(recipe().backbone) == (48, 40)


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (int, 32, 32),
        (int, [32, 32], 32),
        (Annotated[int, Ge(1)], 32, 32),
        (int | None, 32, 32),
        (int | tuple[int, int], 32, (32, 32)),
        (tuple[int, int], 32, (32, 32)),
        (tuple[int, int], [32, 24], (32, 24)),
    ],
)
def test_the_size_is_passed_as_the_model_takes_it(register, annotation, given, expected):
    register(annotation)
    model = job.build_model(recipe(img_size=given), 3)
    assert model.img_size == expected and model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


class NormedNet(Net):
    """The same with batch normalisation, which has running statistics."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.fill_(0.3)

    def forward(self, images):
        return super().forward(self.norm(images))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("peft", ["full", "linear"])
def test_an_adapter_file_answers_as_the_run_did_with_running_statistics(
    register, monkeypatch, tmp_path, peft
):
    register(int)
    monkeypatch.setitem(globals(), "Net", NormedNet)
    kinds = {"species": 2, "train_per_species": 4, "val_per_species": 2, "test_per_species": 4}
    values = {"dataset_kwargs": kinds, "num_workers": 0, "epochs": 2, "lr": 0.05, "device": "cpu"}
    report = vimtune.train(
        vimtune.Recipe(
            model="sized_net", pretrained=False, peft=peft, output_dir=str(tmp_path / "run"), **values
        )
    )
    predictor = vimtune.load_predictor(tmp_path / "run", device="cpu")
    assert torch.equal(predictor.model.norm.running_mean, torch.full((3,), 0.3))
    test = create_dataset("synthetic_flowers", "test", img_size=(48, 40), **kinds)
    images = torch.stack([predictor.transform(test.load(index)) for index in range(len(test))])
    loss = F.cross_entropy(predictor.logits(images), torch.tensor(test.targets))
    assert loss.item() == pytest.approx(report.loss, rel=1e-5)


def test_a_size_that_the_model_cannot_take(register):
    register(int)
    with pytest.raises(ValueError, match=r"img_size.*integer.*32, 24"):
        job.build_model(recipe(img_size=[32, 24]), 3)
