"""Downloads and archives: what is fetched, checked, resumed and refused."""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import re
import socket
import ssl
import tarfile
import threading
import urllib.error
import zipfile
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from vimtune.data import DatasetError, caltech_split, create_dataset, flowers
from vimtune.data.files.archives import extract_archive
from vimtune.download import DownloadError, download_file, download_lock

CONTENT = np.random.default_rng(0).bytes(1_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server:
    """Serves CONTENT; can cut connections and ignore ranges."""

    def __init__(self) -> None:
        self.cut_after: list[int] = []  # bytes to send before cutting, one per request
        self.ranges = True
        self.requests: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.requests.append(wanted)
                if self.path != "/file.bin":
                    self.send_error(404)
                    return
                start = int(wanted.split("=")[1].rstrip("-")) if wanted and outer.ranges else 0
                if start >= len(CONTENT):
                    self.send_error(416)
                    return
                body = CONTENT[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.cut_after.pop(0)] if outer.cut_after else body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_downloads_and_keeps_a_verified_file(server: Server, tmp_path) -> None:
    path = download_file(server.url, tmp_path / "deep" / "file.bin", MD5)
    assert path.read_bytes() == CONTENT
    download_file(server.url, path, MD5)
    assert len(server.requests) == 1


def test_resumes_after_cut_connections(server: Server, tmp_path) -> None:
    server.cut_after = [300_000, 200_000]
    path = download_file(server.url, tmp_path / "file.bin", MD5, pause=0.01)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=500000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_a_later_call_resumes_what_an_earlier_one_kept(server: Server, tmp_path) -> None:
    server.cut_after = [400_000]
    with pytest.raises(DownloadError, match="400000 bytes are kept"):
        download_file(server.url, tmp_path / "file.bin", MD5, attempts=1)
    assert not (tmp_path / "file.bin").exists()
    download_file(server.url, tmp_path / "file.bin", MD5)
    assert server.requests[1] == "bytes=400000-"


def test_a_server_without_ranges_starts_over(server: Server, tmp_path) -> None:
    server.ranges = False
    server.cut_after = [400_000]
    path = download_file(server.url, tmp_path / "file.bin", MD5, pause=0.01)
    assert path.read_bytes() == CONTENT


def test_wrong_checksum_keeps_nothing(server: Server, tmp_path) -> None:
    with pytest.raises(DownloadError, match=f"MD5 {MD5}, expected 0000"):
        download_file(server.url, tmp_path / "file.bin", "0000")
    assert not list(tmp_path.iterdir())


def test_a_damaged_part_is_detected(server: Server, tmp_path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="MD5"):
        download_file(server.url, tmp_path / "file.bin", MD5)
    assert download_file(server.url, tmp_path / "file.bin", MD5).read_bytes() == CONTENT


def test_a_complete_part_needs_no_bytes(server: Server, tmp_path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download_file(server.url, tmp_path / "file.bin", MD5).read_bytes() == CONTENT


def test_missing_on_server_is_not_retried(server: Server, tmp_path) -> None:
    with pytest.raises(DownloadError, match="404"):
        download_file(server.url + "x", tmp_path / "file.bin", MD5, pause=5)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "cause",
    [
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ssl.SSLCertVerificationError(1, "certificate has expired"),
    ],
    ids=lambda cause: str(cause),
)
def test_without_a_connection_nothing_is_waited_for(cause: OSError, tmp_path, monkeypatch, caplog) -> None:
    asked = failing_with(monkeypatch, urllib.error.URLError(cause))
    monkeypatch.setattr("vimtune.download.time.sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(DownloadError, match=r"no connection \(.*\)") as caught:
        download_file("http://nowhere/file", tmp_path / "file.bin", MD5)
    helps = str(caught.value).endswith("; without a network, fetch it on another machine.")
    assert helps != isinstance(cause, ssl.SSLError)  # Where a network answers, it is there.
    assert len(asked) == 1 and not caplog.records


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.URLError(TimeoutError("timed out")), "no connection (timed out)"),
        (urllib.error.URLError(ConnectionResetError(errno.ECONNRESET, "reset by peer")), "reset by peer"),
        (http.client.RemoteDisconnected("closed without response"), "closed without response"),
        (urllib.error.HTTPError("", 503, "Busy", Message(), None), "the server answered 503 Busy"),
        (urllib.error.HTTPError("", 429, "Slowly", Message(), None), "the server answered 429 Slowly"),
        (urllib.error.URLError(ssl.SSLEOFError(8, "broken\r\noff")), "no connection (broken off)"),
    ],
    ids=["reading", "connecting", "reset", "closed", "busy", "too many", "handshake"],
)
def test_a_slow_server_is_asked_again_which_is_said(
    error: Exception, reason: str, tmp_path, monkeypatch, caplog
) -> None:
    asked, waits = failing_with(monkeypatch, error), []
    monkeypatch.setattr("vimtune.download.time.sleep", waits.append)
    with pytest.raises(DownloadError, match=re.escape(reason)):
        download_file("http://slow/file", tmp_path / "file.bin", MD5)
    assert len(asked) == 3 and waits == [1, 2]
    for record, wait in zip(caplog.records, waits, strict=True):
        assert reason in record.message and record.message.endswith(f"trying again in {wait:g} s")


def failing_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[object]:
    """Let every request end with an error; the list gets the requests."""
    asked: list[object] = []

    def fail(request: object, timeout: float) -> None:
        asked.append(request)
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    return asked


def test_a_part_without_a_byte_is_not_kept(server: Server, tmp_path) -> None:
    server.cut_after = [0]
    with pytest.raises(DownloadError, match=r"after 0 of 1000000 bytes\.$"):
        download_file(server.url, tmp_path / "file.bin", MD5, attempts=1)
    assert not list(tmp_path.iterdir())


def test_offline_dataset_gives_one_message(server: Server, tmp_path, monkeypatch) -> None:
    server.http.shutdown()
    server.http.server_close()
    monkeypatch.setattr(flowers, "_URL", server.url.replace("file.bin", ""))
    monkeypatch.setattr("vimtune.download.time.sleep", lambda seconds: pytest.fail("it waits"))
    expected = (
        r"no connection \(Connection refused\); .*another machine\. Expected <data-dir>.*synthetic_flowers"
    )
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(DatasetError, match=expected):
            create_dataset("flowers", "train", folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("folder", ["a file/data", "/proc/data"])
def test_a_folder_that_cannot_be_made_is_one_message(folder: str, tmp_path) -> None:
    (tmp_path / "a file").touch()
    expected = pytest.raises(DownloadError, match=r"cannot write to .*data: .*\. Choose another")
    with expected, download_lock(tmp_path / folder):
        pytest.fail("there is no such folder")


def test_extract_moves_one_entry_and_leaves_no_rest(tmp_path) -> None:
    (tmp_path / "src" / "jpg").mkdir(parents=True)
    (tmp_path / "src" / "jpg" / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as bundle:
        bundle.add(tmp_path / "src" / "jpg", "inner/jpg")
    target = extract_archive(tmp_path / "x.tgz", tmp_path / "out", "jpg")
    assert (target / "a.txt").read_text() == "a"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["jpg"]
    with pytest.raises(DownloadError, match="no entry 'png'"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out2", "png")


def archive_of(path: Path, name: str, kind: str) -> Path:
    """An archive with jpg/a.txt and one entry more."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr("jpg/a.txt", "a")
            bundle.writestr(name, "evil")
        return path
    with tarfile.open(path, "w:gz") as bundle:
        for entry, entry_kind in (("jpg/a.txt", "file"), (name, kind)):
            info = tarfile.TarInfo(entry)
            if entry_kind == "file":
                info.size = 4
                bundle.addfile(info, io.BytesIO(b"evil"))
                continue
            info.type = {"symlink": tarfile.SYMTYPE, "link": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}.get(
                entry_kind, tarfile.CHRTYPE
            )
            info.linkname = "../../outside" if entry_kind == "symlink" else "jpg/a.txt"
            bundle.addfile(info)
    return path


@pytest.mark.parametrize(
    ("suffix", "name", "kind"),
    [
        *(
            (suffix, name, "file")
            for suffix in (".tgz", ".zip")
            for name in ("../outside", "jpg/../../../outside")
        ),
        *((suffix, "/tmp/vimtune-outside", "file") for suffix in (".tgz", ".zip")),
        *((".tgz", "jpg/b.txt", kind) for kind in ("symlink", "link", "fifo", "device")),
    ],
)
def test_entries_that_lead_outside_or_are_no_files_are_refused(
    suffix: str, name: str, kind: str, tmp_path
) -> None:
    archive = archive_of(tmp_path / f"x{suffix}", name, kind)
    folder = tmp_path / "deep" / "er" / "out"
    with pytest.raises(DownloadError, match=r"damaged or not the expected archive .*delete it"):
        extract_archive(archive, folder, "jpg")
    files = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert files == [archive] and not Path("/tmp/vimtune-outside").exists()


@pytest.mark.parametrize("suffix", [".tgz", ".zip"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "changed"])
def test_damaged_archives_are_one_line(suffix: str, damage: str, tmp_path) -> None:
    archive = archive_of(tmp_path / f"x{suffix}", "jpg/" + "b" * 90, "file")
    whole = archive.read_bytes()
    changed = bytearray(whole)
    changed[whole.index(b"evil") if suffix == ".zip" else len(whole) // 2] ^= 255
    content = {"empty": b"", "text": b"hello" * 200, "cut": whole[: len(whole) // 2], "changed": changed}
    archive.write_bytes(content[damage])
    with pytest.raises(DownloadError, match="delete it and download again") as error:
        extract_archive(archive, tmp_path / "out", "jpg")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_caltech_comes_as_an_archive_within_another(tmp_path, monkeypatch) -> None:
    categories = {
        "ant": caltech_split.Category(3, [1], [2]),
        "water_lilly": caltech_split.Category(3, [2], [3]),
    }
    names = [
        f"101_ObjectCategories/{name}/image_000{number}.jpg" for name in categories for number in (1, 2, 3)
    ]
    inner, asked = io.BytesIO(), []
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))

    def download(url: str, path: Path, md5: str) -> Path:
        asked.append((url, md5))
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.getvalue())
        return path

    monkeypatch.setattr("vimtune.download.download_file", download)
    monkeypatch.setattr(caltech_split, "load_split", lambda: caltech_split.Split(0, categories))
    for _ in range(2):  # What is there already is not asked for again.
        dataset = create_dataset("caltech", "train+val", tmp_path)
        assert dataset.classes == ["ant", "water lily"] and dataset.targets == [0, 0, 1, 1]
    assert len(asked) == 1 and asked[0][0].endswith("caltech-101.zip") and len(asked[0][1]) == 32
    assert [path.name for path in (tmp_path / "caltech101").iterdir()] == ["101_ObjectCategories"]

    def fail(url: str, path: Path, md5: str) -> Path:
        raise DownloadError("no connection (offline).")

    monkeypatch.setattr("vimtune.download.download_file", fail)
    with pytest.raises(
        DatasetError, match=r"and: no connection .* Expected <data-dir>/caltech101/101_Object"
    ):
        create_dataset("caltech", "train", tmp_path / "elsewhere")
