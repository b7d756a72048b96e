"""Images as vectors: files of them, neighbours, and the command `embed`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from adapter_files import make_adapter, write_photos
from safetensors.torch import save_file

from vimtune import cli
from vimtune.commands.predict import load_predictor
from vimtune.tasks.answers import Neighbours, to_csv
from vimtune.tasks.images.embeddings import Embeddings, EmbeddingsError, read_embeddings


def drawn(count: int, seed: int = 0, digest: str = "model") -> Embeddings:
    vectors = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return Embeddings([f"{seed}/{index}.png" for index in range(count)], vectors, digest)


def test_neighbours_are_those_of_the_largest_cosines(monkeypatch) -> None:
    known, asked = drawn(40), drawn(9, seed=1)
    monkeypatch.setattr(
        "vimtune.tasks.images.embeddings.AT_ONCE", 100
    )  # They are computed a few queries at a time.
    indices, cosines = known.nearest(asked, 3)
    for row, vector in enumerate(asked.vectors):
        own = [float(vector @ other / np.sqrt(vector @ vector * (other @ other))) for other in known.vectors]
        expected = sorted(range(40), key=lambda index: -own[index])[:3]
        assert indices[row].tolist() == expected
        assert cosines[row].tolist() == pytest.approx([own[index] for index in expected], abs=1e-6)


def test_an_image_is_not_its_own_neighbour_and_there_may_be_few() -> None:
    known = drawn(3)
    indices, cosines = known.nearest(known, 5)
    assert indices.shape == (3, 3) and all(row not in found[:2] for row, found in enumerate(indices.tolist()))
    assert (indices[:, 2] == -1).all() and np.isnan(cosines[:, 2]).all()
    with pytest.raises(EmbeddingsError, match="another model"):
        known.nearest(drawn(2, digest="other"), 1)


def test_similarities_below_zero_are_numbers_in_a_table() -> None:
    text = to_csv([Neighbours("a.png", ["b.png", "c.png"], [0.25, -0.5])], Neighbours)
    assert text == "path,path1,cosine1,path2,cosine2\na.png,b.png,0.25,c.png,-0.5\n"


def test_a_file_gives_back_what_was_written_and_others_are_refused(tmp_path) -> None:
    written = Embeddings(["a\n\r.png", "ünï/\udcff.jpg"], drawn(2).vectors, "model")
    written.save(tmp_path / "x.npz")
    read = read_embeddings(tmp_path / "x.npz")
    assert read.names == written.names and read.digest == "model"
    assert np.array_equal(read.vectors, written.vectors)
    written.save(tmp_path / "x.csv")
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 3 and np.allclose(np.array(rows[1][1:], float), written.vectors[0], rtol=1e-5)
    assert [row[0] for row in rows[1:]] == ["a\n\r.png", "ünï/\\udcff.jpg"]

    np.savez_compressed(tmp_path / "bomb.npz", vectors=written.vectors)
    np.savez(tmp_path / "objects.npz", vectors=np.array([{}], object), paths=np.array([b"x"]), digest="m")
    np.savez(tmp_path / "shape.npz", vectors=written.vectors, paths=np.array([b"x"]), digest=np.array("m"))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("bomb.npz", "objects.npz", "shape.npz", "text.npz", "none.npz", "x.csv"):
        with pytest.raises(EmbeddingsError, match=name) as error:
            read_embeddings(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, Path]:
    """An adapter, and a folder with some photos."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "images")
    make_adapter(folder / "adapter.safetensors")
    return folder / "adapter.safetensors", folder / "images"


def test_embeddings_are_what_the_head_of_the_model_works_on(photos) -> None:
    adapter, images = photos
    predictor = load_predictor(adapter, device="cpu", backend="torch")
    found = predictor.embed(images, batch_size=2)
    assert len(found) == 3 and found.names == sorted(found.names)
    logits = predictor.model.get_classifier()(torch.from_numpy(found.vectors)).softmax(1).max(1).values
    best = [answer.probabilities[0] for answer in predictor.predict(images)]
    assert logits.tolist() == pytest.approx(best, abs=1e-5)


def test_vectors_of_other_base_weights_are_not_compared(photos, tmp_path, capsys) -> None:
    adapter, images = photos
    base = tmp_path / "base.safetensors"
    torch.manual_seed(5)
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), base)
    made = ["--adapter", str(adapter), "--device", "cpu", "--backend", "torch"]
    others = [*made, "--checkpoint", str(base), "--force"]
    for name, flags in {"own": made, "forced": [*made, "--force"], "other": others}.items():
        assert cli.main(["embed", str(images), *flags, "-o", str(tmp_path / f"{name}.npz")]) == 0
    own, forced, other = (read_embeddings(tmp_path / f"{name}.npz") for name in ("own", "forced", "other"))
    assert own.digest == forced.digest != other.digest
    assert cli.main(["embed", str(images), *others, "--among", str(tmp_path / "other.npz")]) == 0
    capsys.readouterr()
    assert cli.main(["embed", str(images), *others, "--among", str(tmp_path / "own.npz")]) == 2
    assert "made by another model" in capsys.readouterr().err


def test_the_command_writes_vectors_and_finds_neighbours(photos, tmp_path, capsys) -> None:
    adapter, images = photos
    common = ["--adapter", str(adapter), "--device", "cpu", "--backend", "torch"]
    assert cli.main(["embed", str(images), *common, "-o", str(tmp_path / "x.npz")]) == 0
    queries = ["embed", str(images), *common, "--among", str(tmp_path / "x.npz"), "--top-k", "2"]
    assert cli.main([*queries, "-o", str(tmp_path / "n.json")]) == 0
    found = json.loads((tmp_path / "n.json").read_text())
    assert [len(each["neighbours"]) for each in found] == [2] * 3
    assert all(each["path"] not in [one["path"] for one in each["neighbours"]] for each in found)
    capsys.readouterr()
    for flags, told in (
        ([str(images), *common], "--among"),
        ([str(images), "-o", str(tmp_path / "x.npz")], "--adapter"),
        ([str(images), *common, "-o", str(tmp_path / "x.txt")], ".npz"),
        ([*queries[1:-1], "0"], "--top-k"),
    ):
        assert cli.main(["embed", *flags]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
