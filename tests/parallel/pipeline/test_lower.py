from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from parallel.pipeline.actions import RECVS, SENDS, TRAFFIC_OF, Kind, Plan, parse, peer_stage
from parallel.pipeline.lower import (
    Channel,
    acknowledgements,
    add_communication,
    channel_of,
    channels,
    count_received,
    requirements,
)
from parallel.pipeline.order import walk
from parallel.pipeline.schedules import forward_only, make_plan
from tests.parallel.pipeline.sweep import lowered_plans


def lowered(schedule: str, teacher: str | None, num_ranks: int, num_microbatches: int, **sizes: int) -> Plan:
    return add_communication(
        make_plan(
            schedule=schedule,
            teacher=teacher,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            **sizes,
        )
    )


def lines(plan: Plan) -> list[str]:
    return [
        " ".join(str(action) for action in actions if action.microbatch is not None) for actions in plan.ranks
    ]


def test_a_receive_stands_where_it_is_needed_and_a_send_after_the_whole_backward() -> None:
    assert lines(lowered("1f1b", None, 2, 2)) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0W0 0RECV_B1 0B1 0W1",
        "1RECV_F0 1F0 1B0 1W0 1SEND_B0 1RECV_F1 1F1 1B1 1W1 1SEND_B1",
    ]


def test_a_bare_b_is_sent_before_its_w() -> None:
    assert lines(lowered("zero_bubble", None, 2, 2))[1] == (
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1W0 1W1"
    )


def test_the_teacher_is_sent_after_its_last_slice() -> None:
    assert lines(lowered("1f1b", "batch", 2, 1, num_slices=2)) == [
        "0K0.0 0K0.1 0SEND_K0 0F0 0SEND_F0 0RECV_B0 0B0 0W0",
        "1RECV_K0 1K0.0 1K0.1 1RECV_F0 1F0 1B0 1W0 1SEND_B0",
    ]


def test_inline_sends_both_forwards_at_the_end_of_their_slot() -> None:
    assert lines(lowered("1f1b", "inline", 2, 1, num_slices=2))[0] == (
        "0K0.0 0K0.1 0F0 0SEND_K0 0SEND_F0 0RECV_B0 0B0 0W0"
    )


def test_forward_only_has_messages_one_way() -> None:
    plan = add_communication(forward_only(num_ranks=3, num_microbatches=2, student=False, teacher=True))
    assert lines(plan)[1] == "1RECV_K0 1K0 1SEND_K0 1RECV_K1 1K1 1SEND_K1"


def test_stages_on_one_rank_exchange_nothing() -> None:
    assert channels(lowered("interleaved", "inline", 1, 3, virtual_stages=4)) == ()


def test_virtual_stages_send_from_the_last_rank_to_the_first() -> None:
    assert channels(lowered("interleaved", None, 3, 3, virtual_stages=2)) == (
        Channel(0, 1, Kind.F),
        Channel(0, 2, Kind.B),
        Channel(1, 0, Kind.B),
        Channel(1, 2, Kind.F),
        Channel(2, 0, Kind.F),
        Channel(2, 1, Kind.B),
    )


def test_a_plan_is_lowered_once() -> None:
    with pytest.raises(ValueError, match="already"):
        add_communication(lowered("1f1b", None, 2, 2))


def test_a_receive_stands_for_the_dependency_on_another_rank() -> None:
    shape = lowered("1f1b", "inline", 2, 2).shape
    assert requirements(parse("1F0"), shape, lowered=True) == (parse("1RECV_F0"),)
    assert requirements(parse("1F0"), shape, lowered=False) == (parse("0F0"),)
    assert requirements(parse("0B1"), shape, lowered=True) == (parse("0F1"), parse("0RECV_B1"))
    assert requirements(parse("1B1"), shape, lowered=True) == (parse("1F1"), parse("1K1"))


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_every_message_has_both_ends_in_the_same_order(num_ranks: int) -> None:
    for plan in lowered_plans(num_ranks):
        ends: dict[frozenset[Kind], dict[Channel, list[tuple[int, int]]]] = {
            SENDS: defaultdict(list),
            RECVS: defaultdict(list),
        }
        for rank, actions in enumerate(plan.ranks):
            for action in actions:
                for kinds in (SENDS, RECVS):
                    if action.kind in kinds:
                        channel = channel_of(action, plan.shape)
                        assert rank == (channel.source if kinds is SENDS else channel.target)
                        assert channel.traffic is TRAFFIC_OF[action.kind]
                        sender = action.stage if kinds is SENDS else peer_stage(action)
                        ends[kinds][channel].append((sender, action.microbatch))
        assert ends[SENDS] == ends[RECVS]
        shape = plan.shape
        hops = shape.num_stages - 1 if num_ranks > 1 else 0
        expected = 2 * hops * shape.num_microbatches
        expected += (num_ranks - 1) * shape.num_microbatches if shape.num_slices else 0
        assert sum(map(len, ends[SENDS].values())) == expected


def test_a_receive_tells_what_its_sender_had_received_before() -> None:
    plan = add_communication(make_plan(schedule="1f1b", teacher=None, num_ranks=2, num_microbatches=3))
    told = acknowledgements(plan, 0)
    # Rank 1 takes F0, F1 and F2 one by one, and answers each with its B before it takes the next.
    assert {str(receive): dict(counts) for receive, counts in told.items()} == {
        f"0RECV_B{index}": {Kind.F: index + 1} for index in range(3)
    }
    assert {str(receive): dict(counts) for receive, counts in acknowledgements(plan, 1).items()} == {
        "1RECV_F0": {},
        "1RECV_F1": {},
        "1RECV_F2": {Kind.B: 1},
    }
    assert count_received(plan, 0) == {Kind.F: 3} and count_received(plan, 1) == {Kind.B: 3}


@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_is_told_has_happened_in_every_order(num_ranks: int, virtual_stages: int) -> None:
    shape = {"num_ranks": num_ranks, "num_microbatches": 5, "virtual_stages": virtual_stages}
    plan = add_communication(make_plan(schedule="interleaved", teacher="batch", num_slices=2, **shape))
    told = [acknowledgements(plan, rank) for rank in range(num_ranks)]
    received = [Counter() for _ in range(num_ranks)]
    let_go = [Counter() for _ in range(num_ranks)]
    for rank, _, action in walk(plan):
        if action.kind in RECVS:
            channel = channel_of(action, plan.shape)
            received[channel.source][channel.traffic] += 1
            for kind, count in told[rank][action].items():
                assert count <= received[rank][kind], "no send may be waited for before it was received"
                let_go[rank][kind] = max(let_go[rank][kind], count)
    for rank in range(num_ranks):
        assert received[rank] == count_received(plan, rank)
        assert let_go[rank][Kind.F] >= received[rank][Kind.F] - 2 or rank == num_ranks - 1
