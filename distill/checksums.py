"""Sums of the files of a cache folder, so that one that was cut short or changed is noticed and made again.

Decides: BLAKE2 over the whole content, read once each time the folder is opened (about a second a gigabyte, less than reading the
text that it was made from). Assumes that what is in a cache can be made again; the sums guard against damage, not against
someone who writes both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.atomic import remove_whole

_SUMS = "sums.json"


def write_sums(folder: Path) -> None:
    """Write down the sums of all files that are in a folder."""
    sums = {file.name: _sum(file) for file in sorted(folder.iterdir())}
    (folder / _SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def drop_if_damaged(folder: Path, then: str) -> None:
    """Remove a folder whose files are not those that were written, and say so; one that is not there is left alone.

    Args:
        then: what happens next, for the line.
    """
    if not folder.is_dir():
        return
    fault = _fault(folder)
    if fault is not None:
        print(f"{folder} is broken ({fault}); {then}", flush=True)
        remove_whole(folder)


def _fault(folder: Path) -> str | None:
    """Return what is wrong with a folder, or None."""
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _sum(folder / Path(name).name) != expected:
                return f"{name} has another content than was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()[:32]
