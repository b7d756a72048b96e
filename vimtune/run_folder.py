"""The run folder: what lies where, who may write there, and one clear message when it cannot be written.

One run at a time works in a folder. It holds a lock of the operating system on a hidden file there, from
its first write (a resumed run: before it reads its state) to its end. The system frees such a lock when the
process ends, however it ends, so a crash leaves nothing behind that somebody must remove.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from vimtune import parsers
from vimtune.files import WRITING_ERRORS, OutputError, refusal, without_empty_folders
from vimtune.text import printable, quote, shorten

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 6.0
"""Seconds to wait for a lock: data workers of a killed run may keep it until they miss their parent."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUseError(ValueError):
    """Another run works in the folder."""


ADAPTER_FILE = "adapter.safetensors"
"""Name of the adapter in the folder of a run, and in one that is passed on."""
PEFT_CONFIG = "adapter_config.json"
"""Name of the settings in the folder of an adapter of HF peft."""
PEFT_TENSORS = "adapter_model.safetensors"
"""Name of the tensors there."""
MERGED = "model.safetensors"
"""Name of the weights in a folder as timm and the hub have it."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The settings of the run."""
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """The best adapter of the state in `checkpoint`."""
        return self.path / ADAPTER_FILE

    @property
    def next_adapter(self) -> Path:
        """A better adapter whose state is not yet written; see `vimtune.training.state`."""
        return self.path / ".adapter.next.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The last state of the run, to continue from."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """Records of steps and epochs, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The result; a run that has it is finished."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The result with its pictures, for a browser."""
        return self.path / "report.html"

    @property
    def kept(self) -> tuple[Path, ...]:
        """What training found and takes as long to find again, or tells others that the run is finished: no
        command writes its results there."""
        return self.adapter, self.checkpoint, self.report, self.page

    @property
    def learning_curve(self) -> Path:
        """Losses and the most important score over the epochs."""
        return self.path / "learning_curve.png"

    @property
    def lock(self) -> Path:
        """Locked by the run that works in the folder."""
        return self.path / ".lock"

    @property
    def holder(self) -> Path:
        """Says in one line who locked the folder last. It is a file of its own, because a process that waits
        for a lock may empty the locked file."""
        return self.path / ".holder"


def adapter_path(path: str | os.PathLike[str], name: str = "adapter") -> Path:
    """The adapter file that `path` means: a file, or the one in a run folder; `~` is the home folder.

    A folder with nothing but a merged model, as timm has it, means its weights.

    Args:
        path: what somebody gives.
        name: the argument or the key by which it is given.

    Raises:
        ValueError: it is no path.
    """
    found = parsers.given_path(name, path, "a run folder, an adapter file or a merged file")
    if not found.is_dir():
        return found
    own, merged = RunFolder(found).adapter, found / MERGED
    return merged if merged.is_file() and not own.exists() else own


def what_a_folder_is(folder: Path) -> str:
    """What to say of a folder in which there is no adapter file."""
    shown = printable(str(folder))
    if (folder / PEFT_CONFIG).is_file():
        return (
            f"{shown} is an adapter in HF peft's format, which does not say what model and classes it is "
            f"for: make an adapter file of it with vimtune convert {shown} --model X -o NEW, or read it in "
            f"Python with vimtune.load_peft(model, {quote(str(folder))})"
        )
    if RunFolder(folder).recipe.is_file():
        return (
            f"{shown} is a run without an adapter (it has no {ADAPTER_FILE}): wait for the end of its first "
            f"epoch, or go on with vimtune train --resume {shown}"
        )
    try:
        runs = sorted(found.parent for found in folder.glob(f"*/{ADAPTER_FILE}"))
    except OSError:  # A folder that cannot be searched has no run to name.
        runs = []
    hint = f". Did you mean {printable(str(runs[-1]))}?" if runs else ""
    return (
        f"{shown} is a folder without {ADAPTER_FILE}; expected the folder of a run, or an adapter file{hint}"
    )


def create_unused(path: Path) -> Path:
    """Make the first of path, path-2, path-3, ... that does not exist; two runs never get the same one."""
    make_folder(path.parent)
    with _making(path):
        for candidate in _numbered(path):
            with suppress(FileExistsError):
                candidate.mkdir()
                return candidate
    raise AssertionError("there is no last number")


@contextmanager
def unused_folder(path: Path) -> Iterator[Path]:
    """The folder of `create_unused` for a block; if the block leaves it empty, it is gone afterwards."""
    with without_empty_folders(path.parent):
        folder = create_unused(path)
        try:
            yield folder
        finally:
            with suppress(OSError):  # It is not empty.
                folder.rmdir()


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, unless it is there.

    Raises:
        OutputError: it cannot be made; the message says why, and how another one is named.
    """
    with _making(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """`make_folder` for a block; what it has made is gone afterwards if the block leaves it empty."""
    with without_empty_folders(path):
        make_folder(path)
        yield


@contextmanager
def _making(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(cannot_make(path, obstacle(path) or refusal(error))) from error


def cannot_make(path: Path, reason: str) -> str:
    """What to say where the folder of a run, a comparison or a search cannot be made."""
    return (
        f"cannot make the folder {quote(str(path))}: {reason}. Name one elsewhere with --output-dir, or "
        "start the command in another folder"
    )


def obstacle(path: Path) -> str | None:
    """Why a folder cannot be made or written at `path`, as far as can be told without trying; None where
    nothing is known."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if _is_there(folder))
    except OSError as error:  # Such as a name that is too long, or a place that may not be looked at.
        return refusal(error)
    if not existing.is_dir():
        return f"{quote(str(existing))} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{quote(str(existing))} is not writable"
    return None


def _is_there(path: Path) -> bool:
    """Whether anything has this name, also a link that leads nowhere. Other failures are raised."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def last_used(path: Path) -> Path | None:
    """The last of path, path-2, path-3, ... that `create_unused` has made; None if there is none."""
    found = list(itertools.takewhile(Path.is_dir, _numbered(path)))
    return found[-1] if found else None


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


def is_held(folder: RunFolder) -> bool:
    """Whether a run works in a folder at this moment, or it cannot be told."""
    lock = FileLock(folder.lock)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        return True
    lock.release()
    return False


@contextmanager
def hold(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of an existing folder for the length of a block.

    A folder in which the block writes nothing is as empty afterwards as it was.

    Raises:
        FolderInUseError: another run works in it; the message says who.
        OutputError: nothing can be written there.
    """
    lock = FileLock(folder.lock)
    with writing(folder.lock):
        try:
            lock.acquire(timeout=LOCK_PATIENCE)
        except Timeout:
            raise FolderInUseError(
                f"the run folder {printable(str(folder.path))} is in use by {_holder(folder)}: wait for that "
                "run to end, or choose another output_dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s has no locks: make sure that no other run uses this folder",
                printable(str(folder.path)),
            )
    try:
        with writing(folder.holder):
            moment = time.strftime("%Y-%m-%d %H:%M:%S")
            folder.holder.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {moment}\n", "utf-8"
            )
        yield
    finally:
        own = (folder.holder, folder.lock)
        with suppress(OSError):  # Windows removes the file of a lock itself, when that is released.
            if set(folder.path.iterdir()) <= set(own):
                for file in own:
                    file.unlink()
        lock.release()


def _holder(folder: RunFolder) -> str:
    try:
        with open(folder.holder, encoding="utf-8", errors="replace") as file:
            return printable(shorten(file.read(200).strip())) or "another process"
    except OSError:
        return "another process"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into an `OutputError`."""
    try:
        yield
    except WRITING_ERRORS as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "check the folder and its permissions"
        folder = path if os.path.isdir(path) else Path(path).parent
        raise OutputError(
            f"cannot write {os.fspath(path)}: {refusal(error)}. Files written before are intact; {advice}, "
            f"then continue with --resume {os.fspath(folder)} if it holds a checkpoint"
        ) from error
