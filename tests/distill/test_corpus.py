from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx

import distill.documents
from distill.config import ConfigError, Data
from distill.corpus import read_documents, skipped_line
from distill.failures import RunFailed


def _jsonl(path: Path, *records: Any) -> Path:
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    )
    return path


def _read(path: Path | str, cache: Path, **settings: Any) -> list[str]:
    return list(read_documents(Data(path=str(path), **settings), cache_dir=cache)["text"])


def test_pydoc_is_one_document_a_topic(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    assert sorted(_read("pydoc", tmp_path)) == sorted(topics.values())


def test_each_kind_of_file_is_read(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    (corpus / "b.txt").write_text("one\n\n  file,\tone document\n")
    (corpus / "a.txt").write_text("na\u00efve \u2013 text", encoding="utf-8")
    (corpus / "blank.txt").write_text(" \n")
    (corpus / "empty.jsonl").write_text("")
    (corpus / "notes.md").write_text("not read")
    # Other columns may differ in type from line to line, and from file to file.
    _jsonl(corpus / "c.jsonl", {"text": "first", "meta": 1}, "", {"meta": "x", "text": "second"})
    _jsonl(corpus / "inner" / "d.jsonl", {"text": "third", "other": [1]})
    pq.write_table(pa.table({"id": [1, 2], "text": ["fourth", "fifth"]}), corpus / "e.parquet")
    expected = [
        "na\u00efve \u2013 text",
        "one\n\n  file,\tone document\n",
        "first",
        "second",
        "fourth",
        "fifth",
        "third",
    ]
    assert _read(corpus, tmp_path / "cache") == expected
    assert _read(corpus / "b.txt", tmp_path / "cache") == [expected[1]]
    several = Data(path=(str(corpus / "c.jsonl"), str(corpus / "b.txt")))
    assert list(read_documents(several, cache_dir=tmp_path / "cache")["text"]) == [
        "first",
        "second",
        expected[1],
    ]


def test_files_that_are_not_read_are_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.txt.gz", "inner/d.md", "inner/LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    words = "note: in the folders of data.path only .txt, .jsonl, .parquet files are read; left out: "
    told = skipped_line(Data(path=("pydoc", str(tmp_path))))
    assert told.startswith(f"{words}4 (2 .md, ") and "1 .gz" in told and "1 without a suffix" in told
    assert skipped_line(Data(path=str(tmp_path / "a.txt"))) == skipped_line(Data(path="pydoc")) == ""


def test_text_field_names_the_column(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", {"body": "right", "text": "wrong"})
    assert _read(file, tmp_path / "cache", text_field="body") == ["right"]
    pq.write_table(
        pa.table({"body": pa.array(["right"], pa.large_string()), "text": [1]}), tmp_path / "a.parquet"
    )
    assert _read(tmp_path / "a.parquet", tmp_path / "cache", text_field="body") == ["right"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_changed_file_is_read_again(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    for text in ("before", "after!"):
        if suffix == ".txt":
            file.write_text(text)
        elif suffix == ".jsonl":
            _jsonl(file, {"text": text})
        else:
            pq.write_table(pa.table({"text": [text]}), file)
        assert _read(file, tmp_path / "cache") == [text]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f / "absent.txt", r"data\.path=.*absent\.txt does not exist"),
        (lambda f: f, "holds no text in .txt, .jsonl, .parquet files"),
        (lambda f: (f / "a.txt").write_text(" \n") and f, "holds no text in its 1 documents"),
        (lambda f: (f / "a.csv").write_text("x") and f / "a.csv", r"is a \.csv file; give a \.txt"),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\x00") and f, r"a\.txt, line 1 is not UTF-8"),
        (lambda f: _jsonl(f / "a.jsonl", {"text": "a"}, "", '{"text": "b"'), r"a\.jsonl, line 3 is not JSON"),
        (lambda f: _jsonl(f / "a.jsonl", {"text": "a"}, ["b"]), r"a\.jsonl, line 2 is a list, not an object"),
        (
            lambda f: _jsonl(f / "a.jsonl", {"text": "a"}, {"text": None}),
            r"a\.jsonl, line 2; .*text \(NoneType\)",
        ),
        (lambda f: _jsonl(f / "a.jsonl", {"text": "a"}, {"text": 3}), r"a\.jsonl, line 2; .*text \(int\)"),
        (
            lambda f: _jsonl(f / "a.jsonl", {"body": "a", "id": 1}),
            r"data\.text_field=text .*line 1; .*body \(str\), id \(int\)",
        ),
        (lambda f: (f / "a.parquet").write_bytes(b"PAR1") and f, r"a\.parquet cannot be read"),
        (lambda f: pq.write_table(pa.table({"body": ["a"]}), f / "a.parquet") or f, "its fields are body"),
        (
            lambda f: pq.write_table(pa.table({"text": [1]}), f / "a.parquet") or f,
            "must be a string in .*int64",
        ),
        (
            lambda f: pq.write_table(pa.table({"text": ["a", None]}), f / "a.parquet") or f,
            "is null in 1 of the 2 records",
        ),
    ],
)
def test_mistakes_are_told(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    (tmp_path / "corpus").mkdir()
    path = write(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=message):
        _read(path, tmp_path / "cache")


def test_no_path_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=None names no corpus"):
        read_documents(Data(path=None), cache_dir=tmp_path)


def _hub(monkeypatch: pytest.MonkeyPatch, error: Exception | None, result: Dataset | Exception) -> list[Any]:
    """Replace the hub; the list collects what load_dataset is asked for."""
    asked: list[Any] = []

    def info(self: Any, name: str, **kwargs: Any) -> None:
        if error is not None:
            raise error

    def load(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs["split"]))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_hub_data_sets_are_asked_for_by_name_and_subset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]})
    asked = _hub(monkeypatch, None, found)
    assert _read("owner/name", tmp_path) == ["a", "b"]
    assert _read("owner/name:small", tmp_path) == ["a", "b"]
    assert asked == [(("owner/name", None), "train"), (("owner/name", "small"), "train")]
    with pytest.raises(ConfigError, match="its fields are text, id"):
        _read("owner/name", tmp_path, text_field="body")
    asked = _hub(monkeypatch, OfflineModeIsEnabled("offline"), found)
    assert _read("owner/name", tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RepositoryNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            ),
            ConfigError,
            "neither a local path nor a data set on the hub",
        ),
        # A restart may find it answering again.
        (httpx.ConnectError("name not known"), RunFailed, r"the hub gave no answer \(name not known\)"),
    ],
)
def test_hub_failures_are_told_without_waiting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    asked = _hub(monkeypatch, error, ValueError("unused"))
    with pytest.raises(kind, match=message):
        _read("owner/name", tmp_path)
    assert asked == []


def test_an_unreachable_hub_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No mock of the client, whose exceptions differ between versions; nothing listens on this port.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start_s = time.monotonic()
    with pytest.raises(RunFailed, match="the hub gave no answer"):
        _read("owner/name", tmp_path)
    assert time.monotonic() - start_s < 8


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("Config name is missing. Pick one of: small, large"), ConfigError, "from the hub: .* small, large"),
        (FileNotFoundError("no data in it"), ConfigError, "from the hub: no data in it"),
        (ConnectionError("half of it"), RunFailed, r"from the hub now \(half of it\); the same command tries again"),
    ],
)  # fmt: skip
def test_a_hub_data_set_that_cannot_be_loaded_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    _hub(monkeypatch, None, error)
    with pytest.raises(kind, match=f"owner/name cannot be loaded {message}"):
        _read("owner/name", tmp_path)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ESTALE, RunFailed, r"c\.jsonl cannot be read \(Stale file handle\); the same command tries again"),
        (errno.EIO, RunFailed, r"c\.jsonl cannot be read \(Input/output error\)"),
        (errno.EACCES, ConfigError, r"c\.jsonl cannot be read \(Permission denied\); it must stay"),
    ],
)  # fmt: skip
def test_a_disk_that_fails_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    file = tmp_path / "c.jsonl"
    _jsonl(file, {"text": "a"})

    def fail(file: str, mode: str) -> None:
        raise OSError(number, os.strerror(number), file)

    # Where the generator reads: what `datasets` makes of an error is part of it.
    monkeypatch.setattr(distill.documents, "open", fail, raising=False)
    with pytest.raises(kind, match=message):
        _read(str(file), tmp_path / "cache")
