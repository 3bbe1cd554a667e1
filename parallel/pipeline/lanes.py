"""Where work of each priority runs, and how its time is taken.

Decides three lanes: the student's critical path, the teacher behind it, and reductions beside both. On a CPU the plan's order
is the priority: one thread runs it, reductions have a thread of their own, and time is the clock's. On a GPU each lane
is a stream, the teacher's with the lowest priority, so that its kernels run where the student's leave the device free;
an action waits on the device for what another lane did before it (`dependencies` says what), and time is taken by events
on its stream. What no step waits for, files, is no lane: `parallel/background.py` has threads that yield to all of these.

Sources: CUDA C++ programming guide, "Stream priorities"; torch's notes on streams and `Tensor.record_stream`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import cache
from typing import Any

import torch

from parallel.pipeline.actions import RECVS, SENDS, TRAFFIC_OF, Action, Kind


class Lane(StrEnum):
    """A priority, highest first but for reductions, which only wait."""

    STUDENT = "student"
    TEACHER = "teacher"
    REDUCTIONS = "reductions"


def lane_of(kind: Kind) -> Lane:
    """Return the lane of a kind of action; messages run on the lane of what they carry."""
    if kind in SENDS or kind in RECVS:
        kind = TRAFFIC_OF[kind]
    if kind is Kind.K:
        return Lane.TEACHER
    return Lane.REDUCTIONS if kind in (Kind.REDUCE, Kind.NORM, Kind.GATHER) else Lane.STUDENT


class HostLanes:
    """The lanes of a CPU: order and threads do everything."""

    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        """Return the context in which work of the lane is issued."""
        return nullcontext()

    def begin(self) -> None:
        """Call before the first action of a list."""

    def wait_for(self, lane: Lane, needs: Iterable[Action]) -> None:
        """Let what follows on the lane wait for actions on other lanes."""

    def here(self) -> None:
        """Return this place of whatever is issued now, for `wait_until`."""

    def wait_until(self, lane: Lane | None, place: Any) -> None:
        """Let what follows on the lane, or outside all (None), wait for a place or a mark."""

    def done(self, action: Action, lane: Lane) -> None:
        """Note that all work of an action has been issued."""

    def mark(self) -> float:
        """Take the time at this place of the current lane."""
        return time.perf_counter()

    def seconds(self, marks: Iterable[float]) -> list[float]:
        """Return marks as `time.perf_counter` seconds."""
        return list(marks)

    def end(self, *, but: Lane | None) -> None:
        """Call after the last action of a list: what follows sees all its work, but that of one lane."""


class CudaLanes:
    """The lanes of a GPU: streams, and events between them.

    Args:
        device: the rank's.
        cuda: torch.cuda, or what stands for it in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device = cuda, device
        # Smaller is more urgent; 0 is the least.
        urgency = {Lane.STUDENT: -2, Lane.TEACHER: 0, Lane.REDUCTIONS: -1}
        self._streams = {lane: cuda.Stream(device, priority=value) for lane, value in urgency.items()}
        self._done: dict[Action, tuple[Lane, Any]] = {}

    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        """Return the context in which work of the lane is issued; it makes the lane's stream the current one."""
        return self._cuda.stream(self._streams[lane])

    def begin(self) -> None:
        """Let all lanes wait for what was issued outside, and set the clock."""
        outside = self._cuda.current_stream(self._device)
        for stream in self._streams.values():
            stream.wait_stream(outside)
        self._zero, self._zero_s = self._event(), time.perf_counter()

    def wait_for(self, lane: Lane, needs: Iterable[Action]) -> None:
        """Let what follows on the lane wait for actions on other lanes."""
        for need in needs:
            where, event = self._done.get(need, (lane, None))
            if where is not lane:
                self._streams[lane].wait_event(event)

    def here(self) -> Any:
        """Return this place of whatever is issued now, for `wait_until`."""
        event = self._cuda.Event()
        event.record()
        return event

    def wait_until(self, lane: Lane | None, place: Any) -> None:
        """Let what follows on the lane, or outside all (None), wait for a place or a mark."""
        stream = self._cuda.current_stream(self._device) if lane is None else self._streams[lane]
        stream.wait_event(place)

    def done(self, action: Action, lane: Lane) -> None:
        """Note that all work of an action has been issued; call it on the lane that it ran on."""
        self._done[action] = lane, self.here()

    def mark(self) -> Any:
        """Take the time at this place of the current lane."""
        return self._event()

    def seconds(self, marks: Iterable[Any]) -> list[float]:
        """Return marks as `time.perf_counter` seconds; waits until the device has come to them."""
        marks = list(marks)
        for mark in marks:
            mark.synchronize()
        return [self._zero_s + self._zero.elapsed_time(mark) / 1e3 for mark in marks]

    def end(self, *, but: Lane | None) -> None:
        """Let what follows outside wait for all lanes but one; what other steps need of these is then there."""
        outside = self._cuda.current_stream(self._device)
        for lane, stream in self._streams.items():
            if lane is not but:
                outside.wait_stream(stream)
        self._done.clear()

    def _event(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event


@cache
def lanes_of(device: torch.device) -> HostLanes | CudaLanes:
    """Return the lanes of a device, the same ones for everyone.

    Streams are few, and given out again when there are no more, so that work that must not wait could come behind what waits; and
    each has its own part of the device's cached memory.
    """
    return CudaLanes(device) if device.type == "cuda" else HostLanes()
