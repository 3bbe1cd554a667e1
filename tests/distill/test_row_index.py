"""Which rows a start takes without reading the text again, and when it does read it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import distill.data
from distill.config import Data
from distill.corpus import corpus_files
from distill.data import load_rows
from distill.packing import Rows
from tests.distill.tiny_tokenizer import tiny_tokenizer

TEXTS = [f"Document {index:02d} says something." for index in range(30)]


def write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text, "other": text}) + "\n" for text in texts))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", TEXTS[:20])
    write(folder / "b.jsonl", TEXTS[20:])
    return Data(path=(str(folder / "a.jsonl"), str(folder)), seq_len=64, held_out_fraction=0.3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Data]:
    """What has been read of the text so far."""
    seen: list[Data] = []
    read = distill.data.read_documents

    def read_documents(data: Data, **options: object) -> object:
        seen.append(data)
        return read(data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(distill.data, "read_documents", read_documents)
    return seen


def load(data: Data, cache: Path, **options: object) -> Rows:
    return load_rows(data, tiny_tokenizer(), cache_dir=cache, **{"part": "train", **options})  # type: ignore[arg-type]


def test_the_same_files_are_read_once(data: Data, reads: list[Data], tmp_path: Path) -> None:
    first = load(data, tmp_path)
    assert len(reads) == 1
    again = load(data, tmp_path)
    assert len(reads) == 1 and again.folder == first.folder and len(again) == len(first)
    assert again.pad_token_id == first.pad_token_id


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"seq_len": 32}, {}),
        ({"split_sentences": False}, {}),
        ({"text_field": "other"}, {}),
        ({"held_out_fraction": 0.5}, {}),
        ({}, {"part": "held_out"}),
        ({}, {"source": 0}),
        ({}, {"source": 1}),
    ],
)
def test_whatever_rows_depend_on_reads_it_again(
    data: Data, reads: list[Data], tmp_path: Path, changed: dict, options: dict
) -> None:
    load(data, tmp_path)
    load(replace(data, **changed), tmp_path, **options)
    assert len(reads) == 2


def another_text(folder: Path) -> None:
    write(folder / "b.jsonl", TEXTS[20:-1] + ["Document 29 says something!"])


def another_file(folder: Path) -> None:
    write(folder / "c.jsonl", ["More."])


def another_name(folder: Path) -> None:
    (folder / "b.jsonl").rename(folder / "0.jsonl")


@pytest.mark.parametrize("change", [another_text, another_file, another_name])
def test_files_that_change_are_read_again(
    data: Data, reads: list[Data], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    first, folder = load(data, tmp_path), tmp_path / "texts"
    earlier = (folder / "b.jsonl").stat()
    change(folder)
    if change is another_text:
        # As long as it was; a clock that stands still between two writes would hide it from `datasets` too.
        assert (folder / "b.jsonl").stat().st_size == earlier.st_size
        os.utime(folder / "b.jsonl", ns=(0, earlier.st_mtime_ns + 1))
    second = load(data, tmp_path)
    assert len(reads) == 2 and second.folder != first.folder


def test_rows_or_an_entry_that_are_broken_are_made_again(
    data: Data, reads: list[Data], tmp_path: Path
) -> None:
    first = load(data, tmp_path)
    (first.folder / "lengths.npy").write_bytes(b"half")
    assert len(load(data, tmp_path)) == len(first) and len(reads) == 2
    (entry,) = (tmp_path / "index").iterdir()
    for number, content in enumerate((b"", b"\xff\x00", b"../../elsewhere"), start=3):
        entry.write_bytes(content)
        assert load(data, tmp_path).folder == first.folder and len(reads) == number
        load(data, tmp_path)
        assert len(reads) == number, "the entry has been mended"


def test_what_is_no_file_has_no_entry(data: Data, tmp_path: Path) -> None:
    assert corpus_files(data) is not None and corpus_files(Data(path="pydoc")) is not None
    assert corpus_files(replace(data, path=(*data.path, "owner/name"))) is None
    both = [corpus_files(replace(data, path=order)) for order in (data.path, data.path[::-1])]
    assert both[0] != both[1], "which entry a file belongs to decides its source"
