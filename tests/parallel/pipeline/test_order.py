from __future__ import annotations

import pytest

from parallel.pipeline.actions import Plan, PlanError, Shape, parse
from parallel.pipeline.order import walk
from parallel.pipeline.schedules import make_plan


def forward_plan(*ranks: str, num_microbatches: int = 1, carried: str = "") -> Plan:
    lists = tuple(tuple(map(parse, line.split())) for line in ranks)
    shape = Shape(len(ranks), len(ranks), num_microbatches, num_slices=1)
    return Plan(shape, "forward", "fill", lists, frozenset(map(parse, carried.split())))


def test_every_action_comes_once_and_after_what_it_needs() -> None:
    plan = make_plan(schedule="1f1b", teacher="batch", num_ranks=3, num_microbatches=4)
    walked = [action for _, _, action in walk(plan)]
    assert sorted(walked) == sorted(action for actions in plan.ranks for action in actions)
    places = {action: place for place, action in enumerate(walked)}
    assert (
        places[parse("0F3")]
        < places[parse("1F3")]
        < places[parse("2F3")]
        < places[parse("2B3")]
        < places[parse("0B3")]
    )


def test_carried_actions_count_as_done() -> None:
    assert [str(action) for _, _, action in walk(forward_plan("", "1K0", carried="0K0"))] == ["1K0"]


def test_a_carried_message_can_be_received() -> None:
    plan = forward_plan("0F0 0SEND_F0", "1RECV_K0 1K0 1RECV_F0 1F0", carried="0K0")
    assert len(list(walk(plan))) == 6


def test_the_error_names_who_waits_for_whom() -> None:
    plan = forward_plan("0RECV_B0 0F0 0SEND_F0", "1RECV_F0 1F0 1SEND_B0")
    with pytest.raises(PlanError) as error:
        list(walk(plan))
    first_line = str(error.value).splitlines()[0]
    assert first_line == (
        "rank 0 waits at 0RECV_B0 for 1SEND_B0 of rank 1, which waits at 1RECV_F0 for 0SEND_F0 of rank 0, "
        "which waits at 0RECV_B0"
    )
    assert "[0RECV_B0]  1RECV_F0  <-- ERROR HERE" in str(error.value)


def test_the_error_shows_the_rank_that_waits_for_itself() -> None:
    with pytest.raises(
        PlanError, match="rank 1 waits at 1F0 for 1RECV_F0, which comes later in its own list"
    ):
        list(walk(forward_plan("0F0 0SEND_F0", "1F0 1RECV_F0")))


def test_the_error_names_what_is_in_no_list() -> None:
    with pytest.raises(PlanError, match="rank 1 waits at 1F0 for 0F0, which is in no list"):
        list(walk(forward_plan("", "1F0")))
