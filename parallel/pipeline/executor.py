"""Walk one rank's actions through a table of handlers, and note when each ran.

The executor decides nothing: the order is the plan's, the meaning is the handlers'. An action without a handler is an
error before the first one runs. An exception is passed on with the rank and the action in its message, because the peers
will only report that they waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.simulate import Event

Handler = Callable[[Action], None]


class ActionFailed(RuntimeError):
    """A handler raised; the message names the rank's place, the action and the cause."""


def execute(
    actions: Sequence[Action], handlers: Mapping[Kind, Handler], *, rank: int, place: str
) -> list[Event]:
    """Run the actions in order and return one event for each.

    Args:
        actions: this rank's part of a validated, lowered plan.
        handlers: what to do for each kind.
        rank: pipeline rank, for the events.
        place: words for messages, such as `rank 3 (pp 1, dp 0, tp 1)`.
    Returns:
        Events with `time.perf_counter` seconds; a receive's event is the time spent waiting.
    Raises:
        ValueError: a kind has no handler.
        ActionFailed: from a handler's exception.
    """
    unknown = {action.kind for action in actions} - handlers.keys()
    if unknown:
        raise ValueError(f"no handler for {', '.join(sorted(unknown))}")
    events = []
    for action in actions:
        start_s = time.perf_counter()
        try:
            handlers[action.kind](action)
        except Exception as error:
            raise ActionFailed(f"{place} failed at {action}: {type(error).__name__}: {error}") from error
        events.append(Event(rank, action, start_s, time.perf_counter()))
    return events
