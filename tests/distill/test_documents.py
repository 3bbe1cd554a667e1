from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill import documents
from distill.config import ConfigError
from distill.documents import json_documents, text_documents


def refused_line(tmp_path: Path, content: bytes, field: str = "text") -> str:
    """Return the sentence that refuses a JSONL file."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(json_documents(str(file), field))
    assert str(file) in str(caught.value)
    return str(caught.value)


GOOD = b'{"text": "one"}\n'


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"text": "two"', "line 2 is not JSON"),
        (b"[1]", "line 2 is a list, not an object"),
        (b"null", "line 2 is a NoneType"),
        (b'{"text": 3}', "data.text_field=text is no string in"),
        (b'{"text": null}', "the fields there: text (NoneType)"),
        (b'{"content": "two"}', "the fields there: content (str)"),
        (b"{}", "the fields there: "),
        (b'{"text": "t\xffwo"}', "line 2 is not UTF-8 text (invalid start byte)"),
        (b'{"text": "t\0wo"}', "line 2 holds a NUL, so it is not text"),
        (b"\0" * 64, "line 2 holds a NUL"),
        (rb'{"text": "t\u0000wo"}', "line 2 holds a NUL in text"),
        (rb'{"text": "t\ud800wo"}', "line 2 holds half a character in text"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"text": "' + b"x" * 200 + b'"}', "line 2 is longer than 100 bytes"),
    ],
)
def test_a_broken_record_has_file_and_line(
    line: bytes, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"xxx" in line:
        monkeypatch.setattr(documents, "LONGEST_BYTES", 100)
    assert part in refused_line(tmp_path, GOOD + line + b"\n" + GOOD)


def test_records_are_read_in_order_and_blank_lines_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = ["one", "zwei \u00fc", "three\nlines", ""]
    file.write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in texts) + "\n \n\n")
    assert [each["text"] for each in json_documents(str(file), "text")] == texts


def test_a_mark_of_utf_8_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", GOOD), ("b.txt", b"one")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert [each["text"] for each in json_documents(str(tmp_path / "a.jsonl"), "text")] == ["one"]
    assert [each["text"] for each in text_documents([str(tmp_path / "b.txt")])] == ["one"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo \u00fc\rthree\n".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    read = text_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert [each["text"] for each in read] == ["one\ntwo \u00fc\nthree\n", ""]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"one\ntwo\nth\xe9\n", "a.txt, line 3 is not UTF-8 text"),
        (b"one\ntw\0o\n", "a.txt, line 2 holds a NUL"),
        (b"x" * 101, "a.txt is one document of more than 100 bytes"),
    ],
)
def test_a_text_file_that_is_none(
    content: bytes, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(text_documents([str(tmp_path / "a.txt")]))
    assert part in str(caught.value)


def test_no_more_is_read_than_a_document_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file without a line end, which costs no disk here, must not be read into memory."""
    file = tmp_path / "a.jsonl"
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
    monkeypatch.setattr(documents, "LONGEST_BYTES", 2**20)
    with pytest.raises(ConfigError, match="line 1 is longer than"):
        list(json_documents(str(file), "text"))
    with pytest.raises(ConfigError, match="is one document of more than"):
        list(text_documents([str(file)]))
