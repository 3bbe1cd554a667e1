"""The ranks of a run meet: they agree on a name for this start of theirs, under which all they tell each other is kept.

torchrun keeps one store over all restarts, so what an earlier start left there (addresses, an exit code) must not be taken for
this one's; and the number of restarts, which it also gives, may differ between machines. Decides: the first rank makes up a
name, and it is in force when the first rank has answered with what every rank made up for itself, which no earlier start knew.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence

from launch.board import Store

_LATER_S = 5.0
"""How much longer the others wait than the first rank, which can tell who has not come."""


class Absent(Exception):
    """Not all ranks have come; the message names them. Empty where another rank tells it."""


def meet(
    store: Store,
    places: Sequence[str],
    *,
    rank: int,
    timeout_s: float,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Return the name of this start, equal on every rank and never used before.

    Args:
        places: of all ranks, as words.
        timeout_s: how long to wait for the last.
        stopped: whether this process has been asked to end.
    Raises:
        Absent: somebody has not come.
        SystemExit: it was asked to end before all had come; with 0, for nothing is lost.
    """
    mine, size = uuid.uuid4().hex, len(places)
    deadline_s = time.monotonic() + timeout_s + (_LATER_S if rank else 0.0)
    step = _lead(store, mine, size) if rank == 0 else _follow(store, mine, rank)
    while (name := step()) is None:
        if stopped():
            raise SystemExit(0)
        if time.monotonic() > deadline_s:
            absent = [0] if rank else [each for each in range(1, size) if not store.check([f"{mine}/{each}"])]
            if rank == 0 and absent:
                store.set(f"{mine}/absent", "told")
            if absent:
                raise Absent(_words([places[each] for each in absent], timeout_s))
        time.sleep(0.02 + size / 5000)
    return name


def _lead(store: Store, mine: str, size: int) -> Callable[[], str | None]:
    store.set("meeting", mine)
    keys = [f"{mine}/{rank}" for rank in range(1, size)]

    def step() -> str | None:
        if not store.check(keys):
            return None
        store.set(f"{mine}/all", json.dumps([store.get(key).decode() for key in keys]))
        return mine

    return step


def _follow(store: Store, mine: str, rank: int) -> Callable[[], str | None]:
    greeted, is_over = "", False

    def step() -> str | None:
        nonlocal greeted, is_over
        name = store.get("meeting").decode() if store.check(["meeting"]) else ""
        if name and name != greeted:
            # An earlier start's, that has come to nothing; what is told after the greeting, though, is told to this one.
            is_over = store.check([f"{name}/absent"])
            store.set(f"{name}/{rank}", mine)
            greeted = name
        if name and store.check([f"{name}/all"]) and mine in json.loads(store.get(f"{name}/all")):
            return name
        if name and not is_over and store.check([f"{name}/absent"]):
            raise Absent
        return None

    return step


def _words(places: Sequence[str], timeout_s: float) -> str:
    who = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    have = "has" if len(places) == 1 else "have"
    return (
        f"{who} {have} not come within train.timeout_s={timeout_s:g} s: the process has not started, has ended, or hangs "
        "before it meets the others"
    )
