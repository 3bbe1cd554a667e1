"""One pass over a whole plan, action by action, in an order in which it could run.

Decides: nothing; the order follows from each rank's list and from `lower.requirements`. The validator, the deadlock
proof and the simulator are all this pass, with something done at each action.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from parallel.pipeline.actions import Action, Kind, Plan, error_at
from parallel.pipeline.lower import requirements


def walk(plan: Plan, extra: Mapping[Action, Action] | None = None) -> Iterator[tuple[int, int, Action]]:
    """Yield (rank, position, action) of the whole plan in an order that respects all dependencies.

    Args:
        plan: with or without messages.
        extra: further needs, at most one an action.
    Raises:
        PlanError: the ranks wait for each other; the message says who waits for whom.
    """
    done = set(plan.carried)
    positions = [0] * len(plan.ranks)
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    lowered, extra = plan.lowered, extra or {}
    ready = list(range(len(plan.ranks)))[::-1]
    while ready:
        rank = ready.pop()
        actions = plan.ranks[rank]
        while positions[rank] < len(actions):
            action = actions[positions[rank]]
            missing = _first_missing(action, plan, done, extra, lowered)
            if missing is not None:
                waiting[missing].append(rank)
                break
            done.add(action)
            yield rank, positions[rank], action
            positions[rank] += 1
            ready += waiting.pop(action, ())
    if any(position < len(actions) for position, actions in zip(positions, plan.ranks, strict=True)):
        _raise_stuck(plan, positions, {rank: need for need, ranks in waiting.items() for rank in ranks})


def _first_missing(
    action: Action, plan: Plan, done: set[Action], extra: Mapping[Action, Action], lowered: bool
) -> Action | None:
    for need in requirements(action, plan.shape, lowered=lowered):
        if need not in done and not _carried_message(need, plan):
            return need
    need = extra.get(action)
    return None if need is None or need in done else need


def _carried_message(need: Action, plan: Plan) -> bool:
    """Whether a RECV_K asks for a message that the step before has sent."""
    return (
        need.kind is Kind.SEND_K and need._replace(kind=Kind.K, slice=plan.shape.last_slice) in plan.carried
    )


def _raise_stuck(plan: Plan, positions: list[int], needs: dict[int, Action]) -> None:
    """Follow who waits for whom to where the circle, or the missing action, is, and say it."""
    holder = {action: rank for rank, actions in enumerate(plan.ranks) for action in actions}
    chain = [min(needs)]
    while (following := holder.get(needs[chain[-1]])) not in (None, *chain):
        chain.append(following)
    circle = [] if following is None else chain[chain.index(following) :]
    rank = circle[0] if circle else chain[-1]
    message = f"rank {rank} waits at {plan.ranks[rank][positions[rank]]} for {needs[rank]}"
    if not circle:
        message += ", which is in no list"
    elif len(circle) == 1:
        message += ", which comes later in its own list"
    else:
        for other in (*circle[1:], circle[0]):
            message += (
                f" of rank {other}, which waits at {plan.ranks[other][positions[other]]} for {needs[other]}"
            )
        message = message.removesuffix(f" for {needs[rank]}")
    raise error_at(plan, rank, positions[rank], message)
