"""Make a cache entry appear, and a folder disappear, whole or not at all.

Decides: an entry is written in a temporary folder beside its place and moved there when it is finished. Assumes that two
writers of one place write the same thing, so that whoever is first wins. Does not wait for another writer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def build_once(target: Path, write: Callable[[Path], None]) -> None:
    """Make the file or folder `target` with `write`, unless another process makes it first.

    Args:
        target: must not exist yet; its parent is created.
        write: makes the file or folder at the path that it is given; what it raises leaves no trace behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        write(workspace / target.name)
        try:
            os.replace(workspace / target.name, target)
        except OSError:
            # A folder cannot be moved onto one that is not empty: another process finished the same one meanwhile.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder, which another process may be removing too."""
    workspace = Path(tempfile.mkdtemp(prefix=".removing-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, workspace / folder.name)
    shutil.rmtree(workspace, ignore_errors=True)
