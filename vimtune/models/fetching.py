"""The files of published weights: where they are, whether they are whole, and downloading them."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg

from vimtune.download import DownloadError, digest_of, download_file, download_lock
from vimtune.models.checkpoint import CheckpointError
from vimtune.models.weights import OTHER_WEIGHTS, Weights, weights_of
from vimtune.text import printable, quote

ADDRESS = "VIMTUNE_WEIGHTS_URL"
"""Environment variable with the address of a folder that has the files of `weights/`, such as the raw files
of a repository or a mirror within a company. There is no other: nothing is fetched that was not asked for."""


def name_the_file(name: str, options: dict[str, Any]) -> None:
    """Let timm load weights of ours from where they are; it knows the place beside the package alone.

    Args:
        name: name of a model, with or without a tag.
        options: what timm's factory is given, which is changed.

    Raises:
        CheckpointError: the weights are nowhere, or the file there is another one.
    """
    ours, overlay = weights_of(name), options.get("pretrained_cfg_overlay") or {}
    configured = isinstance(options.get("pretrained_cfg"), (dict, PretrainedCfg)) or "file" in overlay
    if ours is not None and not configured:
        options["pretrained_cfg_overlay"] = {**overlay, "file": str(file_of(ours))}


def file_of(weights: Weights) -> Path:
    """The file of published weights: beside the package, or else among the weights that torch.hub keeps,
    where it is downloaded to from the address in the environment.

    Raises:
        CheckpointError: it is nowhere and no address is given, or what is found there is another file.
    """
    if weights.path.is_file():
        _compare(weights, weights.path, "take this file from the repository or the package once more")
        return weights.path
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.path.name
    if path.is_file():
        _compare(weights, path, "delete it, and it is downloaded again")
    else:
        _download(weights, path)
    return path


def _compare(weights: Weights, path: Path, advice: str) -> None:
    state = path.stat()
    found = _sha256(path, (state.st_size, state.st_mtime_ns))
    if found != weights.sha256:
        raise CheckpointError(
            f"{printable(str(path))} has SHA-256 {found}, expected {weights.sha256}, that of the weights "
            f"{weights.name}: {advice}"
        )


@lru_cache
def _sha256(path: Path, version: tuple[int, int]) -> str:
    """Hash of a file, which a command that asks for it more than once computes once.

    Args:
        path: the file.
        version: its size in bytes and its time of change in ns; a file that was replaced has others.
    """
    return digest_of(path, "sha256")


def _download(weights: Weights, path: Path) -> None:
    address = os.environ.get(ADDRESS, "")
    if not address:
        raise CheckpointError(
            f"the weights {weights.name} are not at {printable(str(weights.path))}: they lie in the folder "
            f"weights/ of the repository. Run from a checkout of it, let the environment variable {ADDRESS} "
            f"say at which address that folder can be downloaded, {OTHER_WEIGHTS}"
        )
    if not address.startswith(("https://", "http://")):
        raise CheckpointError(f"{ADDRESS} = {quote(address)}: expected an address that begins with https://")
    elsewhere = "Let the environment variable TORCH_HOME name another folder"
    try:
        with download_lock(path.parent, elsewhere):
            download_file(f"{address.rstrip('/')}/{path.name}", path, weights.sha256, algorithm="sha256")
    except DownloadError as error:
        raise CheckpointError(
            f"the weights {weights.name} are not at {printable(str(weights.path))} and: {error} Put the file "
            f"there, correct the address in {ADDRESS}, {OTHER_WEIGHTS}"
        ) from error
