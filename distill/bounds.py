"""What a value must be whatever its key means: a number that can be counted with, a text that can be a name.

Decides limits that no run comes near and that keep a slip (`1e300`, a million digits, an empty name, a control character) from
getting as far as a library that fails on it in words of its own; and the limits of the few keys that have others. Keys that
are added later are covered by their values' types. Needs no torch.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.config import ConfigError
from distill.convert import show

_MOST_WHOLE, _MOST, _LEAST = 10**15, 1e30, 1e-30
"""Largest whole number, largest fraction, and smallest one that is not 0."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "data.seq_len": (8, 2**24),
    "student.prune.candidates": (1, 1000),
    "train.timeout_s": (0.1, 1e7),
    "log.health_port": (0, 65535),
    "log.health_limit_s": (0.1, 1e9),
}
_LONGEST, _LONGEST_NAME_BYTES = 1000, 255
"""Characters of a text; bytes of a part of it between slashes, as file systems have it."""
_FREE = ("evaluate.choices_template",)
"""Texts that are no names."""
_PROJECT_LETTERS = "/\\#?%:"
"""What wandb does not take in a project's name."""
_AS_TYPED = ("run.dir", "data.cache_dir", "checkpoint.resume", "evaluate.out")
"""Paths that are taken as they are; those that are read may begin with ~."""


def check_bounds(flat: Mapping[str, Any]) -> None:
    """Check every value by itself.

    Args:
        flat: dotted key -> value of the right type; lists and schedules are values.
    Raises:
        ConfigError: the first mistake found.
    """
    for key, value in flat.items():
        for part in _parts(value):
            if isinstance(part, str):
                _check_text(key, part)
            elif isinstance(part, int | float) and not isinstance(part, bool):
                _check_number(key, value, part)
    project = flat["log.wandb_project"]
    if any(letter in project for letter in _PROJECT_LETTERS) or len(project) > 128:
        raise ConfigError(
            f"log.wandb_project={project} is no name for wandb; use at most 128 letters without any of {_PROJECT_LETTERS}"
        )


def _parts(value: Any) -> Iterator[Any]:
    """Yield the plain values in a value."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from (name, *_parts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield value


def _check_number(key: str, value: Any, number: float) -> None:
    most: float = _MOST_WHOLE if isinstance(number, int) else _MOST
    least = -most
    if key in _RANGES:
        least, most = _RANGES[key]
    if not number >= least:
        raise ConfigError(f"{key}={show(value)} is too small; use at least {least:g}")
    if not number <= most:
        raise ConfigError(f"{key}={show(value)} is too large; use at most {most:g}")
    if 0 < abs(number) < _LEAST:
        raise ConfigError(f"{key}={show(value)} is too near to 0; use 0, or at least {_LEAST:g}")


def _check_text(key: str, text: str) -> None:
    if not text.strip():
        raise ConfigError(f"{key}={show(text)} is empty; use a name, or leave the key out")
    kinds = {unicodedata.category(letter) for letter in text}
    if "Cs" in kinds or (kinds & {"Cc", "Zl", "Zp"} and key not in _FREE):
        raise ConfigError(f"{key}={show(text)} holds a character that no name has; use plain text in UTF-8")
    if len(text) > _LONGEST and key not in _FREE:
        raise ConfigError(f"{key}={show(text)} has {len(text)} characters; use at most {_LONGEST}")
    if any(len(part.encode()) > _LONGEST_NAME_BYTES for part in text.split("/")) and key not in _FREE:
        raise ConfigError(
            f"{key}={show(text)} is too long for a name; use at most {_LONGEST_NAME_BYTES} bytes"
        )
    if text.startswith("~"):
        _check_home(key, text)


def _check_home(key: str, text: str) -> None:
    try:
        written_out = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={text} begins with the home of nobody here; write the path out") from error
    if key in _AS_TYPED and str(written_out) != text:
        raise ConfigError(f"{key}={text} begins with ~, which is not replaced here; use {written_out}")
