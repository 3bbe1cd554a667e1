"""One pass that puts the messages into a plan, and what each action of a plan with messages waits for.

Decides: where a SEND and a RECV stand. A SEND follows the action that makes the tensor, a RECV stands right before the
action that needs it; the executor posts receives ahead by itself, in the plan's order, one channel for each directed
pair of ranks and kind of traffic, first in, first out. Neighbouring stages on one rank exchange nothing.
Assumes actions of one kind on one stage come in ascending order of micro-batches (`validate` checks it).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from parallel.pipeline.actions import (
    COMPUTE,
    RECV_OF,
    RECVS,
    SEND_OF,
    SENDS,
    TRAFFIC_OF,
    Action,
    Kind,
    Plan,
    Shape,
    dependencies,
    peer_stage,
)


class Channel(NamedTuple):
    """A directed pair of ranks and what travels on it: messages leave and arrive in the same order."""

    source: int
    target: int
    traffic: Kind


def channel_of(action: Action, shape: Shape) -> Channel:
    """Return the channel of a SEND or RECV."""
    here, there = shape.rank_of(action.stage), shape.rank_of(peer_stage(action))
    ends = (here, there) if action.kind in SENDS else (there, here)
    return Channel(*ends, TRAFFIC_OF[action.kind])


def channels(plan: Plan) -> tuple[Channel, ...]:
    """Return every channel that a plan with messages uses, sorted, the same on all ranks."""
    messages = (action for actions in plan.ranks for action in actions if action.kind in SENDS | RECVS)
    return tuple(sorted({channel_of(action, plan.shape) for action in messages}))


def acknowledgements(plan: Plan, rank: int) -> dict[Action, Counter[Kind]]:
    """Return what each receive of a rank tells about its own messages: how many its sender had received by then.

    A rank runs its list in order, so whoever gets a message knows what the sender had done before.

    Args:
        plan: with messages.
    Returns:
        For each receive of a message that is sent in the same list: the sender's receives from `rank` before, by kind.
    """
    told: dict[Action, Counter[Kind]] = {}
    for other, actions in enumerate(plan.ranks):
        received: Counter[Kind] = Counter()
        for action in actions:
            if action.kind not in SENDS | RECVS:
                continue
            channel = channel_of(action, plan.shape)
            if action.kind in RECVS and channel.source == rank:
                received[channel.traffic] += 1
            elif action.kind in SENDS and (channel.source, channel.target) == (other, rank):
                receive = Action(peer_stage(action), RECV_OF[channel.traffic], action.microbatch)
                told[receive] = received.copy()
    return told


def count_received(plan: Plan, rank: int) -> Counter[Kind]:
    """Return how many messages of a rank the others receive in a plan with messages, by kind."""
    receives = (action for actions in plan.ranks for action in actions if action.kind in RECVS)
    channels_ = (channel_of(action, plan.shape) for action in receives)
    return Counter(channel.traffic for channel in channels_ if channel.source == rank)


def requirements(action: Action, shape: Shape, *, lowered: bool) -> tuple[Action, ...]:
    """Return `dependencies` as they are seen on the action's own rank.

    Args:
        lowered: the plan holds messages: a compute action of another rank is then awaited by its RECV.
    """
    needs = dependencies(action, shape)
    if not lowered or action.kind not in COMPUTE:
        return needs
    stage, rank = action.stage, shape.rank_of(action.stage)
    return tuple(
        need
        if need.stage == stage or shape.rank_of(need.stage) == rank
        else Action(stage, RECV_OF[need.kind], need.microbatch)
        for need in needs
    )


def add_communication(plan: Plan) -> Plan:
    """Return the plan with a SEND and a RECV for each dependency between ranks.

    A B directly followed by its own W is one whole backward, so its SEND_B comes after the W. In an `inline` plan the
    teacher's and the student's forward of a micro-batch share one slot, so the SEND_K waits for the F: this is what
    engines do that run the teacher inside the student's forward, and what makes `inline` the slow way.

    Raises:
        ValueError: the plan already has messages.
    """
    if plan.lowered:
        raise ValueError("the plan already holds its messages")
    return replace(plan, ranks=tuple(tuple(_lower_rank(actions, plan)) for actions in plan.ranks))


def _lower_rank(actions: tuple[Action, ...], plan: Plan) -> list[Action]:
    """One rank's list with its messages."""
    result: list[Action] = []
    held: list[Action] = []
    for index, action in enumerate(actions):
        if action.kind in COMPUTE:
            result += [need for need in requirements(action, plan.shape, lowered=True) if need.kind in RECVS]
        result.append(action)
        following = actions[index + 1] if index + 1 < len(actions) else None
        held += _sends(action, plan.shape)
        if held and not _one_slot(action, following, plan):
            result += held
            held = []
    return result


def _sends(action: Action, shape: Shape) -> list[Action]:
    """The message that the action's output leaves in, if another rank needs it."""
    stage, kind, microbatch, piece = action
    match kind:
        case Kind.F:
            needed = stage + 1 < shape.num_stages
        case Kind.B:
            needed = stage > 0
        case Kind.K:
            needed = stage + 1 < shape.num_ranks and piece == shape.last_slice
        case _:
            return []
    send = Action(stage, SEND_OF[kind], microbatch)
    return [send] if needed and shape.rank_of(peer_stage(send)) != shape.rank_of(stage) else []


def _one_slot(action: Action, following: Action | None, plan: Plan) -> bool:
    """Whether `following` belongs to the same slot as `action`, so that messages wait for it."""
    if following is None or following[0] != action.stage or following.microbatch != action.microbatch:
        return False
    pair = action.kind, following.kind
    return pair == (Kind.B, Kind.W) or (plan.teacher == "inline" and pair == (Kind.K, Kind.F))
