"""The published weights: files, cards and names, and what is said of weights that do not suit the data."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import vimtune
from vimtune.data import create_dataset, dataset_class
from vimtune.download import digest_of
from vimtune.models import MODELS, fetching, weights
from vimtune.models.checkpoint import CheckpointError
from vimtune.models.fetching import ADDRESS, file_of
from vimtune.models.weights import REPOSITORY, WEIGHTS, Weights, weights_of
from vimtune.recipe import Recipe
from vimtune.tasks.images import job

LIMITS = {True: 3_000_000, False: 14_000_000}
"""Largest file in the package, and beside it in the repository, in bytes."""

IN_PACKAGE = Path(weights.__file__).parent / "weights"

every_weights = pytest.mark.parametrize("published", WEIGHTS, ids=lambda published: published.name)


@every_weights
def test_the_file_is_the_one_that_was_published(published: Weights) -> None:
    assert hashlib.sha256(published.path.read_bytes()).hexdigest() == published.sha256
    assert published.path.stat().st_size <= LIMITS[published.packaged]
    with safe_open(published.path, "pt") as file:
        assert file.get_tensor("head.weight").shape[0] == published.num_classes
        classes = json.loads((file.metadata() or {}).get("classes", "null"))
    assert classes is None or len(classes) == published.num_classes


@every_weights
def test_it_has_a_card_with_data_recipe_and_licence(published: Weights) -> None:
    text = published.card.read_text(encoding="utf-8")
    assert text.startswith(f"# {published.name}\n") and published.sha256 in text
    for title in ("Data", "Recipe", "Scores", "Licence", "Not for"):
        assert f"\n## {title}\n" in text


def test_every_card_belongs_to_weights() -> None:
    assert {path.name for path in REPOSITORY.glob("*.md")} == {each.card.name for each in WEIGHTS}


@every_weights
def test_it_is_a_model_of_this_name(published: Weights) -> None:
    assert published.name in MODELS and MODELS.get(published.name).architecture == published.model
    model = timm.create_model(published.name, pretrained=True)
    assert model.num_classes == published.num_classes and model.creation["name"] == published.name
    assert weights_of(published.name) is published


def test_a_file_is_hashed_once_until_it_changes(elsewhere: Weights, monkeypatch) -> None:
    """`vimtune evaluate --model NAME` asks for it twice: for its names of classes, and to load it."""
    content, hashed = (IN_PACKAGE / elsewhere.path.name).read_bytes(), []
    elsewhere.path.parent.mkdir()
    elsewhere.path.write_bytes(content)

    def hashing(path: Path, algorithm: str) -> str:
        hashed.append(path)
        return digest_of(path, algorithm)

    monkeypatch.setattr(fetching, "digest_of", hashing)
    assert file_of(elsewhere) == elsewhere.path
    timm.create_model(elsewhere.name, pretrained=True)
    assert hashed == [elsewhere.path]
    elsewhere.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has SHA-256"):
        file_of(elsewhere)


def test_the_plain_name_means_the_first_weights() -> None:
    for model in {published.model for published in WEIGHTS}:
        first = next(published for published in WEIGHTS if published.model == model)
        assert weights_of(model) is first
        assert timm.get_pretrained_cfg(model).tag == first.tag
    assert weights_of("vim_tiny_patch16_224") is None and weights_of("vim_nano_patch8_64.other") is None


def test_an_adapter_remembers_the_tag_of_its_base(tmp_path: Path) -> None:
    name = WEIGHTS[0].name
    model = timm.create_model(name, pretrained=True, num_classes=3, peft="bitfit")
    vimtune.save_adapter(model, tmp_path / "a.safetensors", classes=["a", "b", "c"])
    assert vimtune.read_adapter_info(tmp_path / "a.safetensors").model["name"] == name
    again = timm.create_model(WEIGHTS[0].model, pretrained=True, num_classes=3)
    vimtune.load_adapter(again, tmp_path / "a.safetensors")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), again.eval()(images))


@pytest.fixture
def serve_folder() -> Iterator[Callable[[Path], str]]:
    """Serves the files of a folder on this machine, and gives their address."""
    servers = []

    def serve(folder: Path) -> str:
        handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def elsewhere(monkeypatch, tmp_path: Path) -> Weights:
    """Weights whose file is not beside the package; torch.hub keeps its own in a new folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.setattr(weights, "_PACKAGE", tmp_path / "nowhere")
    return WEIGHTS[0]


def test_a_file_that_is_not_there_is_one_clear_message(elsewhere: Weights) -> None:
    with pytest.raises(CheckpointError, match=f"are not at .*weights/ of the repository.*{ADDRESS}"):
        timm.create_model(elsewhere.name, pretrained=True)
    timm.create_model(elsewhere.name, pretrained=False)


def test_a_file_that_is_not_there_is_downloaded_once(elsewhere: Weights, monkeypatch, serve_folder) -> None:
    monkeypatch.setenv(ADDRESS, f"{serve_folder(IN_PACKAGE)}/")
    first = timm.create_model(elsewhere.name, pretrained=True)
    monkeypatch.setenv(ADDRESS, "http://127.0.0.1:9/")  # where nobody answers, and nobody is asked
    again = timm.create_model(elsewhere.name, pretrained=True)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    kept = file_of(elsewhere)
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*delete it"):
        timm.create_model(elsewhere.name, pretrained=True)


def test_another_file_at_the_address_is_not_kept(
    elsewhere: Weights, monkeypatch, serve_folder, tmp_path
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / elsewhere.path.name).write_bytes(b"something else")
    monkeypatch.setenv(ADDRESS, serve_folder(tmp_path / "served"))
    with pytest.raises(CheckpointError, match=rf"are not at .* has SHA256 .*, expected {elsewhere.sha256}"):
        timm.create_model(elsewhere.name, pretrained=True)
    assert not list((tmp_path / "torch").rglob("*.safetensors*"))
    monkeypatch.setenv(ADDRESS, serve_folder(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot download .*404"):
        timm.create_model(elsewhere.name, pretrained=True)
    monkeypatch.setenv(ADDRESS, "http://no host/")
    with pytest.raises(
        CheckpointError, match=rf"cannot download http://no host/.*correct .* {ADDRESS}, give a file"
    ):
        timm.create_model(elsewhere.name, pretrained=True)
    assert not (tmp_path / "torch").exists()


@pytest.fixture
def broken_server(monkeypatch) -> Iterator[tuple[str, list[str | None]]]:
    """Its address, and the parts that it is asked for. The first connection breaks in the middle of a file,
    the second does so without having said a length, the third falls silent, and the others are good."""
    content = (IN_PACKAGE / WEIGHTS[0].path.name).read_bytes()
    asked: list[str | None] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            part = self.headers.get("Range")
            asked.append(part)
            rest = content[int(part[6:-1]) if part else 0 :]
            self.send_response(206 if part else 200)
            if len(asked) == 2:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"fffff\r\n" + rest[:1000])
            else:
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[:1000] if len(asked) in (1, 3) else rest)
            if len(asked) == 3:
                self.wfile.flush()
                ended.wait(20)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    ended.set()
    server.shutdown()
    server.server_close()


def test_a_connection_that_breaks_or_falls_silent_is_tried_again_for_the_rest(
    elsewhere: Weights, monkeypatch, broken_server: tuple[str, list[str | None]]
) -> None:
    address, asked = broken_server
    monkeypatch.setenv(ADDRESS, address)
    quick = partial(fetching.download_file, timeout=0.3, pause=0.01)
    monkeypatch.setattr(fetching, "download_file", quick)
    with pytest.raises(CheckpointError, match=r"cannot download .*timed out.*bytes are kept"):
        timm.create_model(elsewhere.name, pretrained=True)
    timm.create_model(elsewhere.name, pretrained=True)
    assert asked[0] is None and all(part and part != "bytes=0-" for part in asked[1:]) and len(asked) == 4


def test_processes_that_start_together_download_once(
    elsewhere: Weights, monkeypatch, broken_server: tuple[str, list[str | None]]
) -> None:
    address, asked = broken_server
    asked += [None] * 3  # what is good comes after them
    monkeypatch.setenv(ADDRESS, address)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(file_of, [elsewhere] * 2)
    assert first == second and len(asked) == 4


def test_a_folder_of_torch_hub_that_cannot_be_written_is_one_message(
    elsewhere: Weights, monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    monkeypatch.setenv(ADDRESS, "http://127.0.0.1:9/")
    with pytest.raises(CheckpointError, match=r"cannot write to .*TORCH_HOME name another folder"):
        timm.create_model(elsewhere.name, pretrained=True)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_file_beside_the_package_is_one_message(
    elsewhere: Weights, content: bytes | None, tmp_path: Path
) -> None:
    whole = (IN_PACKAGE / elsewhere.path.name).read_bytes()
    elsewhere.path.parent.mkdir()
    elsewhere.path.write_bytes(whole[:-1] if content is None else content)
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*expected .*from the repository"):
        timm.create_model(elsewhere.name, pretrained=True)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 cut"])
def test_a_damaged_file_that_the_caller_names_is_one_message(
    name: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pretrained weights of .* is damaged"):
        timm.create_model(WEIGHTS[0].name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


@pytest.mark.parametrize("address", ["file:///etc", "/weights", "ftp://host/weights"])
def test_an_address_is_one_of_the_web(elsewhere: Weights, monkeypatch, address: str) -> None:
    monkeypatch.setenv(ADDRESS, address)
    with pytest.raises(CheckpointError, match=r"expected an address that begins with https"):
        timm.create_model(elsewhere.name, pretrained=True)


def test_a_file_that_the_caller_names_is_taken(elsewhere: Weights) -> None:
    path = IN_PACKAGE / elsewhere.path.name
    timm.create_model(elsewhere.name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def test_recipes_begin_with_weights_of_photographs_where_some_come_with_the_package() -> None:
    begins = weights_of(Recipe().backbone.model)
    assert begins is not None and begins.packaged
    packaged = {each.trained_on for each in WEIGHTS if each.packaged}
    assert begins.trained_on == "photographs" or "photographs" not in packaged


def mentions(caplog: pytest.LogCaptureFixture, kind: str, **changes: object) -> list[str]:
    """What is said before a run on images of a kind begins."""
    caplog.clear()
    dataset = create_dataset("synthetic_flowers", "train")
    dataset.kind = kind
    job._mention_other_kind(Recipe(**{"model": WEIGHTS[0].name, **changes}).backbone, dataset)
    return [record.message for record in caplog.records]


def test_weights_of_another_kind_of_images_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    (said,) = mentions(caplog, "photographs")
    assert "have seen generated drawings, and these images are photographs" in said
    assert not mentions(caplog, "generated drawings")
    assert not mentions(caplog, "photographs", pretrained=False)
    assert not mentions(caplog, "photographs", checkpoint="file.pth")
    assert not mentions(caplog, "photographs", model="vim_tiny_patch16_224")
    assert dataset_class("folder").kind == "photographs"


def test_other_weights_of_the_model_are_named_where_they_suit(caplog, monkeypatch) -> None:
    other = Weights("vim_nano_patch8_64", "photos", "photos", "photographs", 10, "", packaged=True)
    monkeypatch.setattr(job, "WEIGHTS", (WEIGHTS[0], other))
    (said,) = mentions(caplog, "photographs")
    assert said.endswith("use --model vim_nano_patch8_64.photos")
    monkeypatch.setattr(job, "weights_of", lambda name: other)
    assert not mentions(caplog, "generated drawings")  # for which photographs are a start
