"""`vimtune export`: what is written computes the same, says what it needs, and is not kept otherwise."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from adapter_files import SPECIES, make_adapter, rewrite

import vimtune
from vimtune import cli
from vimtune.commands.export import export_to_file
from vimtune.commands.merge import merge_to_file
from vimtune.commands.predict import load_predictor
from vimtune.export import formats
from vimtune.export.formats import About, ExportFormat
from vimtune.export.pt2_format import _compress_texts
from vimtune.tasks import TASKS
from vimtune.tasks.images import exporting

SMALL = {"model_kwargs": {"depth": 1}}
"""Options of a recipe with a model that is traced within a second."""
ADAPTERS = (
    "lora",
    "prodial",
    "affix",
    "additional_scan",
    "state_offset",
    "parallel_adapter",
    "prompt",
    "svp",
    "memba",
)
"""Methods of every kind: those that merge, fold into states, widen the model, or stay beside it."""


class Kept(ExportFormat):
    """A format that keeps the model as it is, in the place of those that trace it."""

    def __init__(self, change: float = 0.0) -> None:
        self.change = change
        self.about: list[About] = []
        self.models: list[torch.nn.Module] = []

    def write(self, model, image, about, path) -> None:
        path.write_text("kept")
        self.models.append(model)
        self.about.append(about)

    def open(self, path) -> Callable[[torch.Tensor], torch.Tensor]:
        assert path.read_text() == "kept"

        @torch.no_grad()
        def run(images: torch.Tensor) -> torch.Tensor:
            return self.models[-1](images) + self.change

        return run


@pytest.fixture
def kept(monkeypatch) -> Kept:
    format = Kept()
    monkeypatch.setattr(exporting, "format_of", lambda path: format)
    return format


def compare_with_predictor(run: Callable, source: Path) -> None:
    """What a file computes for batches of several sizes, and what its adapter does."""
    predictor = load_predictor(source, backend="torch")
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(run(images), predictor.logits(images), rtol=0, atol=1e-4)


def test_a_pt2_file_runs_on_torch_alone(tmp_path, capsys):
    make_adapter(tmp_path / "adapter.safetensors", **SMALL)
    output = tmp_path / "model.pt2"
    assert cli.main(["export", str(tmp_path), "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"maximum logit error \d\.\de-\d\d on 4 random images", printed)
    assert re.search(r"times the weights; \d+ ms for one image on this CPU, PyTorch \d+ ms", printed)
    with zipfile.ZipFile(output) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert not [name for name, own in contents.items() if str(Path(cli.__file__).parent).encode() in own]
    assert output.stat().st_size < 0.5 * sum(
        map(len, contents.values())
    )  # The graph of a tiny model is text.

    texts = dict.fromkeys(("task", "model", "options", "classes", "preprocessing"), "")
    program = torch.export.load(output, extra_files=texts)
    assert not [node.target for node in program.graph.nodes if "vimtune" in str(node.target)]
    compare_with_predictor(torch.no_grad()(program.module()), tmp_path)
    assert texts["task"] == "classification" and texts["model"] == "test_vim"
    assert json.loads(texts["classes"]) == [f"species {index}" for index in range(SPECIES)]
    assert json.loads(texts["options"])["depth"] == 1
    assert json.loads(texts["preprocessing"])["crop_mode"] == "squash"


def test_adapters_are_merged_first(tmp_path, kept, capsys):
    make_adapter(tmp_path / "adapter.safetensors", peft="dora", **SMALL)
    exported = export_to_file(tmp_path, tmp_path / "model.pt2")
    assert exported.left_beside is None and exported.max_error == 0
    plain = timm.create_model("test_vim", num_classes=SPECIES, depth=1)
    assert kept.models[0].state_dict().keys() == plain.state_dict().keys()

    merge_to_file(tmp_path, tmp_path / "merged.safetensors")
    export_to_file(tmp_path / "merged.safetensors", tmp_path / "again.pt2")
    assert kept.about[1] == kept.about[0]


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_file_that_names_its_model_keeps_what_it_says(tmp_path, kept, capsys, kind):
    """Taken for a plain checkpoint it would lose its classes, and its size of images."""
    make_adapter(tmp_path / "adapter.safetensors", img_size=48, **SMALL)
    merge_to_file(tmp_path, tmp_path / "merged.safetensors")
    command = ["export", str(tmp_path / f"{kind}.safetensors"), "-o", str(tmp_path / "model.pt2")]
    assert cli.main([*command, "--model", "test_vim"]) == 0
    assert kept.about[0].classes == [f"species {index}" for index in range(SPECIES)]
    assert kept.about[0].preprocessing["img_size"] == [48, 48]
    assert cli.main([*command, "--model", "vim_nano_patch8_64"]) == 2
    message = r"holds a test_vim, and --model is 'vim_nano_patch8_64': leave --model out"
    assert re.search(message, capsys.readouterr().err)


def test_a_file_says_how_logits_become_probabilities(tmp_path, kept):
    make_adapter(tmp_path / "adapter.safetensors", **SMALL)
    rewrite(tmp_path / "adapter.safetensors", lambda info: info["extra"]["recipe"].update(task="multilabel"))
    merge_to_file(tmp_path, tmp_path / "merged.safetensors")
    for source in (tmp_path, tmp_path / "merged.safetensors"):
        export_to_file(source, tmp_path / "model.pt2")
        (tmp_path / "model.pt2").unlink()
    assert [about.metadata()["task"] for about in kept.about] == ["multilabel", "multilabel"]


def test_an_adapter_that_no_weights_express_becomes_part_of_the_graph(tmp_path, kept, capsys):
    make_adapter(tmp_path / "adapter.safetensors", peft="parallel_adapter", **SMALL)
    assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / "model.pt2")]) == 0
    assert "the adapter is part of the graph: " in capsys.readouterr().out
    assert vimtune.list_adapters(kept.models[0]) == ["default"]


def test_a_plain_checkpoint_needs_the_name_of_its_model(tmp_path, kept, capsys):
    plain = timm.create_model("test_vim", num_classes=7)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    command = ["export", str(tmp_path / "plain.pth"), "-o", str(tmp_path / "model.pt2")]
    assert cli.main(command) == 2
    assert "--model" in capsys.readouterr().err
    assert cli.main([*command, "--model", "test_vim", "--checkpoint", "x.pth"]) == 2
    assert "drop --checkpoint" in capsys.readouterr().err
    assert cli.main([*command, "--model", "test_vim"]) == 0
    assert kept.about[0].classes == [str(index) for index in range(7)]
    assert kept.about[0].options["num_classes"] == 7

    torch.save({name: value for name, value in plain.state_dict().items() if "head" not in name}, command[1])
    assert cli.main([*command, "--model", "test_vim"]) == 2
    assert "without a head" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, kept, capsys):
    make_adapter(tmp_path / "adapter.safetensors", **SMALL)
    (tmp_path / "model.pt2").write_text("an earlier one")
    for change, shown in ((1e-2, "1.0e-02"), (float("nan"), "inf")):
        kept.change = change
        assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / "model.pt2")]) == 2
        assert f"maximum logit error {shown}" in capsys.readouterr().err
    assert (tmp_path / "model.pt2").read_text() == "an earlier one"
    assert len(list(tmp_path.iterdir())) == 3  # adapter, recipe, and the earlier file


def test_names_say_the_format(tmp_path, capsys):
    make_adapter(tmp_path / "adapter.safetensors", **SMALL)
    for name in ("model.tflite", "model"):
        assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / name)]) == 2
        assert "expected a name ending in .onnx or .pt2" in capsys.readouterr().err


def test_a_missing_package_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    make_adapter(tmp_path / "adapter.safetensors", **SMALL)
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / "model.onnx")]) == 2
    error = capsys.readouterr().err
    assert "needs onnx, onnxscript, onnxruntime: pip install 'vimtune[export]'" in error


def test_language_models_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"states from token to token.*merge"):
        TASKS.get("boolq")().export(Path("adapter.safetensors"), Path("model.onnx"), {}, False)


class Masked(torch.nn.Module):
    """Multiplies parameters by a mask, as SVP does, and says by one of its own where inputs are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(5, device=images.device) != 2
        return (images.mean((1, 2)) * (mask * self.scale)) + (images[:, 0, 0] > 0) * self.scale


def test_parameters_meet_other_dtypes_in_onnx(tmp_path):
    """Old versions of torch stop here where autograd is on."""
    pytest.importorskip("onnxruntime")
    model, images, path = Masked().eval(), torch.randn(3, 2, 4, 5), tmp_path / "model.onnx"
    format = formats.format_of(path)
    format.write(model, (2, 4, 5), About("classification", "masked", {}, [], {}), path)
    with torch.no_grad():
        torch.testing.assert_close(format.open(path)(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("peft", ADAPTERS)
def test_models_with_adapters_of_every_kind(tmp_path, peft, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    make_adapter(tmp_path / "adapter.safetensors", peft=peft, **SMALL)
    output = tmp_path / f"model{suffix}"
    export_to_file(tmp_path, output)
    compare_with_predictor(formats.format_of(output).open(output), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"stride": 4}, {"img_size": [24, 40]}, {"global_pool": "avg"}, {"initial_state": True}]
)
def test_models_of_other_shapes_as_onnx(tmp_path, options):
    pytest.importorskip("onnxruntime")
    model = timm.create_model("test_vim", depth=1, **options).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(3, *size)
    with torch.no_grad():
        expected = model(images)
    format = formats.format_of(tmp_path / "model.onnx")
    format.write(model, size, About("classification", "test_vim", {}, [], {}), tmp_path / "model.onnx")
    found = format.open(tmp_path / "model.onnx")(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_pt2_file_has_nothing_of_the_time_at_which_it_was_written():
    """Every export had the time of its copy in it, where torch writes none."""
    saved, copied = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(saved, "w") as archive:
        for name in ("archive/models/model.json", "archive/data/weights/weight_0"):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), 100 * "text")
    _compress_texts(saved, copied)
    with zipfile.ZipFile(copied) as archive:
        entries = [(entry.compress_type, entry.date_time) for entry in archive.infolist()]
    assert entries == [(kind, (1980, 1, 1, 0, 0, 0)) for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "suffix"),
    [("vim_tiny_patch16_224", ".onnx"), ("vim_tiny_patch16_224", ".pt2"), ("vim_nano_patch8_64", ".pt2")],
)
def test_the_file_of_a_published_size_is_hardly_larger_than_its_weights(tmp_path, model, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    torch.save(timm.create_model(model).state_dict(), tmp_path / "vim.pth")
    exported = export_to_file(tmp_path / "vim.pth", tmp_path / f"vim{suffix}", model=model)
    assert exported.size < 1.05 * exported.weights
