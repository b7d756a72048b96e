"""Adapters and merged models on the Hugging Face hub: `vimtune convert`, `push` and `pull`.

`convert` writes the folder that `push` uploads. Where HF_HUB_OFFLINE is set nothing is asked of the network:
`pull` finds what has been downloaded before, `push` refuses. HF_ENDPOINT, HF_TOKEN and HF_HOME mean what they
mean to huggingface_hub.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download

from vimtune import parsers
from vimtune.adapters import read_adapter_info
from vimtune.console import build_console, print_line
from vimtune.exchange.base import REPOSITORY
from vimtune.exchange.card import check_license, write_card
from vimtune.exchange.formats import FORMATS, Source
from vimtune.exchange.local_paths import clean_json
from vimtune.exchange.peft.adopt import Unsaid, adopt_peft, is_peft_folder, read_names
from vimtune.hub_errors import HUB_ERRORS
from vimtune.models.merged import is_merged_file
from vimtune.output import write_folder
from vimtune.runtime.device import resolve_device
from vimtune.tasks.origin import adapter_path, given_base
from vimtune.text import printable, quote, shorten

CARD = "README.md"
"""Name of the model card."""


class HubError(ValueError):
    """The hub cannot be reached, or refuses; the message has its reason."""


def convert(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    to: str = "vimtune",
    place: str | None = None,
    license: str | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    force: bool = False,
) -> Path:
    """Write an adapter as it is passed on: the files of a format, and a model card.

    Args:
        adapter: the file, or the folder of a run, whose report the card then has; or a folder in HF peft's
            format, of which `model` names the base model, one of images or of texts.
        folder: a folder that is empty or not there yet.
        to: the format, one of `vimtune.exchange.formats.FORMATS`: "vimtune", "peft", "merged".
        place: name of the repository that the card speaks of; if None OWNER/ and that of the folder.
        license: its name on the hub, such as "apache-2.0"; the card names none if None.
        task: what a folder of HF peft was trained for, such as "text"; "classification" of images if None.
        classes: names of its classes, one for each output of its head; numbers if None.
        checkpoint: where the base weights of an adapter of images are now, as for `load_predictor`.
        model: where the base model of an adapter of texts is now, as there.
        tokenizer: where its tokenizer is now, as there.
        device: "auto", "cpu", "cuda", "cuda:<index>" or "mps".
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although its base weights are others.

    Returns:
        The folder.

    Raises:
        ValueError: the format cannot express the adapter, its base weights are not to be had, or the folder
            cannot be written. Nothing is left behind then.
    """
    path = parsers.given_path("adapter", adapter, "a run folder, an adapter file or a folder of HF peft")
    base = given_base(checkpoint, model, tokenizer)
    options: dict[str, Any] = {
        "to": to,
        "place": place,
        "license": license,
        "device": device,
        "backend": backend,
        "force": force,
    }
    if is_peft_folder(path):
        unsaid = Unsaid(base=base, task=task, classes=classes)
        with tempfile.TemporaryDirectory() as temporary:
            return _write(adopt_peft(path, Path(temporary), unsaid), folder, base={}, **options)
    for name, value in (("task", task), ("classes", classes)):
        if value is not None:
            raise ValueError(
                f"{name} = {quote(value)}: {quote(str(path))} says it by itself, and folders in HF peft's "
                "format alone do not. Leave it out"
            )
    return _write(adapter_path(path), folder, base=base, **options)


def _write(
    path: Path,
    folder: str | os.PathLike[str],
    *,
    to: str,
    place: str | None,
    license: str | None,
    base: Mapping[str, Any],
    device: str,
    backend: str,
    force: bool,
) -> Path:
    """`convert` of an adapter file; `base` says where its base weights are, as `given_base` does."""
    target = parsers.given_path("folder", folder, "a new folder")
    form = FORMATS.get(to)
    check_license(license)
    if is_merged_file(path):
        raise ValueError(f"{quote(str(path))} is merged already: give the adapter that it was made from")
    info = read_adapter_info(path)
    source = Source(path, info, base, resolve_device(device), backend, force)

    def write(temporary: Path) -> None:
        code = form.write(source, temporary)
        clean_json(temporary)
        card = write_card(info, path, form, code, place or f"OWNER/{target.name}", license)
        (temporary / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")

    write_folder(target, write)
    return target


def push(
    adapter: str | os.PathLike[str],
    repository: str,
    *,
    to: str = "vimtune",
    license: str | None = None,
    private: bool = False,
    message: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    force: bool = False,
) -> str:
    """Upload an adapter, or a model that is merged from it, to the hub.

    Args:
        adapter: the file, or the folder of a run.
        repository: "user/name"; it is made where there is none.
        to: the format, as for `convert`.
        license: under which it is passed on, as for `convert`.
        private: whether a new repository is private.
        message: title of the commit.
        checkpoint: where the base weights of an adapter of images are now, as for `load_predictor`.
        model: where the base model of an adapter of texts is now, as there.
        tokenizer: where its tokenizer is now, as there.
        device: "auto", "cpu", "cuda", "cuda:<index>" or "mps".
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although its base weights are others.

    Returns:
        The address of the repository.

    Raises:
        HubError: the hub cannot be reached, or refuses, as without a token.
        ValueError: as `convert`, or no name of a repository.
    """
    _check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"HF_HUB_OFFLINE is set, and {quote(repository)} is to be uploaded: unset it, or write the "
            "folder with vimtune convert and upload it later"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = _write(
            adapter_path(adapter),
            Path(temporary) / "files",
            to=to,
            place=repository,
            license=license,
            base=given_base(checkpoint, model, tokenizer),
            device=device,
            backend=backend,
            force=force,
        )
        api = HfApi()
        with _asking(f"upload to {quote(repository)}"):
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id, folder_path=folder, commit_message=message or f"Upload by vimtune ({to})"
            )
    return str(url)


def pull(
    repository: str, folder: str | os.PathLike[str], *, revision: str | None = None, to: str | None = None
) -> Path:
    """Download an adapter or a merged model that `push` has uploaded, or an adapter of HF peft.

    Of the repository the files of the known formats are taken and nothing else. What comes from it is read as
    strictly as any other file, when it is used.

    Args:
        repository: "user/name".
        folder: a folder that is empty or not there yet.
        revision: a branch, tag or commit.
        to: the format that is wanted, where a repository has several.

    Returns:
        The folder.

    Raises:
        HubError: the hub cannot be reached, there is no such repository, or with HF_HUB_OFFLINE it has not
            been downloaded before.
        ValueError: no name of a repository, one without files of a known format, or a folder that cannot be
            written.
    """
    _check_repository(repository)
    target = parsers.given_path("folder", folder, "a new folder")
    forms = [FORMATS.get(to)] if to is not None else [form for _, form in FORMATS.items()]
    patterns = [CARD, *(pattern for form in forms for pattern in form.files)]
    with _asking(f"download of {quote(repository)}"):
        found = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    # The cache may have files of the same commit that were asked for otherwise.
    names = sorted(path.name for path in found.iterdir() if path.is_file())
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not any(name.endswith(".safetensors") for name in names):
        known = ", ".join(dict.fromkeys(pattern for form in forms for pattern in form.files))
        raise ValueError(f"repository {quote(repository)} has no adapter and no weights: expected {known}")

    def write(temporary: Path) -> None:
        for name in names:
            shutil.copyfile(found / name, temporary / name)

    write_folder(target, write)
    return target


def _check_repository(name: str) -> None:
    if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
        raise ValueError(f"repository = {quote(name)}: expected the name of a user and of a model, user/name")


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Errors of the hub within the block say what was asked."""
    try:
        yield
    except HUB_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = printable(shorten(lines[0], 300))
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set, and it has not been downloaded before: {reason}"
        raise HubError(
            f"the {what} failed ({reason}): check the name, the network, and the token (hf auth login, "
            "HF_TOKEN)"
        ) from error


def run_convert(*, classes: Path | None, **options: Any) -> int:
    """`vimtune convert`: write the folder, say what is in it. Returns the exit code.

    Args:
        classes: a text file with the names of the classes, one a line.
        **options: the other arguments of `convert`.
    """
    folder = convert(classes=None if classes is None else read_names(classes), **options)
    console = build_console()
    print_line(console, f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def run_push(**options: Any) -> int:
    """`vimtune push`, with the arguments of `push`: upload, print the address. Returns the exit code."""
    print_line(build_console(), f"uploaded to {push(**options)}")
    return 0


def run_pull(**options: Any) -> int:
    """`vimtune pull`, with the arguments of `pull`: download, say what there is. Returns the exit code."""
    folder = pull(**options)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print_line(build_console(), f"downloaded to {folder}: {names}")
    return 0
