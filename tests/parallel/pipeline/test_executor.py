"""The executor: the plan's order, one event each, and what a missing or failing handler says."""

from __future__ import annotations

import time

import pytest

from parallel.pipeline.actions import Action, Kind, parse
from parallel.pipeline.executor import ActionFailed, execute

PLACE = "rank 3 (pp 1, dp 0, tp 1)"
ACTIONS = [parse(text) for text in ("1RECV_F0", "1F0", "1B0", "1W0", "1SEND_B0", "1REDUCE")]


def test_actions_run_in_order_and_each_is_timed() -> None:
    ran: list[Action] = []

    def handle(action: Action) -> None:
        ran.append(action)
        time.sleep(0.002 if action.kind is Kind.F else 0)

    before_s = time.perf_counter()
    events = execute(ACTIONS, {action.kind: handle for action in ACTIONS}, rank=1, place=PLACE)
    after_s = time.perf_counter()
    assert ran == [event.action for event in events] == ACTIONS
    assert {event.rank for event in events} == {1}
    times_s = [time_s for event in events for time_s in (event.start_s, event.end_s)]
    assert [before_s, *times_s, after_s] == sorted([before_s, *times_s, after_s])
    assert events[1].end_s - events[1].start_s >= 0.002
    assert execute([], {}, rank=0, place=PLACE) == []


def test_each_kind_has_its_own_handler() -> None:
    seen: dict[str, list[str]] = {"F": [], "K": []}
    handlers = {kind: lambda action, kind=kind: seen[kind].append(str(action)) for kind in (Kind.F, Kind.K)}
    execute([parse("0K0.0"), parse("0F0"), parse("0K0.1")], handlers, rank=0, place=PLACE)
    assert seen == {"F": ["0F0"], "K": ["0K0.0", "0K0.1"]}


def test_a_kind_without_a_handler_is_refused_before_anything_runs() -> None:
    ran: list[Action] = []
    handlers = {kind: ran.append for kind in (Kind.RECV_F, Kind.F, Kind.B, Kind.SEND_B)}
    with pytest.raises(ValueError, match=r"^no handler for REDUCE, W$"):
        execute(ACTIONS, handlers, rank=1, place=PLACE)
    assert not ran


def test_a_failure_names_the_place_the_action_and_the_cause() -> None:
    ran: list[Action] = []

    def handle(action: Action) -> None:
        if action.kind is Kind.B:
            raise KeyError("nothing in the box")
        ran.append(action)

    with pytest.raises(ActionFailed) as caught:
        execute(ACTIONS, {action.kind: handle for action in ACTIONS}, rank=1, place=PLACE)
    assert str(caught.value) == f"{PLACE} failed at 1B0: KeyError: 'nothing in the box'"
    assert isinstance(caught.value.__cause__, KeyError)
    assert ran == ACTIONS[:2], "nothing runs after a failure"


def test_an_interrupt_is_no_failure_of_an_action() -> None:
    def handle(action: Action) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(ACTIONS, {action.kind: handle for action in ACTIONS}, rank=1, place=PLACE)
