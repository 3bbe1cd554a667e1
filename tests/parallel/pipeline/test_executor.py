"""The executor: the plan's order, one event each, what runs beside the list, and what a missing or failing handler says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from parallel.mesh import Mesh
from parallel.pipeline.actions import Action, Kind, Plan, Shape, parse
from parallel.pipeline.executor import ActionFailed, Executor
from parallel.pipeline.lanes import CudaLanes
from parallel.pipeline.p2p import Links
from parallel.pipeline.simulate import Event
from tests.parallel.pipeline.test_lanes import DoubleOfCuda

PLACE = "rank 3 (pp 1, dp 0, tp 1)"
TEXTS = ("1F0", "1B0", "1W0", "1REDUCE", "1K1", "1NORM", "1STEP", "1GATHER")
ACTIONS = [parse(text) for text in TEXTS]
BESIDE = {Kind.REDUCE, Kind.NORM, Kind.GATHER}


def _plan(actions: Sequence[Action]) -> Plan:
    """Return the plan in which rank 1 of two has these actions."""
    return Plan(Shape(2, 2, 1, 1), "1f1b", "fill", ((), tuple(actions)))


def _run(
    actions: Sequence[Action], handlers: Mapping[Kind, Callable[[Action], None]], first_microbatch: int = 0
) -> list[Event]:
    """Run a list as that of rank 1 of two."""
    executor = Executor(handlers, Links(Mesh.single(), {}), rank=1, place=PLACE)
    try:
        return executor.run(_plan(actions), first_microbatch=first_microbatch)
    finally:
        executor.close()


def _all(handle: Callable[[Action], None]) -> dict[Kind, Callable[[Action], None]]:
    return dict.fromkeys((action.kind for action in ACTIONS), handle)


def test_actions_run_in_order_and_each_is_timed() -> None:
    ran: list[Action] = []

    def handle(action: Action) -> None:
        if action.kind not in BESIDE:
            ran.append(action)
        time.sleep(0.002 if action.kind is Kind.F else 0)

    before_s = time.perf_counter()
    events = _run(ACTIONS, _all(handle))
    after_s = time.perf_counter()
    in_turn = [action for action in ACTIONS if action.kind not in BESIDE]
    assert ran == in_turn == [event.action for event in events if event.action.kind not in BESIDE]
    assert sorted(map(str, ACTIONS)) == sorted(str(event.action) for event in events)
    assert {event.rank for event in events} == {1}
    times_s = [each for e in events if e.action.kind not in BESIDE for each in (e.start_s, e.end_s)]
    assert [before_s, *times_s, after_s] == sorted([before_s, *times_s, after_s])
    assert events[0].end_s - events[0].start_s >= 0.002
    assert _run([], {}) == []


def test_handlers_see_the_number_in_the_run_and_events_that_of_the_plan() -> None:
    seen: list[str] = []
    events = _run([parse("1K1"), parse("1F0"), parse("1STEP")], _all(lambda a: seen.append(str(a))), 40)
    assert seen == ["1K41", "1F40", "1STEP"]
    assert [str(event.action) for event in events] == ["1K1", "1F0", "1STEP"]


def test_reductions_run_beside_the_list_in_their_order_and_the_step_waits() -> None:
    order: list[str] = []
    started = threading.Event()

    def handle(action: Action) -> None:
        if action.kind is Kind.REDUCE:
            assert started.wait(5), "the list must go on beside it"
            assert threading.current_thread() is not threading.main_thread()
        if action.kind is Kind.K:
            started.set()
        if action.kind is Kind.NORM:
            time.sleep(0.05)
        order.append(str(action))

    _run(ACTIONS, _all(handle))
    assert order[:3] == list(TEXTS[:3]) and order[-3:] == ["1NORM", "1STEP", "1GATHER"]
    assert order.index("1K1") < order.index("1REDUCE") < order.index("1NORM")


def test_the_next_forward_waits_for_a_gather_that_is_carried_and_the_teacher_does_not() -> None:
    order: list[str] = []
    teacher_ran = threading.Event()

    def handle(action: Action) -> None:
        if action.kind is Kind.GATHER and action.stage == 1:
            assert teacher_ran.wait(5), "the next list must begin beside it"
        order.append(str(action))
        if str(action) == "1K3":
            teacher_ran.set()

    first, second = (
        _plan([parse(text) for text in texts])
        for texts in (("1F0", "1STEP", "1GATHER"), ("1K1", "1F0", "1STEP"))
    )
    executor = Executor(_all(handle), Links(Mesh.single(), {}), rank=1, place=PLACE)
    try:
        events = executor.run(first, first_microbatch=0, carries=True)
        assert [str(event.action) for event in events] == ["1F0", "1STEP"]
        events = executor.run(second, first_microbatch=2)
    finally:
        executor.close()
    assert order == ["1F0", "1STEP", "1K3", "1GATHER", "1F2", "1STEP"]
    assert sorted(str(event.action) for event in events) == ["1F0", "1GATHER", "1K1", "1STEP"]


def test_on_a_gpu_a_gather_that_begins_late_still_waits_for_the_step() -> None:
    cuda = DoubleOfCuda()

    def handle(action: Action) -> None:
        cuda.current.issued += 1

    plan = _plan([parse(text) for text in ("1F0", "1STEP", "1GATHER")])
    executor = Executor(_all(handle), Links(Mesh.single(), {}), rank=1, place=PLACE)
    executor._lanes = CudaLanes(torch.device("cuda", 0), cuda)
    student, _, reductions = cuda.streams
    release = threading.Event()
    try:
        executor.beside(lambda: release.wait(5))
        executor.run(plan, first_microbatch=0, carries=True)
        assert id(reductions) not in [stream for stream, _ in cuda.outside.waits], "nothing is held up yet"
        release.set()
        executor.settle()
    finally:
        executor.close()
    assert (id(student), 2) in reductions.waits and reductions.issued == 1
    assert cuda.outside.waits[-1] == (id(reductions), 1)


@pytest.mark.parametrize("in_order", [True, False])
def test_in_order_what_an_action_looks_at_beside_its_needs_is_there(in_order: bool) -> None:
    """Both models' hidden states are looked at in the student's forward, which needs nothing of the teacher's."""
    cuda = DoubleOfCuda()
    streams: dict[str, int] = {}

    def handle(action: Action) -> None:
        cuda.current.issued += 1
        streams[str(action)] = id(cuda.current)

    executor = Executor(_all(handle), Links(Mesh.single(), {}), rank=1, place=PLACE, in_order=in_order)
    executor._lanes = CudaLanes(torch.device("cuda", 0), cuda)
    try:
        executor.run(_plan([parse(text) for text in ("1K0", "1F0")]), first_microbatch=0)
    finally:
        executor.close()
    assert (streams["1K0"] == streams["1F0"]) is in_order


def test_who_waits_for_what_runs_beside_says_so() -> None:
    mesh = Mesh.single()
    executor = Executor({}, Links(mesh, {}), rank=1, place=PLACE)
    release = threading.Event()
    seen: list[float] = []

    def look() -> None:
        while mesh.activity.waited_s(time.monotonic()) == 0.0:
            time.sleep(0.001)
        seen.append(mesh.activity.waited_s(time.monotonic()))
        release.set()

    watch = threading.Thread(target=look, daemon=True)
    try:
        count = executor.beside(lambda: release.wait(10) and 7)
        watch.start()
        assert executor.result(count, "the token count") == 7 and len(seen) == 1
        assert executor.result(count, "the token count") == 7
    finally:
        executor.close()


def test_settling_waits_for_a_gather_and_tells_its_failure() -> None:
    done: list[Action] = []

    def slow(action: Action) -> None:
        if action.kind is Kind.GATHER:
            time.sleep(0.05)
            if action.microbatch is None and len(done) > 4:
                raise ConnectionError("peer gone")
        done.append(action)

    plan = _plan([parse(text) for text in ("1F0", "1STEP", "1GATHER")])
    executor = Executor(_all(slow), Links(Mesh.single(), {}), rank=1, place=PLACE)
    try:
        executor.settle()
        executor.run(plan, first_microbatch=0, carries=True)
        assert len(done) == 2
        executor.settle()
        assert done[-1].kind is Kind.GATHER
        executor.run(plan, first_microbatch=2, carries=True)
        with pytest.raises(ActionFailed, match=r"failed at 1GATHER: ConnectionError: peer gone"):
            executor.settle()
    finally:
        executor.close()


def test_a_failure_beside_the_list_is_told_at_the_step() -> None:
    ran: list[Kind] = []

    def handle(action: Action) -> None:
        if action.kind is Kind.REDUCE:
            raise ConnectionError("peer gone")
        ran.append(action.kind)

    with pytest.raises(ActionFailed, match=r"failed at 1REDUCE: ConnectionError: peer gone"):
        _run(ACTIONS, _all(handle))
    assert Kind.STEP not in ran


def test_a_kind_without_a_handler_is_refused_before_anything_runs() -> None:
    ran: list[Action] = []
    with pytest.raises(ValueError, match=r"^no handler for GATHER, W$"):
        _run(ACTIONS, {kind: ran.append for kind in _all(ran.append).keys() - {Kind.W, Kind.GATHER}})
    assert not ran


def test_a_failure_names_the_place_the_action_and_the_cause() -> None:
    ran: list[Action] = []

    def handle(action: Action) -> None:
        if action.kind is Kind.B:
            raise KeyError("nothing in the box")
        ran.append(action)

    with pytest.raises(ActionFailed) as caught:
        _run(ACTIONS, _all(handle))
    assert str(caught.value) == f"{PLACE} failed at 1B0: KeyError: 'nothing in the box'"
    assert isinstance(caught.value.__cause__, KeyError)
    assert ran == ACTIONS[:1], "nothing runs after a failure"


def test_an_interrupt_is_no_failure_of_an_action() -> None:
    def handle(action: Action) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(ACTIONS, _all(handle))
