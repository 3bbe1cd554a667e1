"""The lanes: what waits for what on a GPU, told by a double of torch.cuda that writes everything down."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from parallel.pipeline.actions import Kind, parse
from parallel.pipeline.lanes import CudaLanes, HostLanes, Lane, lane_of, lanes_of

DEVICE = torch.device("cuda", 0)


class DoubleOfCuda:
    """Streams that count what was issued on them; an event is a place of a stream. Each thread has its current one."""

    def __init__(self) -> None:
        self.outside = SimpleNamespace(name="outside", issued=0, waits=[], priority=None)
        self.outside.wait_event = lambda event: self.outside.waits.append(event.place)
        self.outside.wait_stream = lambda other: self.outside.waits.append((id(other), other.issued))
        self._local = threading.local()
        self.streams: list[SimpleNamespace] = []
        self.synchronized: list[object] = []

    @property
    def current(self) -> SimpleNamespace:
        return getattr(self._local, "current", self.outside)

    def Stream(self, device: torch.device, priority: int) -> SimpleNamespace:
        stream = SimpleNamespace(issued=0, waits=[], priority=priority)
        stream.wait_event = lambda event: stream.waits.append(event.place)
        stream.wait_stream = lambda other: stream.waits.append((id(other), other.issued))
        self.streams.append(stream)
        return stream

    def Event(self, enable_timing: bool = False) -> SimpleNamespace:
        event = SimpleNamespace(place=None, timing=enable_timing)

        def record() -> None:
            event.place = (id(self.current), self.current.issued)

        event.record = record
        event.synchronize = lambda: self.synchronized.append(event.place)
        event.elapsed_time = lambda other: 1000.0 * (other.place[1] - event.place[1])
        return event

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self._local.current = self.current, stream
        yield
        self._local.current = before

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return self.current


def _lanes() -> tuple[CudaLanes, DoubleOfCuda, dict[Lane, SimpleNamespace]]:
    cuda = DoubleOfCuda()
    lanes = CudaLanes(DEVICE, cuda)
    return lanes, cuda, dict(zip((Lane.STUDENT, Lane.TEACHER, Lane.REDUCTIONS), cuda.streams, strict=True))


def _run(lanes: CudaLanes, cuda: DoubleOfCuda, text: str, *needs: str) -> None:
    """Issue an action of one kernel, as the executor does."""
    action = parse(text)
    lane = lane_of(action.kind)
    with lanes.on(lane):
        lanes.wait_for(lane, map(parse, needs))
        cuda.current.issued += 1
        lanes.done(action, lane_of(action.kind))


def test_each_kind_has_its_lane_and_messages_that_of_what_they_carry() -> None:
    assert {kind: lane_of(kind) for kind in (Kind.K, Kind.SEND_K, Kind.RECV_K)} == dict.fromkeys(
        (Kind.K, Kind.SEND_K, Kind.RECV_K), Lane.TEACHER
    )
    assert {lane_of(kind) for kind in (Kind.REDUCE, Kind.NORM, Kind.GATHER)} == {Lane.REDUCTIONS}
    rest = set(Kind) - {Kind.K, Kind.SEND_K, Kind.RECV_K, Kind.REDUCE, Kind.NORM, Kind.GATHER}
    assert {lane_of(kind) for kind in rest} == {Lane.STUDENT}
    assert isinstance(lanes_of(torch.device("cpu")), HostLanes)


def test_the_student_comes_first_and_the_teacher_last() -> None:
    _, _, streams = _lanes()
    student, teacher, reductions = (streams[lane].priority for lane in Lane)
    assert student < reductions < teacher == 0, "smaller is more urgent"


def test_lanes_wait_for_each_other_only_where_an_action_needs_it() -> None:
    lanes, cuda, streams = _lanes()
    student, teacher, reductions = (streams[lane] for lane in Lane)
    cuda.outside.issued = 7
    lanes.begin()
    assert all(stream.waits == [(id(cuda.outside), 7)] for stream in cuda.streams)
    _run(lanes, cuda, "1F0")
    _run(lanes, cuda, "1K0")
    _run(lanes, cuda, "1K1", "1RECV_K1")
    assert all(len(stream.waits) == 1 for stream in cuda.streams)
    _run(lanes, cuda, "1B0", "1F0", "1K0")
    assert student.waits[1:] == [(id(teacher), 1)], "for the signal, not for the teacher's later work"
    _run(lanes, cuda, "1W0", "1B0")
    _run(lanes, cuda, "1REDUCE", "1W0")
    assert reductions.waits[1:] == [(id(student), 3)]
    _run(lanes, cuda, "1NORM", "1REDUCE", "0REDUCE")
    _run(lanes, cuda, "1STEP", "1NORM")
    assert student.waits[2:] == [(id(reductions), 2)]
    lanes.end(but=None)
    assert cuda.outside.waits == [(id(stream), stream.issued) for stream in cuda.streams]


def test_a_gather_that_is_carried_holds_up_only_who_waits_for_it() -> None:
    lanes, cuda, streams = _lanes()
    lanes.begin()
    _run(lanes, cuda, "1STEP")
    with lanes.on(Lane.REDUCTIONS):
        lanes.wait_for(Lane.REDUCTIONS, [parse("1STEP")])
        cuda.current.issued += 1
        end = lanes.mark()
    lanes.end(but=Lane.REDUCTIONS)
    student, teacher, reductions = (streams[lane] for lane in Lane)
    assert cuda.outside.waits == [(id(student), 1), (id(teacher), 0)]
    lanes.begin()
    _run(lanes, cuda, "1K1")
    assert (id(reductions), 1) not in student.waits + teacher.waits
    lanes.wait_until(Lane.STUDENT, end)
    assert student.waits[-1] == (id(reductions), 1)
    lanes.wait_until(None, end)
    assert cuda.outside.waits[-1] == (id(reductions), 1)


def test_work_beside_waits_for_the_place_where_it_was_given() -> None:
    lanes, cuda, streams = _lanes()
    with lanes.on(Lane.STUDENT):
        cuda.current.issued = 5
        place = lanes.here()
        cuda.current.issued = 9
    lanes.wait_until(Lane.REDUCTIONS, place)
    assert streams[Lane.REDUCTIONS].waits == [(id(streams[Lane.STUDENT]), 5)]


def test_times_are_taken_on_the_lane_and_read_after_the_device_is_done() -> None:
    lanes, cuda, _ = _lanes()
    lanes.begin()
    with lanes.on(Lane.TEACHER):
        cuda.current.issued = 3
        mark = lanes.mark()
        assert mark.timing
    (zero_s,) = lanes.seconds([lanes._zero])
    assert cuda.synchronized == [lanes._zero.place], "not for what comes after the marks"
    assert lanes.seconds([mark])[0] - zero_s == pytest.approx(3.0)


def test_on_a_cpu_the_clock_is_the_clock() -> None:
    lanes = HostLanes()
    with lanes.on(Lane.TEACHER):
        marks = [lanes.mark(), lanes.mark()]
    assert lanes.seconds(marks) == marks == sorted(marks)
