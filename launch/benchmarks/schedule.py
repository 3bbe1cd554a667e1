"""Benchmark `schedule`: the step time of our pipeline schedules against torch's own engine and against theory.

Stages sleep, so that one machine can run more stages than it has cores: a forward and both gradients of the student take
F each, the teacher's forward of a stage and micro-batch K = r F. Everything else is real: a process a rank, one thread
each, messages of 4 KiB over gloo, an all-reduce for the gradient norm at the end of every step. The engines run one after
the other in the same processes, over and over again; a step's time is that from end to end of two steps in a row, the
median over a run's steps, the slowest rank's. No barrier stands between steps that an engine does not have itself.

Engines:

- `fill`, `fill_interleaved` (two stages a rank), `fill_zero_bubble`: the teacher of coming micro-batches in the idle time
  of the student's 1F1B, interleaved 1F1B or zero-bubble schedule.
- `inline`: the teacher's forward in the slot of the student's; `batch`: the whole batch first. Both under 1F1B.
- `torch_1f1b`, `torch_interleaved`, `torch_zero_bubble`: `torch.distributed.pipelining`, the teacher's batch first
  (`_torch_pipelining.py`); the latter two with two stages a rank of half the time each.

Rows compare a `fill` with the least step time of any order of the slices (bound 1.03), with what the simulator says
for its plan (1.05), and with the other engines (1.0 where theory allows it; not everywhere, because interleaved and
zero-bubble students have shorter steps of their own).

Options: `pp` ([4, 8]), `m_factors` ([1, 2, 4]; micro-batches are multiples of pp), `r` ([1, 2, 4]), `forward_ms` (40),
`steps` (3) counted in a run, `rounds` (1) of runs in which the engines take turns, `engines` (all but `fill_interleaved`
and `batch`). The whole takes about half an hour.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.config import ConfigError
from distill.convert import either, show
from launch.benchmarks._crew import run_jobs, say
from launch.benchmarks._options import read_options
from launch.benchmarks._schedule_cases import OURS, Case, Job
from launch.benchmarks._sleeping import Result, Session
from launch.benchmarks._torch_pipelining import ENGINES

_BOUND, _PLAN_BOUND, _PEER_BOUND = 1.03, 1.05, 1.0
_PEERS = {name: f"torch {engine.schedule}" for name, engine in ENGINES.items()}
_RIVALS = {
    "fill": ("inline", "batch", *ENGINES),
    "fill_interleaved": ("torch_interleaved",),
    "fill_zero_bubble": ("torch_zero_bubble",),
}
Measured = list[Result] | str
"""A run's results by rank, or why it has none."""


@dataclass(frozen=True)
class _Grid:
    """The options."""

    pp: tuple[int, ...] = (4, 8)
    m_factors: tuple[int, ...] = (1, 2, 4)
    r: tuple[float, ...] = (1, 2, 4)
    forward_ms: float = 40
    steps: int = 3
    rounds: int = 1
    engines: tuple[str, ...] = ("fill", "fill_zero_bubble", "inline", *ENGINES)


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of every case.

    Args:
        options: as in the module's docstring.
    Raises:
        ConfigError: an unknown option or engine, or a number out of range.
    """
    grid = _read(options)
    cases = [
        Case(pp, pp * factor, ratio, grid.forward_ms / 1000)
        for pp, factor, ratio in itertools.product(grid.pp, grid.m_factors, grid.r)
    ]
    jobs = [
        Job(case, engine, grid.steps) for case in cases for _ in range(grid.rounds) for engine in grid.engines
    ]
    left_s = sum(job.expected_s for job in jobs)
    say(f"{len(cases)} cases, {len(jobs)} runs, {left_s / 60:.1f} minutes and some overhead")
    runs: dict[Case, dict[str, list[Measured]]] = {case: {} for case in cases}
    for pp in grid.pp:
        of_size = [job for job in jobs if job.case.pp == pp]
        for job, measured in run_jobs(of_size, size=pp, begin=Session, limit_s=Job.limit_s):
            of_case = runs[job.case]
            of_case.setdefault(job.engine, []).append(measured)
            left_s -= job.expected_s
            if sum(map(len, of_case.values())) == grid.rounds * len(grid.engines):
                words = [f"{engine} {_words(_pool(each))}" for engine, each in of_case.items()]
                say(f"{job.case}: {', '.join(words)}; {left_s / 60:.1f} minutes left")
    return [
        row
        for case in cases
        for row in _rows(case, {engine: _pool(each) for engine, each in runs[case].items()})
    ]


def _read(options: dict[str, Any]) -> _Grid:
    """The options over the defaults, checked; a list of one may be given as its only entry."""
    grid = read_options(_Grid, options, least={"pp": 2, "m_factors": 1, "steps": 1, "rounds": 1})
    for name in ("r", "forward_ms"):
        given = getattr(grid, name)
        for value in given if isinstance(given, tuple) else [given]:
            if not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f"{name}={value}; use a number above 0")
    known = (*OURS, *ENGINES)
    for engine in grid.engines:
        if engine not in known:
            raise ConfigError(f"engines={engine}; use {either(known)}")
    if not set(grid.engines) & set(_RIVALS):
        raise ConfigError(f"engines={show(list(grid.engines))} has nothing to compare; add {either(_RIVALS)}")
    return grid


def _rows(case: Case, done: Mapping[str, Measured]) -> Iterator[dict[str, Any]]:
    """The rows of a case: for each `fill` that ran, theory, its plan, and its rivals."""
    for engine, rivals in _RIVALS.items():
        if engine not in done:
            continue
        best_s = case.bound_s(engine)
        where, ours = f"{case}: {engine}, s a step", done[engine]
        yield _row(where, ours, best_s, "least possible", _BOUND)
        if not isinstance(ours, str):
            planned_s = case.planned_s(engine, ours[0].latency_s)
            yield _row(where, ours, planned_s, "as planned", _PLAN_BOUND)
        for rival in (rival for rival in rivals if rival in done):
            can_win = best_s < case.textbook_s(rival)
            name = _PEERS.get(rival, f"ours, {rival}")
            yield _row(where, ours, done[rival], name, _PEER_BOUND if can_win else None)


def _row(
    where: str, ours: Measured, peer: Measured | float, peer_name: str, bound: float | None
) -> dict[str, Any]:
    ours_s, peer_s = _seconds(ours), peer if isinstance(peer, float) else _seconds(peer)
    reasons = [f" ({each})" if isinstance(each, str) else "" for each in (ours, peer)]
    return {
        "case": where + reasons[0],
        "ours": ours_s,
        "peer": peer_s,
        "peer_name": peer_name + reasons[1],
        "ratio": None if ours_s is None or peer_s is None else ours_s / peer_s,
        "bound": bound,
    }


def _pool(runs: list[Measured]) -> Measured:
    """The steps of all rounds as those of one run; the first failure, if there is one."""
    for run_ in runs:
        if isinstance(run_, str):
            return run_
    return [
        Result([step_s for result in ranks for step_s in result.steps_s], ranks[0].latency_s)
        for ranks in zip(*runs, strict=True)
    ]


def _seconds(measured: Measured) -> float | None:
    """The median step of the slowest rank; None of a run that failed."""
    if isinstance(measured, str):
        return None
    return max(statistics.median(result.steps_s) for result in measured)


def _words(measured: Measured) -> str:
    return measured if isinstance(measured, str) else f"{_seconds(measured):.3f} s"
