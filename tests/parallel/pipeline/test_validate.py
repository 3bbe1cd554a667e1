from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import replace

import pytest

from parallel.pipeline.actions import RECVS, SENDS, STEP_END, Action, Kind, Plan, PlanError, Shape, parse
from parallel.pipeline.lower import add_communication, channel_of
from parallel.pipeline.schedules import forward_only, make_plan
from parallel.pipeline.validate import check_deadlock, smallest_window, validate
from tests.parallel.pipeline.sweep import lowered_plans, plans


def plan(schedule: str, teacher: str | None, num_ranks: int, num_microbatches: int, **sizes: int) -> Plan:
    return make_plan(
        schedule=schedule, teacher=teacher, num_ranks=num_ranks, num_microbatches=num_microbatches, **sizes
    )


def changed(made: Plan, rank: int, actions: list[Action]) -> Plan:
    return replace(made, ranks=(*made.ranks[:rank], tuple(actions), *made.ranks[rank + 1 :]))


def moved(made: Plan, text: str, before: str) -> Plan:
    """The plan with one action moved before another of the same rank."""
    action, target = parse(text), parse(before)
    rank = made.shape.rank_of(action.stage)
    actions = [each for each in made.ranks[rank] if each != action]
    actions.insert(actions.index(target), action)
    return changed(made, rank, actions)


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_every_plan_is_valid_within_its_bounds_and_cannot_hang(num_ranks: int) -> None:
    for made, lowered in zip(plans(num_ranks), lowered_plans(num_ranks), strict=True):
        shape = made.shape
        peaks = validate(lowered)
        if made.schedule == "1f1b":
            bounds = [min(shape.num_microbatches, num_ranks - stage) for stage in range(num_ranks)]
            assert list(peaks.activations) == bounds
        if made.schedule == "gpipe":
            assert set(peaks.activations) == {shape.num_microbatches}
        queue = {"none": 0, "inline": min(shape.num_microbatches, 1), "batch": shape.num_microbatches}
        if made.schedule == "1f1b":
            assert peaks.teacher_outputs == queue[made.teacher]
        check_deadlock(lowered, posted_ahead=1 if made.schedule != "interleaved" else 4)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_forward_only_plans_are_valid(num_ranks: int) -> None:
    for student, teacher in ((True, False), (False, True), (True, True)):
        for num_microbatches in (1, 4):
            made = forward_only(
                num_ranks=num_ranks,
                num_microbatches=num_microbatches,
                student=student,
                teacher=teacher,
                num_slices=2,
            )
            lowered = add_communication(made)
            assert validate(lowered) == validate(made)
            check_deadlock(lowered, posted_ahead=1)


@pytest.mark.parametrize("teacher", ["inline", "batch"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble", "interleaved"])
def test_dropping_or_doubling_any_action_is_found(schedule: str, teacher: str) -> None:
    for made in (
        plan(schedule, teacher, 3, 3, num_slices=2),
        add_communication(plan(schedule, teacher, 3, 3)),
    ):
        for rank, actions in enumerate(made.ranks):
            for position in range(len(actions)):
                for mutated in (
                    [*actions[:position], *actions[position + 1 :]],
                    [*actions[:position], actions[position], *actions[position:]],
                ):
                    with pytest.raises(PlanError, match="ERROR HERE|cycle"):
                        validate(changed(made, rank, mutated))


@pytest.mark.parametrize(
    ("text", "before", "message"),
    [
        ("1F1", "1F0", "after a later micro-batch"),
        ("0B0", "0F0", "0B0 for 0F0"),
        ("0W0", "0B0", "0W0 for 0B0"),
        ("1B0", "1K0.1", "1B0 for 1F0, which comes later"),
        ("1K1.1", "1K1.0", "after a later"),
        ("0REDUCE", "0W2", "0REDUCE for 0W2"),
        ("0NORM", "0REDUCE", "0NORM for 0REDUCE, which comes later"),
        ("1STEP", "1NORM", "1STEP for 1NORM"),
        ("1GATHER", "1STEP", "1GATHER for 1STEP"),
        ("0F2", "0B0", "makes 3 in flight, over 2"),
    ],
)
def test_actions_in_the_wrong_place_are_found(text: str, before: str, message: str) -> None:
    made = plan("1f1b", "inline", 2, 3, num_slices=2)
    validate(made)
    with pytest.raises(PlanError, match=message) as error:
        validate(moved(made, text, before))
    assert str(error.value).count("<-- ERROR HERE") == 1


def test_swaps_are_found_or_harmless() -> None:
    """Any two neighbours exchanged: the validator objects, or an independent run finds every input in time."""
    found = harmless = 0
    for made in (plan("1f1b", "batch", 3, 4), plan("zero_bubble", "inline", 3, 4), plan("gpipe", None, 2, 3)):
        for rank, actions in enumerate(made.ranks):
            for position in range(len(actions) - 1):
                swapped = [*actions]
                swapped[position], swapped[position + 1] = actions[position + 1], actions[position]
                mutated = changed(made, rank, swapped)
                try:
                    validate(mutated)
                except PlanError:
                    found += 1
                else:
                    assert run_with_random_delays(
                        add_communication(mutated), seed=position, posted_ahead=None
                    )
                    harmless += 1
    assert found > 60
    assert harmless > 0


def test_a_foreign_action_is_found() -> None:
    made = plan("1f1b", None, 2, 2)
    with pytest.raises(PlanError, match="1F0 belongs on rank 1, not on rank 0"):
        validate(changed(made, 0, [*made.ranks[0], parse("1F0")]))
    with pytest.raises(PlanError, match="0F9 is no action of this plan"):
        validate(changed(made, 0, [*made.ranks[0], parse("0F9")]))
    with pytest.raises(PlanError, match="0K0 is no action of this plan"):
        validate(changed(made, 0, [*made.ranks[0], parse("0K0")]))
    with pytest.raises(PlanError, match="1 lists for num_ranks=2"):
        validate(replace(made, ranks=made.ranks[:1]))


def test_a_message_in_the_wrong_place_is_found() -> None:
    made = add_communication(plan("1f1b", "batch", 2, 3))
    with pytest.raises(PlanError, match="rank 1 has 1B0 where 1W0 must stand|rank 1 has"):
        validate(moved(made, "1SEND_B0", "1W0"))
    with pytest.raises(PlanError, match="1F0 for 1RECV_F0"):
        validate(moved(made, "1F0", "1RECV_F0"))


def actions(line: str) -> tuple[Action, ...]:
    return tuple(parse(text) for text in line.split())


CYCLE = Plan(
    Shape(2, 2, 2, num_slices=1),
    "1f1b",
    "fill",
    (
        actions("0F0 0F1 0K2 0B0 0W0 0K3 0B1 0W1 0REDUCE 0NORM 0STEP 0GATHER"),
        actions("1K1 1F0 1B0 1W0 1F1 1B1 1W1 1K2 1REDUCE 1NORM 1STEP 1GATHER"),
    ),
    carried=frozenset(actions("0K0 0K1 1K0")),
)


def test_a_cycle_that_closes_is_valid_with_a_message_across_the_step() -> None:
    lowered = add_communication(CYCLE)
    assert validate(CYCLE).teacher_outputs == 2
    validate(lowered)
    assert [str(action) for action in lowered.ranks[1][:2]] == ["1RECV_K1", "1K1"]
    check_deadlock(lowered)
    check_deadlock(lowered, posted_ahead=1)


@pytest.mark.parametrize("change", ["0K3", "1K2"])
def test_a_cycle_that_does_not_close_is_found(change: str) -> None:
    rank = parse(change).stage
    short = changed(CYCLE, rank, [action for action in CYCLE.ranks[rank] if action != parse(change)])
    with pytest.raises(PlanError, match=r"does not close.*missing"):
        validate(short)
    validate(short, ahead=short.ahead())


def test_teacher_work_that_nobody_has_done_is_found() -> None:
    with pytest.raises(PlanError, match="0K0 is missing on rank 0"):
        validate(replace(CYCLE, carried=CYCLE.carried - {parse("0K0")}))
    with pytest.raises(PlanError, match="1K1 is done twice"):
        validate(replace(CYCLE, carried=CYCLE.carried | {parse("1K1")}))


def test_crossing_sends_that_block_hang_without_receives_posted_ahead() -> None:
    made = add_communication(plan("1f1b", None, 2, 4))
    check_deadlock(made)
    check_deadlock(made, posted_ahead=1)
    with pytest.raises(PlanError, match=r"rank 0 waits at 0SEND_F0 for 1RECV_F0 of rank 1"):
        check_deadlock(made, posted_ahead=0)


def test_receives_in_another_order_than_sends_are_found() -> None:
    made = add_communication(plan("1f1b", None, 2, 4))
    actions = list(made.ranks[0])
    first, second = actions.index(parse("0SEND_F0")), actions.index(parse("0SEND_F1"))
    actions[first], actions[second] = actions[second], actions[first]
    with pytest.raises(PlanError, match="1RECV_F0 would get the message of 0SEND_F1"):
        check_deadlock(changed(made, 0, actions))


def test_interleaving_uneven_groups_needs_two_receives_posted() -> None:
    made = add_communication(plan("interleaved", None, 3, 7, virtual_stages=2))
    with pytest.raises(PlanError, match="waits at"):
        check_deadlock(made, posted_ahead=1)
    assert smallest_window(made) == 2


def run_with_random_delays(made: Plan, *, seed: int, posted_ahead: int | None) -> bool:
    """Run a plan's lists by an independent little machine, ranks and links at random speed; True when all finish.

    NORM waits until every stage has reduced as often as it is asked for, so lists may hold several steps.
    """
    rng = random.Random(seed)
    links: defaultdict[tuple, deque[Action]] = defaultdict(deque)
    sent, received = defaultdict(int), defaultdict(int)
    inbox: set[tuple[int, str, int]] = set()
    positions, normed = [0] * len(made.ranks), [0] * len(made.ranks)
    reduced = stuck = 0
    per_rank = made.shape.num_stages // made.shape.num_ranks
    while stuck < 60 * len(made.ranks):
        rank = rng.randrange(len(made.ranks))
        stuck += 1
        if positions[rank] == len(made.ranks[rank]):
            continue
        action = made.ranks[rank][positions[rank]]
        if action.kind in SENDS:
            channel = channel_of(action, made.shape)
            if posted_ahead is not None and sent[channel] >= received[channel] + posted_ahead:
                continue
            sent[channel] += 1
            links[channel].append(action)
        elif action.kind in RECVS:
            channel = channel_of(action, made.shape)
            if not links[channel] or rng.random() < 0.3:
                continue
            message = links[channel].popleft()
            received[channel] += 1
            assert (message.microbatch, message.kind[-1]) == (action.microbatch, action.kind[-1])
            inbox.add((action.stage, action.kind[-1], action.microbatch))
        elif action.kind is Kind.NORM and reduced < (1 + normed[rank] // per_rank) * made.shape.num_stages:
            continue
        else:
            reduced += action.kind is Kind.REDUCE
            normed[rank] += action.kind is Kind.NORM
            crossing = {Kind.F: action.stage - 1, Kind.B: action.stage + 1, Kind.K: action.stage - 1}
            source = crossing.get(action.kind, -1)
            top = made.shape.num_ranks if action.kind is Kind.K else made.shape.num_stages
            if 0 <= source < top and made.shape.rank_of(source) != rank and not action.slice:
                assert (action.stage, str(action.kind), action.microbatch) in inbox
        positions[rank] += 1
        stuck = 0
    return all(position == len(actions) for position, actions in zip(positions, made.ranks, strict=True))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_random_delays_never_hang_where_the_proof_says_so(schedule: str) -> None:
    for seed, (num_ranks, num_microbatches, teacher) in enumerate(
        [(2, 3, "inline"), (4, 2, "batch"), (3, 7, None), (4, 8, "batch"), (8, 5, "inline")]
    ):
        virtual_stages = 2 if schedule == "interleaved" else 1
        made = add_communication(
            plan(schedule, teacher, num_ranks, num_microbatches, virtual_stages=virtual_stages, num_slices=2)
        )
        window = smallest_window(made)
        for attempt in range(4):
            assert run_with_random_delays(made, seed=100 * seed + attempt, posted_ahead=window)
            assert run_with_random_delays(made, seed=100 * seed + attempt, posted_ahead=None)
        if window > 1:
            assert not run_with_random_delays(made, seed=seed, posted_ahead=window - 1)


def test_the_end_of_a_step_is_checked_for_each_stage() -> None:
    made = plan("interleaved", None, 2, 2, virtual_stages=2)
    for kind in STEP_END:
        with pytest.raises(PlanError, match=f"2{kind} is missing on rank 0"):
            validate(changed(made, 0, [action for action in made.ranks[0] if action != Action(2, kind)]))
