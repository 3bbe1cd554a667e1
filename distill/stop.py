"""The wish to end a run early, as the training loop sees it.

Decides: a request is a flag that is read between steps; what must not be lost if the process is ended in spite of it
is registered here and called once. Knows no operating-system signals; `launch/signals.py` turns them into requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stop:
    """A flag that may be set from another thread, and the last calls of a run that does not get to its end.

    Each rank sees its own flag, and signals reach the ranks at different times: the loop must agree over all ranks
    before it acts on it.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._last_calls: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        """Whether the run should end after the step under way."""
        return self._requested.is_set()

    def request(self) -> None:
        """Ask the run to end after the step under way."""
        self._requested.set()

    def call_before_kill(self, call: Callable[[], None]) -> None:
        """Register a call that saves what is buffered; it may run in another thread, while a step is stuck."""
        self._last_calls.append(call)

    def save_buffers(self) -> None:
        """Run the registered calls, each at most once."""
        while self._last_calls:
            self._last_calls.pop()()
