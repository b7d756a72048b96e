"""Safetensors files of any name are read, and the reason why one is not is the system's."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vimtune.tensor_file import read_metadata, read_tensors


@pytest.mark.parametrize("name", ["plain", "été", "caf\udce9", "a b\n'"])
def test_files_of_any_name(tmp_path, name):
    path = tmp_path / name
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}, path, {"key": "value"})
    assert read_metadata(path) == {"key": "value"}
    tensors = read_tensors(path)
    assert tensors["a"].tolist() == [0, 1, 2] and tensors["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["plain", "caf\udce9"])
@pytest.mark.parametrize("read", [read_metadata, read_tensors])
def test_a_damaged_file(tmp_path, name, read):
    (tmp_path / name).write_bytes(b"\xff" * 100)
    with pytest.raises(SafetensorError):
        read(tmp_path / name)


def test_a_reason_of_the_system_is_not_taken_for_a_missing_file(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        read_metadata(loop)
