"""Which folders and files are trusted with a library, whose loading runs its code."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from vimtune.ops.cpu import build, cache
from vimtune.ops.cpu.cache import Untrusted, private_folder, read_private, usable_folders

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners on this system")
SOMEBODY = 54321


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder; the variables that name caches are not set."""
    for name in ("VIMTUNE_CACHE", "XDG_CACHE_HOME", "VIMTUNE_NO_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return folder


@pytest.fixture
def other(monkeypatch):
    """Somebody else, to whom files can be given."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    return lambda path: os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)


@pytest.fixture
def no_group_of_one(monkeypatch):
    monkeypatch.setattr(cache, "_is_group_of_one", lambda group: False)


def private_temporary(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"vimtune-{os.geteuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_made_for_us_alone_whatever_the_umask_says(home, tmp_path):
    before = os.umask(0)
    try:
        folders = usable_folders()
    finally:
        os.umask(before)
    assert folders == [home / ".cache" / "vimtune", private_temporary(tmp_path)]
    assert [mode(folder) for folder in (home / ".cache", *folders)] == [0o700] * 3
    assert usable_folders() == folders


def test_variables_name_the_folder(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert usable_folders()[0] == tmp_path / "xdg" / "vimtune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert usable_folders()[0] == home / ".cache" / "vimtune"
    monkeypatch.setenv("VIMTUNE_CACHE", "~/own")
    assert usable_folders()[0] == home / "own"


@pytest.mark.parametrize("open_part", ["shared", "shared/cache"])
@pytest.mark.parametrize("rights", [0o777, 0o757, 0o775])
def test_a_folder_that_others_can_write_to_is_refused(
    home, tmp_path, monkeypatch, caplog, open_part, rights, no_group_of_one
):
    """The folder itself, and one above it, which can be exchanged."""
    folder = tmp_path / "shared" / "cache"
    folder.mkdir(parents=True)
    (tmp_path / open_part).chmod(rights)
    monkeypatch.setenv("VIMTUNE_CACHE", str(folder))
    assert usable_folders() == [private_temporary(tmp_path)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"can write to {tmp_path / open_part}" in record.getMessage()
    assert "chmod go-w" in record.getMessage()


@pytest.mark.parametrize("given", ["shared", "shared/cache"])
def test_a_folder_of_somebody_else_is_refused(home, tmp_path, monkeypatch, caplog, given, other):
    folder = tmp_path / "shared" / "cache"
    folder.mkdir(parents=True)
    other(tmp_path / given)
    monkeypatch.setenv("VIMTUNE_CACHE", str(folder))
    assert usable_folders() == [private_temporary(tmp_path)]
    assert f"{tmp_path / given} belongs to user {SOMEBODY}" in caplog.text


def test_nobody_else_is_trusted_with_our_own_folders_either(home, monkeypatch):
    """As above, where the tests do not run as root."""
    folder = private_folder(home / "cache")
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)
    if home.stat().st_uid == 0:
        assert private_folder(folder) == folder  # root could do anything anyway
    else:
        with pytest.raises(Untrusted, match="belongs to user"):
            private_folder(folder)


def test_root_and_sticky_folders_are_trusted_for_what_is_ours_in_them(home, tmp_path, other):
    assert private_folder(tmp_path / "tmp" / "ours").is_dir()
    planted = tmp_path / "tmp" / "theirs"
    planted.mkdir()
    other(planted)
    with pytest.raises(Untrusted, match="belongs to user"):
        private_folder(planted)


def test_a_temporary_folder_that_somebody_made_before_us(home, tmp_path, other):
    folder = private_temporary(tmp_path)
    folder.mkdir()
    other(folder)
    assert usable_folders() == [home / ".cache" / "vimtune"]
    folder.rmdir()
    folder.symlink_to(home)
    other(folder)
    assert usable_folders() == [home / ".cache" / "vimtune"]


def test_links_of_our_own_are_followed_and_what_they_lead_to_is_checked(home, tmp_path):
    (tmp_path / "disk").mkdir()
    (home / ".cache").symlink_to(tmp_path / "disk")
    assert usable_folders()[0] == tmp_path / "disk" / "vimtune"
    (tmp_path / "disk").chmod(0o777)
    assert usable_folders() == [private_temporary(tmp_path)]


def test_a_group_of_its_own_is_the_owner(tmp_path, monkeypatch):
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    user = pwd.struct_passwd(("ada", "x", os.geteuid(), 777, "", "/", ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)

    def group(name, members):
        monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, members)))
        return cache._is_group_of_one(777)

    assert group("ada", []) and group("ada", ["ada"])
    assert not group("ada", ["ada", "eve"]) and not group("users", [])
    assert not cache._is_group_of_one(778)

    def unknown(gid):
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert not cache._is_group_of_one(777)


@pytest.mark.parametrize("where", ["a file", "below a file", "a link to nowhere", "circle"])
def test_no_folder_at_all(home, tmp_path, monkeypatch, where):
    places = {"a file": home / "file", "below a file": home / "file" / "cache"}
    (home / "file").touch()
    (home / "link").symlink_to(home / "nowhere" if where != "circle" else home / "link")
    monkeypatch.setenv("VIMTUNE_CACHE", str(places.get(where, home / "link")))
    assert usable_folders() == [private_temporary(tmp_path)]


def test_no_home(home, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user has none
    assert usable_folders() == [private_temporary(tmp_path)]


def test_files_that_others_can_write_are_not_read(tmp_path, monkeypatch, no_group_of_one):
    path = tmp_path / "library.so"
    path.write_bytes(b"content")
    path.chmod(0o644)
    assert read_private(path) == b"content"
    for rights in (0o666, 0o664, 0o646):
        path.chmod(rights)
        with pytest.raises(Untrusted, match="can write to"):
            read_private(path)


def test_files_of_others_links_and_pipes_are_not_read(tmp_path, other):
    path = tmp_path / "library.so"
    path.write_bytes(b"content")
    (tmp_path / "link.so").symlink_to(path)
    os.mkfifo(tmp_path / "pipe.so")
    for wrong in ("link.so", "pipe.so"):
        with pytest.raises(OSError):
            read_private(tmp_path / wrong)
    other(path)
    with pytest.raises(Untrusted, match="belongs to user"):
        read_private(path)


@pytest.fixture
def planted(home, tmp_path, monkeypatch):
    """A library with the name and the checksum that it should have, in a folder that is private at first.

    The second path is that of a file which appears if it is loaded.
    """
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    evidence = tmp_path / "evidence"
    source = tmp_path / "evil.cpp"
    source.write_text(
        f'#include <cstdio>\n__attribute__((constructor)) static void run() {{ fopen("{evidence}", "w"); }}\n'
    )
    library = tmp_path / "evil.so"
    build._run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], 100)
    folder = tmp_path / "shared"
    folder.mkdir()
    name = f"cpu-{build._key(compiler)}-{build._digest(library.read_bytes())}.so"
    path = Path(shutil.copy(library, folder / name))
    path.chmod(0o600)
    monkeypatch.setenv("VIMTUNE_CACHE", str(folder))
    monkeypatch.setenv("VIMTUNE_NO_COMPILE", "1")
    return path, evidence


@pytest.mark.parametrize("how", ["open folder", "open file", "file of somebody", "folder of somebody"])
def test_a_planted_library_is_never_loaded(planted, how, request, caplog):
    path, evidence = planted
    if how == "open folder":
        path.parent.chmod(0o777)
    elif how == "open file":
        path.chmod(0o666)
    else:
        give = request.getfixturevalue("other")
        path.parent.chmod(0o1777)
        give(path if how == "file of somebody" else path.parent)
    with pytest.raises(build.BuildError, match="no library is cached"):
        build.load_library()
    assert not evidence.exists()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert path.exists() == ("folder" in how)


def test_the_trap_would_spring(planted):
    """What lies in a private folder is loaded: the test above can fail."""
    _, evidence = planted
    build.load_library()
    assert evidence.exists()
