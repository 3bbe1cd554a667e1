"""CPU seconds as a quiet core takes them, so that a limit in seconds also holds on a machine that is slow right now.

Decides the measure: a loop of pure Python before and after the work, which takes `_QUIET_S` on the quiet cores that the
limits were written for; a loaded host (a core shared with others, a lower clock) slows both alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_QUIET_S = 0.020
_ROUNDS = 3


def quiet_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds that `work` takes of a quiet core, the least of three times, and its result."""
    # A host that gives a core to others for a moment slows one measurement, not the pure Python before and after it.
    return min((_once(work) for _ in range(3)), key=lambda each: each[0])


def _once(work: Callable[[], T]) -> tuple[float, T]:
    before = slowness(time.process_time)
    start_s = time.process_time()
    result = work()
    work_s = time.process_time() - start_s
    return work_s / ((before + slowness(time.process_time)) / 2), result


def slowness(clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how many times longer than on a quiet core pure Python takes now, by a clock; 1 at least."""
    start_s = clock()
    slots: dict[int, int] = {}
    for number in range(_ROUNDS * 200_000):
        slots[number & 1023] = number
    return max(1.0, (clock() - start_s) / _ROUNDS / _QUIET_S)
