"""Whether what a command is to write can be written, asked before the work whose result it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distill.config import ConfigError


def check_writable(key: str, folder: str | Path) -> None:
    """Check that a folder is there, or can be made, and may be written.

    Raises:
        ConfigError: it cannot, as far as can be seen without trying.
    """
    place = Path(folder).absolute()
    try:
        there = next(parent for parent in (place, *place.parents) if parent.exists())
    except OSError as error:
        raise ConfigError(
            f"{key}={folder} cannot be reached ({error.strerror}); use another folder"
        ) from error
    if not there.is_dir():
        what = "is" if there == place else f"cannot be made: {there} is"
        raise ConfigError(f"{key}={folder} {what} a file; use a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}={folder} cannot be written: {there} is not yours to write; use another folder"
        )


def writable_file(key: str, value: Any) -> Path | None:
    """Return the path of a file that, as far as can be seen now, can be written later; None for None.

    Raises:
        ConfigError: it cannot.
    """
    if value is None:
        return None
    path = Path(str(value)).expanduser()
    if path.is_dir():
        raise ConfigError(f"{key}={value} is a folder; use a file")
    if not path.parent.is_dir():
        raise ConfigError(
            f"{key}={value} cannot be written: {path.parent} is no folder; use one that is there"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{key}={value} cannot be written: it is not yours to write; use another file")
    return path
