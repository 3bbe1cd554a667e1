"""The one message about ranks that do not get further: who is stuck, who is gone, who waits for whom.

Decides the words, and who is to blame: a rank that gives no sign of life, otherwise one that waits for nobody. Pure: what the
ranks do is put together by `launch.watch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.activity import Sight

SHOWN = 8
"""Waiting ranks that are told one by one."""


@dataclass(frozen=True)
class Report:
    """What is known of one rank."""

    place: str
    """`rank 3 (pp 1, dp 0, tp 1)`."""
    sight: Sight | None
    """What it was last seen doing; None for a rank that has never been seen."""
    alive: bool
    """Whether it has given a sign of life just now."""


def hang_message(reports: Mapping[int, Report], stood_s: float, timeout_s: float) -> str:
    """Return what to say when no rank has got further for `stood_s`, which is too long, most important first."""
    to_blame = {rank: each for rank, each in reports.items() if _is_to_blame(each)}
    lines = [
        f"no rank has got further for {stood_s:.0f} s (train.timeout_s={timeout_s:g}), so the run is ended"
        + ("" if to_blame else "; they wait for one another")
    ]
    lines += [_blamed(each) for each in to_blame.values()]
    return "\n  ".join(lines + _waiting({rank: reports[rank] for rank in reports.keys() - to_blame.keys()}))


def gone_message(reports: Mapping[int, Report]) -> str | None:
    """Return what to say when a connection broke; None when every rank gives signs of life."""
    gone = [each for each in reports.values() if not each.alive]
    if not gone:
        return None
    lines = [
        f"{each.place} is gone without a word, as one that was killed"
        + (f"; it was last seen in {_doing(each.sight)}" if each.sight is not None else "")
        for each in gone
    ]
    left = {rank: each for rank, each in reports.items() if each.alive and each.sight.waits_for}
    return "\n  ".join(lines + _waiting(left))


def _is_to_blame(report: Report) -> bool:
    return not report.alive or report.sight is None or not report.sight.waits_for


def _blamed(report: Report) -> str:
    sight = report.sight
    if sight is None:
        return f"{report.place} has not come: its process has not started, or has ended or hangs before it meets the others"
    if not report.alive:
        return f"{report.place} gives no sign of life; it was last seen in {_doing(sight)}"
    where = f", at {sight.line}" if sight.line else ""
    return f"{report.place} is stuck in {_doing(sight)} for {sight.for_s:.0f} s{where}"


def _waiting(reports: Mapping[int, Report]) -> list[str]:
    """Return a line for each of the first ranks that wait, and one for the rest."""
    lines = []
    for rank in sorted(reports)[:SHOWN]:
        sight = reports[rank].sight
        peers = [peer for peer in sight.peers if peer != rank]
        of = f" ({_ranks(peers)})" if peers else ""
        lines.append(
            f"{reports[rank].place} waits for {sight.waits_for}{of}: {_doing(sight)}, {sight.for_s:.0f} s"
        )
    if len(reports) > SHOWN:
        lines.append(f"and {len(reports) - SHOWN} more ranks wait")
    return lines


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _doing(sight: Sight) -> str:
    return sight.doing or "work between its steps"
