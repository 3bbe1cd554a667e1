"""Checks that a plan does what it must, can run, and stays within its bounds, before anything runs.

Decides: what every plan must hold (`validate`) and when a plan with messages cannot hang (`check_deadlock`).

What `check_deadlock` proves. A rank runs its list in order; a RECV waits for its message; a channel (directed pair of
ranks, kind of traffic) is first in, first out. Such a network of lists has the same outcome for every speed of ranks
and links (Kahn 1974), so running it once, abstractly, is a proof for all delays.
- `posted_ahead=None`: sends never block, or all receives are posted from the start. The executor's contract.
- `posted_ahead=n`: sends block until the receiver has posted the matching receive (rendezvous), and each channel has
  at most n receives posted that no RECV has consumed. `smallest_window` returns the least n that does not hang.

NORM is taken as a collective at which every rank waits for the gradients of all stages; one that is started early and
awaited later only waits less.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from parallel.pipeline.actions import (
    RECV_OF,
    RECVS,
    SENDS,
    STEP_END,
    TRAFFIC_OF,
    Action,
    Kind,
    Plan,
    PlanError,
    error_at,
    format_grid,
    peer_stage,
)
from parallel.pipeline.lower import Channel, add_communication, channel_of
from parallel.pipeline.order import walk
from parallel.pipeline.schedules import SCHEDULES, TRAINING


class Peaks(NamedTuple):
    """What a plan holds at most, for any speed of its ranks.

    Args:
        activations: micro-batches between F and W, one number a stage.
        teacher_outputs: teacher outputs on the last rank between its last K and the last stage's B.
    """

    activations: tuple[int, ...]
    teacher_outputs: int


def validate(plan: Plan, *, ahead: frozenset[Action] | None = None) -> Peaks:
    """Check everything that must hold for a plan whatever its timing.

    Each action once and on its rank; micro-batches of one kind on one stage in ascending order; a global order that
    respects all dependencies; no more activations in flight than the schedule promises; the teacher's look-ahead at the
    end equal to what the step began with, so that the step can be repeated; messages, if any, as `lower` makes them.

    Args:
        plan: with or without messages.
        ahead: the look-ahead that must be left at the end, numbered as seen from the next step; None means
            `plan.carried`, the steady cycle. A first step leaves more than it finds, a last one less.
    Returns:
        The peaks that follow from the order alone.
    Raises:
        PlanError: the first thing that is wrong, with the plan as a grid and the place in it.
    """
    if len(plan.ranks) != plan.shape.num_ranks:
        raise PlanError(f"the plan has {len(plan.ranks)} lists for num_ranks={plan.shape.num_ranks}")
    _check_members(plan)
    _check_teacher(plan, plan.carried if ahead is None else ahead)
    for _ in walk(plan):
        pass
    peaks = count_peaks(plan)
    if plan.lowered:
        _check_messages(plan)
    return peaks


def _required(plan: Plan) -> set[Action]:
    """Every student action the plan must hold; nothing else of these kinds may be in it."""
    shape = plan.shape
    kinds = (
        (Kind.F, Kind.B, Kind.W)
        if plan.schedule in TRAINING
        else (Kind.F,)
        if plan.schedule == "forward"
        else ()
    )
    stages = range(shape.num_stages)
    required = {
        Action(stage, kind, each)
        for stage in stages
        for kind in kinds
        for each in range(shape.num_microbatches)
    }
    if plan.schedule in TRAINING:
        required |= {Action(stage, kind) for stage in stages for kind in STEP_END}
    return required


def _check_members(plan: Plan) -> None:
    """Each action exactly once, on its rank, micro-batches in order."""
    shape, required = plan.shape, _required(plan)
    seen: set[Action] = set()
    latest: dict[tuple[int, Kind], tuple[int, int]] = {}
    for rank, actions in enumerate(plan.ranks):
        for position, action in enumerate(actions):
            stage, kind, microbatch, piece = action
            if kind is Kind.K:
                known = stage < shape.num_ranks and piece in shape.slices
            else:
                known = action in required or kind in SENDS or kind in RECVS
            if not known:
                raise error_at(plan, rank, position, f"{action} is no action of this plan")
            if shape.rank_of(stage) != rank:
                raise error_at(
                    plan,
                    rank,
                    position,
                    f"{action} belongs on rank {shape.rank_of(stage)}, not on rank {rank}",
                )
            if action in seen or action in plan.carried:
                raise error_at(plan, rank, position, f"{action} is done twice")
            order = (-1 if microbatch is None else microbatch, piece or 0)
            if order < latest.get((stage, kind), order):
                raise error_at(plan, rank, position, f"{action} comes after a later micro-batch of its kind")
            seen.add(action)
            latest[stage, kind] = order
    if required - seen:
        action = min(required - seen, key=lambda each: (each.stage, each.microbatch or 0, each.kind))
        rank = shape.rank_of(action.stage)
        raise error_at(plan, rank, len(plan.ranks[rank]), f"{action} is missing on rank {rank}")


def _check_teacher(plan: Plan, ahead: frozenset[Action]) -> None:
    """The teacher's work of this step is done, and what is done ahead is what the next step counts on."""
    shape = plan.shape
    produced = {action for actions in plan.ranks for action in actions if action.kind is Kind.K}
    if shape.num_slices and (plan.schedule != "none" or plan.teacher != "fill"):
        for stage in range(shape.num_ranks):
            for each in range(shape.num_microbatches):
                for action in shape.teacher(stage, each):
                    if action not in produced and action not in plan.carried:
                        raise error_at(
                            plan, stage, len(plan.ranks[stage]), f"{action} is missing on rank {stage}"
                        )
    left = plan.ahead()
    if left != ahead:
        extra, short = sorted(left - ahead), sorted(ahead - left)
        raise PlanError(
            f"the cycle does not close: the next step finds {len(left)} teacher actions done and counts on {len(ahead)}"
            f" (too many: {extra[:4]}, missing: {short[:4]})\n\n{format_grid(plan.ranks)}"
        )


def count_peaks(plan: Plan) -> Peaks:
    """Count what each rank holds along its list.

    Raises:
        PlanError: a rank holds more activations than its schedule promises.
    """
    shape = plan.shape
    activations = [0] * shape.num_stages
    peak_outputs = outputs = sum(_queued(action, plan) for action in plan.carried)
    for rank, actions in enumerate(plan.ranks):
        bound = SCHEDULES[plan.schedule].max_in_flight(shape, rank)
        live = dict.fromkeys(shape.stages_of(rank), 0)
        for position, action in enumerate(actions):
            if plan.schedule in TRAINING and action.kind in (Kind.F, Kind.W):
                live[action.stage] += 1 if action.kind is Kind.F else -1
                activations[action.stage] = max(activations[action.stage], live[action.stage])
                if sum(live.values()) > bound:
                    raise error_at(
                        plan, rank, position, f"{action} makes {bound + 1} in flight, over {bound}"
                    )
            outputs += _queued(action, plan)
            peak_outputs = max(peak_outputs, outputs)
    return Peaks(tuple(activations), peak_outputs)


def _queued(action: Action, plan: Plan) -> int:
    """Change of the number of teacher outputs that wait on the last rank for the loss."""
    shape = plan.shape
    if not shape.num_slices:
        return 0
    if action.stage == shape.num_ranks - 1 and action.kind is Kind.K and action.slice == shape.last_slice:
        return 1
    return -1 if action.stage == shape.num_stages - 1 and action.kind is Kind.B else 0


def _check_messages(plan: Plan) -> None:
    """The messages are those that `add_communication` makes, in its order."""
    bare = [tuple(action for action in actions if action.kind not in SENDS | RECVS) for actions in plan.ranks]
    fresh = add_communication(Plan(plan.shape, plan.schedule, plan.teacher, tuple(bare), plan.carried))
    for rank, (actions, wanted) in enumerate(zip(plan.ranks, fresh.ranks, strict=True)):
        for position, action in enumerate(actions):
            if position >= len(wanted) or action != wanted[position]:
                instead = wanted[position] if position < len(wanted) else "nothing"
                raise error_at(plan, rank, position, f"rank {rank} has {action} where {instead} must stand")
        if len(actions) < len(wanted):
            raise error_at(plan, rank, len(actions), f"rank {rank} misses {wanted[len(actions)]}")


def check_deadlock(plan: Plan, *, posted_ahead: int | None = None) -> None:
    """Prove that a plan with messages cannot hang; the module's docstring says under which model.

    Args:
        posted_ahead: None for sends that never block; n for rendezvous sends with n receives posted a channel.
    Raises:
        PlanError: it hangs, or a message reaches the wrong RECV; the message says who waits for whom.
    """
    extra: dict[Action, Action] = {}
    sends, receives = _by_channel(plan, SENDS), _by_channel(plan, RECVS)
    for channel in sorted(sends.keys() | receives.keys()):
        sent = _in_flight(plan, channel) + sends[channel]
        for send, receive in zip(sent, receives[channel], strict=False):
            if receive != _receive_of(send):
                raise PlanError(f"{receive} would get the message of {send}\n\n{format_grid(plan.ranks)}")
        if posted_ahead is not None:
            extra |= {
                send: _receive_of(earlier) for earlier, send in zip(sent, sent[posted_ahead:], strict=False)
            }
    for _ in walk(plan, extra):
        pass


def smallest_window(plan: Plan) -> int:
    """Return the least number of receives posted ahead a channel with which even blocking sends do not hang.

    In a cycle it covers the messages that cross the end of the step.

    Raises:
        PlanError: the plan hangs even with sends that never block.
    """
    check_deadlock(plan)
    low, high = 1, 1
    while not _survives(plan, high):
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _survives(plan, middle) else (middle + 1, high)
    return high


def _survives(plan: Plan, posted_ahead: int) -> bool:
    try:
        check_deadlock(plan, posted_ahead=posted_ahead)
    except PlanError:
        return False
    return True


def _by_channel(plan: Plan, kinds: frozenset[Kind]) -> defaultdict[Channel, list[Action]]:
    """The messages of each channel in the order of their rank's list."""
    result: defaultdict[Channel, list[Action]] = defaultdict(list)
    for actions in plan.ranks:
        for action in actions:
            if action.kind in kinds:
                result[channel_of(action, plan.shape)].append(action)
    return result


def _in_flight(plan: Plan, channel: Channel) -> list[Action]:
    """The teacher's messages that the step before has sent on a channel and this step receives."""
    if channel.traffic is not Kind.K:
        return []
    last, first = plan.shape.last_slice, plan.shape.slices[0]
    done = {each.microbatch for each in plan.carried if each.stage == channel.source and each.slice == last}
    used = {each.microbatch for each in plan.carried if each.stage == channel.target and each.slice == first}
    return [Action(channel.source, Kind.SEND_K, microbatch) for microbatch in sorted(done - used)]


def _receive_of(send: Action) -> Action:
    return Action(peer_stage(send), RECV_OF[TRAFFIC_OF[send.kind]], send.microbatch)
