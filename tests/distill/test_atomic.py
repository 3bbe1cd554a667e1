from __future__ import annotations

from pathlib import Path

import pytest

from distill.atomic import build_once


def test_an_entry_appears_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "entry"

    def write(path: Path) -> None:
        path.mkdir()
        (path / "content").write_text("whole")
        assert not target.exists()

    build_once(target, write)
    assert (target / "content").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "entry", write)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    target = tmp_path / "entry"

    def write(path: Path) -> None:
        path.mkdir()
        (path / "content").write_text("second")
        target.mkdir()
        (target / "content").write_text("first")

    build_once(target, write)
    assert (target / "content").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_build_that_makes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_once(tmp_path / "entry", lambda path: None)
