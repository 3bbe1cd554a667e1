from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill.line_file import LineFile


@contextmanager
def full_at(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    real = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, real[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, real)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n')
    file = LineFile(path)
    file.write({"step": 2})
    with full_at(30):
        for step in (3, 4):
            with pytest.raises(OSError, match="File too large"):
                file.write({"step": step})
            assert steps(path) == [1, 2] and path.read_text().endswith("}\n"), "no half of a line"
    file.write({"step": 5})
    assert steps(path) == [1, 2, 3, 4, 5]
    with full_at(60), pytest.raises(OSError, match="File too large"):
        file.write({"step": 6})
    file.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path: Path) -> None:
    with full_at(5):
        file = LineFile(tmp_path / "a.jsonl")
        with pytest.raises(OSError, match="File too large"):
            file.write({"step": 1})
        with pytest.raises(OSError, match="File too large"):
            file.close()
    assert (tmp_path / "a.jsonl").read_bytes() == b""
