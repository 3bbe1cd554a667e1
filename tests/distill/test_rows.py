"""Rows are those that were checked on the machine that reads them, and a share that is far off is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill import rows
from distill.checksums import write_sums
from distill.config import Data
from distill.rows import _opened, _place, tell_text


@pytest.mark.parametrize(
    ("held_out", "train", "said"),
    [
        (10, 90, ""),
        (4, 96, "warning: 4 of 100 tokens are held out (4.00%)"),
        (30, 70, "warning: 30 of 100"),
    ],
)
def test_a_share_far_from_the_one_asked_for_is_told(
    held_out: int, train: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (SimpleNamespace(num_tokens=count) for count in (held_out, train))
    corpus = SimpleNamespace(held_out=SimpleNamespace(rows=next(parts)), calibrating=next(parts))
    tell_text(corpus, Data(held_out_fraction=0.1))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)
    tell_text(corpus, Data(held_out_fraction=0.1, weights=(1.0, 0.0)))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "", "what is held out is of both, what is counted of one"


def test_rows_in_another_machines_cache_are_checked_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "input_ids.npy").write_bytes(b"tokens")
    write_sums(folder)
    monkeypatch.setattr(rows, "Rows", lambda place, *, pad_token_id: f"opened {place.name}, {pad_token_id}")
    place = _place(SimpleNamespace(folder=folder, pad_token_id=3))  # type: ignore[arg-type]
    looked = []
    with monkeypatch.context() as patch:
        patch.setattr(rows, "drop_if_damaged", lambda *given: looked.append(given))
        assert _opened(place, lambda: "made") == "opened rows, 3"  # type: ignore[comparison-overlap, arg-type, return-value]
    assert not looked, "the first rank has read it"
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    assert _opened(place, lambda: "made") == "made"  # type: ignore[comparison-overlap, arg-type, return-value]
    (tmp_path / "copy").rename(folder)
    assert _opened(place, lambda: "made") == "opened rows, 3"  # type: ignore[comparison-overlap, arg-type, return-value]
    (folder / "input_ids.npy").write_bytes(b"tokenz")
    assert _opened(place, lambda: "made") == "made"  # type: ignore[comparison-overlap, arg-type, return-value]
    assert "rows is broken (input_ids.npy has another content" in capsys.readouterr().out
