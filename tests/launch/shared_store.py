"""A store for ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SharedStore:
    """What `launch.board.Store` asks for, in memory."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._checks = 0
        self._planned: dict[int, Callable[[], object]] = {}
        self.is_lost = False
        """Makes every call fail, as when the launcher's machine is gone."""

    def before_check(self, number: int, do: Callable[[], object]) -> None:
        """Do something before the n-th `check`, counted from 1."""
        self._planned[number] = do

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._reach()
        with self._lock:
            self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        """Return a key's value."""
        self._reach()
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        """Add to a number; return the sum."""
        self._reach()
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        self._reach()
        self._checks += 1
        self._planned.pop(self._checks, lambda: None)()
        return all(key in self._values for key in keys)

    def _reach(self) -> None:
        if self.is_lost:
            raise RuntimeError("Connection reset by peer")
