"""Files are what the library reads, and their records are those of their bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from parallel.hashed_files import FileRecord, difference, write_file, write_safetensors


def test_safetensors_of_every_kind_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    tensors = {
        "b": wide.bool(),
        "half": wide.half(),
        "brain": wide.bfloat16(),
        "single": wide.float(),
        "double": wide,
        "whole": (wide * 100).long(),
        "0-dim": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": wide.float().t(),
        "part": wide.float()[1:3, 1:2],
        'quote " and \u00e9': torch.ones(1),
    }
    path = tmp_path / "a.safetensors"
    record = write_safetensors(tensors, path, metadata={"shards": '{"a": 1}'})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"shards": '{"a": 1}'}
    content = path.read_bytes()
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())
    assert difference(path, record) is None


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4096, 4097, 1 << 22, (1 << 22) + 5, (9 << 20) + 4095])
def test_files_of_every_size_are_written_whole(
    size_bytes: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.delattr("os.O_DIRECT")
    content = random.Random(size_bytes).randbytes(size_bytes)
    # In pieces that are whole blocks now and then.
    cuts = sorted({0, *range(1000, size_bytes, 999_983), *range(8192, size_bytes, 3 << 20), size_bytes})
    pieces = [content[start:stop] for start, stop in itertools.pairwise(cuts)]
    path = tmp_path / "a"
    path.write_bytes(b"what was there before" * 1000)
    assert write_file(path, pieces) == FileRecord(size_bytes, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its start as tmpfs, or in the middle as at a limit of the file's size."""
    real_open, real_write, content = os.open, os.write, random.Random(0).randbytes(5 << 20)

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        write_file(tmp_path / "a", [content])
    calls = []

    def refuse_later(descriptor: int, view: memoryview) -> int:
        calls.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if len(calls) > 1 and calls[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, view[: 1 << 20])

    monkeypatch.setattr(os, "write", refuse_later)
    write_file(tmp_path / "b", [content])
    assert bool(calls[0]) and not calls[-1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content


def test_every_difference_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a"
    record = write_file(path, [b"abc", memoryview(b"defg")])
    assert path.read_bytes() == b"abcdefg" and difference(path, record) is None
    for content, words in ((b"abcdef", "has 6 bytes, its checkpoint says 7"), (b"abcdefh", "is damaged")):
        path.write_bytes(content)
        assert words in (difference(path, record) or "")
    path.unlink()
    assert "has 0 bytes" in (difference(path, record) or "")
    path.mkdir()
    assert "has 0 bytes" in (difference(path, record) or "")


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path: Path) -> None:
    path, real = tmp_path / "a", resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit_bytes, size_bytes in (
        (10, 100),
        (10_000, 20_000),
        (5 << 20, 9 << 20),
        ((5 << 20) + 1, 9 << 20),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, real[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                write_file(path, [b"x" * size_bytes])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, real)
        assert caught.value.filename == str(path)
