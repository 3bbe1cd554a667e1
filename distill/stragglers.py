"""Stages that have become slower than the others since the plan was made, told when it begins and when it is over.

Decides: a rank's time is the sum of its median F, B, W and K; planned is what it took when the first plan was made. A rank
straggles from SLOW times that on, measured against the rank in the middle: when all are slower (a busy machine, longer rows)
nobody is. Looks at medians over many steps, so a single slow step is not told.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from parallel.mesh import Mesh, coordinates_of
from parallel.pipeline.actions import Kind

SLOW, WELL = 1.5, 1.25
"""Times the planned time from which on a rank is told to straggle, and below which it no longer does."""
_COMPUTE = (Kind.F, Kind.B, Kind.W, Kind.K)


class Stragglers:
    """Which ranks are slower than planned; equal on every rank that sees the same medians."""

    def __init__(self, mesh: Mesh) -> None:
        self._dp, self._tp = mesh.dp.size, mesh.tp.size
        self._planned: list[float] = []
        self._slow: dict[int, int] = {}
        """Rank -> the step since which it has been told."""

    def look(self, per_rank: Sequence[Mapping[tuple[Kind, int], float]], *, since: int) -> list[str]:
        """Return what has changed.

        Args:
            per_rank: median seconds of each kind of action and stage, by world rank; the first ones are the planned.
            since: first step that was measured, counted from 1.
        """
        now_s = [
            sum(value for (kind, _), value in seconds.items() if kind in _COMPUTE) for seconds in per_rank
        ]
        if not self._planned:
            self._planned = now_s
            return []
        ratios = [
            now / planned if planned else 1.0 for now, planned in zip(now_s, self._planned, strict=True)
        ]
        middle = statistics.median_low(ratios)
        return [line for rank, ratio in enumerate(ratios) if (line := self._tell(rank, ratio, middle, since))]

    def _tell(self, rank: int, ratio: float, middle: float, since: int) -> str:
        stage = coordinates_of(rank, dp=self._dp, tp=self._tp).pp
        place = f"stage {stage} (rank {rank})"
        if rank not in self._slow and min(ratio, ratio / middle) >= SLOW:
            self._slow[rank] = since
            return f"{place} takes {ratio:.1f} times its planned time since step {since}"
        if rank in self._slow and min(ratio, ratio / middle) < WELL:
            began = self._slow.pop(rank)
            return f"{place} is as planned again since step {since}; it was slow from step {began} on"
        return ""
