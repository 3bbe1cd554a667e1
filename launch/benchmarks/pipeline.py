"""Benchmark `pipeline`: distillation of real models over a pipeline, with our plans and with torch's own engine.

Both models compute, in float32, one process a rank and one thread each, on gloo. All sides see the same tokens, minimise
the forward KL to the teacher alone, clip to norm 1 and step fused AdamW; that the losses of their first two steps agree is
checked. The sides live in the same processes and take turns of two steps, because the machine's speed drifts; the ranks start a
turn together, a step's time is the slowest rank's, and a side's is the median of its turns. The first steps are not counted.

Sides:

- `fill`, `inline`, `batch`: our step with the teacher in the student's idle time (planned from what the run's first three
  steps cost), in the student's slot, or the whole batch first.
- `torch_1f1b`: `torch.distributed.pipelining`, the teacher's batch first, then Schedule1F1B (`_pipeline_sides.py`).

Rows compare `fill` with the least step time of any plan at the costs that its counted steps measured, with what its plan takes
at these costs and with what was planned at the costs of the first steps (1.1 for all), and with the other sides (1.0). What it
could gain at most over `inline` stands with `inline`.

Options: `teacher`, `student` (Llama-like folders; the teacher may be `embedded`; by default random ones: SmolLM2-135M's
shape, and the teacher's with 0.6 of its FFN channels), `pp` (2), `microbatches` (8), `rows` (1) in each, `seq_len` (256),
`turns` (5) counted of each side, `sides` (all), `limit_s` (900) for a turn.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from distill.config import ConfigError
from distill.convert import either
from launch.benchmarks._crew import run_jobs, say
from launch.benchmarks._inputs import check_losses, model_folders
from launch.benchmarks._options import read_options
from launch.benchmarks._pipeline_sides import MEASURED_STEPS, OURS, PEER, Job, Result, Session

_SIDES = (*OURS, PEER)
_NAMES = {"inline": "ours, inline", "batch": "ours, batch", PEER: "torch Schedule1F1B"}
_BOUND, _PEER_BOUND = 1.1, 1.0
_TURN = 2


@dataclass(frozen=True)
class _Options:
    """The options."""

    teacher: str = ""
    student: str = ""
    pp: int = 2
    microbatches: int = 8
    rows: int = 1
    seq_len: int = 256
    turns: int = 5
    sides: tuple[str, ...] = _SIDES
    limit_s: float = 900.0


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all sides.

    Args:
        options: as in the module's docstring.
    Raises:
        ConfigError: an unknown option or side, or a number out of range.
    """
    chosen = _read(options)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = model_folders(chosen.teacher, chosen.student, Path(folder))
        job = Job(
            teacher=teacher,
            student=student,
            pp=chosen.pp,
            microbatches=chosen.microbatches,
            rows=chosen.rows,
            seq_len=chosen.seq_len,
        )
        # As many steps as `fill` needs to measure and to enter its plan.
        jobs = [replace(job, side=side, turn=MEASURED_STEPS + 1) for side in chosen.sides]
        jobs += [replace(job, side=side, turn=_TURN) for _ in range(chosen.turns) for side in chosen.sides]
        runs: defaultdict[str, list[list[Result]]] = defaultdict(list)
        failures: dict[str, str] = {}
        for done, results in run_jobs(
            jobs, size=chosen.pp, begin=Session, limit_s=lambda job: chosen.limit_s
        ):
            if isinstance(results, str):
                failures[done.side] = results
                say(f"{done.side}: {results}")
                continue
            runs[done.side].append(results)
            step_s = max(result.step_s for result in results)
            say(f"{done.side}: {step_s:.3f} s a step, {job.num_tokens / step_s:.1f} tokens/s")
    # The first loss shows the models and the data, the second also the update.
    check_losses({side: each[0][-1].losses[:2] for side, each in runs.items()})
    return list(_rows(job, runs, failures))


def _read(options: Mapping[str, Any]) -> _Options:
    """The options over the defaults, checked."""
    least = {"pp": 2, "microbatches": 1, "rows": 1, "seq_len": 2, "turns": 1}
    chosen = read_options(_Options, options, least=least)
    if PEER in chosen.sides and chosen.microbatches < chosen.pp:
        raise ConfigError(
            f"microbatches={chosen.microbatches} is less than pp={chosen.pp}, which Schedule1F1B refuses"
        )
    for side in chosen.sides:
        if side not in _SIDES:
            raise ConfigError(f"sides={side}; use {either(_SIDES)}")
    if "fill" not in chosen.sides:
        raise ConfigError("sides must name fill, which the others are compared with")
    return chosen


def _rows(
    job: Job, runs: Mapping[str, list[list[Result]]], failures: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    case = f"pp {job.pp}, {job.microbatches} x {job.rows} x {job.seq_len} tokens, float32: fill, s a step"
    if "fill" in failures:
        yield _row(f"{case} ({failures['fill']})", None, None, "", None)
        return
    ours_s = _seconds(runs["fill"])
    theory = runs["fill"][-1][0].theory
    assert theory is not None, "fill measured its costs"
    yield _row(case, ours_s, theory.bound_s, "least possible", _BOUND)
    yield _row(case, ours_s, theory.replayed_s, "its plan", _BOUND)
    yield _row(case, ours_s, theory.planned_s, "its plan, from the first steps", _BOUND)
    for side, name in _NAMES.items():
        if side in failures:
            yield _row(case, ours_s, None, f"{name} ({failures[side]})", _PEER_BOUND)
        elif side in runs:
            if side == "inline":
                name += f" (ratio {theory.bound_s / theory.inline_s:.2f} at best)"
            yield _row(case, ours_s, _seconds(runs[side]), name, _PEER_BOUND)


def _row(
    case: str, ours_s: float | None, peer_s: float | None, peer_name: str, bound: float | None
) -> dict[str, Any]:
    ratio = None if ours_s is None or peer_s is None else ours_s / peer_s
    return {
        "case": case,
        "ours": ours_s,
        "peer": peer_s,
        "peer_name": peer_name,
        "ratio": ratio,
        "bound": bound,
    }


def _seconds(runs: list[list[Result]]) -> float:
    """The median of the counted turns, each the slowest rank's."""
    return statistics.median(max(result.step_s for result in ranks) for ranks in runs[1:])
