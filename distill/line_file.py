"""A JSON lines file that is written line by line and outlives a full disk.

Decides: a line that cannot be written waits for the next one, and half of a line is taken back, so that what is on the disk is
always whole lines in order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class LineFile:
    """A file to append lines to; `close` it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line, after those that still wait.

        Raises:
            OSError: it waits now as well.
        """
        self._waiting += (json.dumps(values) + "\n").encode()
        self.catch_up()

    def catch_up(self) -> None:
        """Append what waits.

        Raises:
            OSError: it still waits.
        """
        left = memoryview(self._waiting)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(self._waiting)
        self._waiting = b""

    def close(self) -> None:
        """Append what waits, and close the file.

        Raises:
            OSError: the last lines cannot be written.
        """
        try:
            self.catch_up()
        finally:
            self._file.close()
