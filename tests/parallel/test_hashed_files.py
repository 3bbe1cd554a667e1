"""Files are what the library reads, and their records are those of their bytes."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

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
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, real[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_file(path, [b"x" * 100])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, real)
    assert caught.value.filename == str(path)
