"""What the ranks of a run tell each other beside their work, through the store by which they met.

Keys: `sight/R` (what rank R was doing at its latest sign of life), `moves` (counts beats in which some rank got further),
`tells` (who comes first tells why the run ends), `over` (the exit code, once that is told). Decides nothing; a store that
cannot be reached is an error for the caller. JSON only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

from launch.verdict import Report
from parallel.activity import Sight


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class Board:
    """This rank's view of what all have told.

    Args:
        store: a connection of its own: the main thread's may be busy waiting.
        places: of all ranks, as words.
    """

    def __init__(self, store: Store, places: Sequence[str], *, rank: int) -> None:
        self._store, self._places, self._rank = store, places, rank
        self._beats = 0

    @property
    def place(self) -> str:
        """This rank, as words."""
        return self._places[self._rank]

    def beat(self, sight: Sight, *, moved: bool) -> int:
        """Give a sign of life; return how many beats of all ranks have found them further."""
        self._beats += 1
        self._store.set(f"sight/{self._rank}", json.dumps([self._beats, asdict(sight)]))
        return self._store.add("moves", int(moved))

    def has_the_word(self) -> bool:
        """Whether this rank is to tell why the run ends: the first that asks is."""
        return self._store.add("tells", 1) == 1

    def end(self, code: int) -> None:
        """Say that it is told, and that all should leave with this exit code."""
        self._store.set("over", str(code))

    def end_code(self) -> int | None:
        """Return the exit code with which all should leave; None while the run goes on."""
        return int(self._store.get("over")) if self._store.check(["over"]) else None

    def reports(self, sight: Sight, *, watch_s: float) -> dict[int, Report]:
        """Return what is known of every rank, after watching all for signs of life.

        Args:
            sight: of this rank.
        """
        before = [self._last(rank) for rank in range(len(self._places))]
        time.sleep(watch_s)
        found = {}
        for rank, place in enumerate(self._places):
            beat, seen = self._last(rank)
            if rank == self._rank:
                found[rank] = Report(place, sight, alive=True)
            else:
                found[rank] = Report(place, seen, alive=beat != before[rank][0])
        return found

    def _last(self, rank: int) -> tuple[int, Sight | None]:
        key = f"sight/{rank}"
        if not self._store.check([key]):
            return 0, None
        beat, fields = json.loads(self._store.get(key))
        return beat, Sight(**{**fields, "peers": tuple(fields["peers"])})
