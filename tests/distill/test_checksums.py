from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill.checksums import drop_if_damaged, write_sums


def flip(file: Path) -> None:
    """Change one bit, but no length."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda folder: flip(folder / "a.npy"), "a.npy has another content"),
        (lambda folder: (folder / "b.npy").write_bytes(b"1234"), "b.npy has another content"),
        (lambda folder: (folder / "b.npy").unlink(), "No such file"),
        (lambda folder: (folder / "sums.json").write_text("{"), "Expecting"),
        (lambda folder: (folder / "sums.json").write_text("[]"), "no attribute"),
        (lambda folder: (folder / "sums.json").write_text('{"../../x": "1"}'), "No such file"),
        (lambda folder: (folder / "sums.json").unlink(), "No such file"),
    ],
)
def test_a_damaged_folder_goes_and_that_is_said(
    harm: Callable[[Path], object], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "entry"
    folder.mkdir()
    (folder / "a.npy").write_bytes(b"12345678")
    (folder / "b.npy").write_bytes(b"12345")
    write_sums(folder)
    drop_if_damaged(folder, "it is made again")
    assert folder.is_dir() and capsys.readouterr().out == ""
    harm(folder)
    drop_if_damaged(folder, "it is made again")
    assert list(tmp_path.iterdir()) == []
    line = capsys.readouterr().out
    assert line.startswith(f"{folder} is broken (") and part in line and line.endswith("; it is made again\n")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    drop_if_damaged(tmp_path / "none", "")
