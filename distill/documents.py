"""Read the documents of text and JSONL files one by one; a fault has a file and a line.

Decides what is no text: bytes that are not UTF-8, a NUL (a file that a crash or a copy has left with holes), half a character, a
record that is no JSON object or lacks the text, a document longer than `LONGEST_BYTES` (which is read no further). Holds one
document at a time. Knows nothing of `datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from distill.config import ConfigError

LONGEST_BYTES = 2**30
"""A document is held in memory several times over: as bytes, as text, as tokens."""


def text_documents(files: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the text of each file as one document, line ends as line feeds.

    Raises:
        ConfigError: a file that cannot be read, is too long, or holds no text.
    """
    for file in files:
        with open(file, "rb") as source:
            content = source.read(LONGEST_BYTES + 1)
        if len(content) > LONGEST_BYTES:
            raise ConfigError(
                f"data.path: {file} is one document of more than {LONGEST_BYTES} bytes, too long to be held in memory; cut it, "
                "as into the lines of a JSONL file"
            )
        text = _decoded(content, file, first_line=1)
        yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def json_documents(file: str, field: str) -> Iterator[dict[str, str]]:
    """Yield the text of each record of a JSONL file; blank lines are passed over.

    Args:
        field: the record's member that holds the text.
    Raises:
        ConfigError: the first line that is no such record.
    """
    with open(file, "rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_BYTES + 1):
            number += 1
            place = f"{file}, line {number}"
            if len(line) > LONGEST_BYTES:
                raise ConfigError(
                    f"data.path: {place} is longer than {LONGEST_BYTES} bytes, too long to be held in memory; cut the document"
                )
            if line.strip():
                yield {
                    "text": _text_of(_record(_decoded(line, file, first_line=number), place), field, place)
                }


def _decoded(content: bytes, file: str, *, first_line: int) -> str:
    """Return bytes as text, or say in which line they are none."""
    try:
        fault, reason = content.find(b"\0"), "holds a NUL, so it is not text or a part of it was lost"
        # Some editors begin a file with a mark that says so.
        text = content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        fault, reason, text = error.start, f"is not UTF-8 text ({error.reason})", ""
    if fault >= 0:
        line = first_line + content.count(b"\n", 0, fault)
        raise ConfigError(f"data.path: {file}, line {line} {reason}; mend or leave out the file")
    return text


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'data.path: {place} is not JSON ({error}); a line is {{"text": "..."}}') from error
    if not isinstance(record, dict):
        raise ConfigError(f"data.path: {place} is a {type(record).__name__}, not an object")
    return record


def _text_of(record: dict[str, Any], field: str, place: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())
        raise ConfigError(f"data.text_field={field} is no string in {place}; the fields there: {fields}")
    if "\0" in text:
        raise ConfigError(f"data.path: {place} holds a NUL in {field}; mend or leave out the record")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"data.path: {place} holds half a character in {field} ({error.reason}); mend or leave out the record"
        ) from error
    return text
