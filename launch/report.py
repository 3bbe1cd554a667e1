"""What a command prints at its end: tables of numbers, and where the files are.

Decides the look. Assumes the summary of a run as `summary.json` holds it, with the rows under `table`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FILES = (
    ("student", "student"),
    ("curve", "curve.svg"),
    ("timeline", "timeline.svg"),
    ("numbers", "summary.json"),
    ("every step", "metrics.jsonl"),
)


def run_report(summary: Mapping[str, Any], folder: Path) -> str:
    """Return the result table of a run and the places of its files that are there."""
    lines = [judged_table(summary["table"]), ""] if summary.get("table") else []
    lines += [f"{name + ':':<12}{folder / file}" for name, file in _FILES if (folder / file).exists()]
    return "\n".join(lines)


def judged_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of judged models: a column for all that any was judged by, but standard errors and parts of the text."""
    hidden = ("_stderr", "entropy_")
    names = dict.fromkeys(name for row in rows for name in row if not any(word in name for word in hidden))
    return table([{name: row.get(name) for name in names} for row in rows])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as a table that also reads as Markdown; numbers to the right."""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    right = [all(_is_number(row[name]) for row in rows) for name in names]
    widths = [max(3, len(name), *(len(line[column]) for line in cells)) for column, name in enumerate(names)]

    def line(words: Sequence[str]) -> str:
        padded = [
            word.rjust(width) if is_right else word.ljust(width)
            for word, width, is_right in zip(words, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if is_right else "-" * width
        for width, is_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(names), line(rule), *(line(words) for words in cells)])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
