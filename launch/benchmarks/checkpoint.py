"""Benchmark `checkpoint`: what saving costs the training loop.

The quick start's training (pp 2, 4 x 256 tokens, float32, the student with 0.6 of the teacher's FFN channels) in turns of a few
steps: in one a checkpoint is asked for at its beginning, as `checkpoint.every` does, and must be complete at its end; in
the other none is. Both are the same steps of the same models in the same processes. They come in pairs, whose order changes
from one to the next, because the machine's speed drifts; a turn's time is the slowest rank's, its begin common.

What a checkpoint costs is the median of the pairs' differences. Turns are short, because all that a turn's steps vary by falls on its
one checkpoint. Rows: that cost against the time of `every` steps without (to reach: 0.03), the same for the pairs at both quartiles,
and the seconds for which `save` itself keeps the loop, against a step.

Options: `teacher`, `student` (Llama-like folders; the teacher may be `embedded`; by default random ones of the same shapes),
`pp` (2), `microbatches` (4), `rows` (1) in each, `seq_len` (256), `every` (10) steps from one checkpoint to the next, `turn` (3)
steps a turn, `pairs` (12) counted, `limit_s` (900) for a turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from distill.config import ConfigError
from launch.benchmarks._crew import run_jobs, say
from launch.benchmarks._inputs import load_step, microbatches, model_folders
from launch.benchmarks._options import read_options
from launch.benchmarks._pipeline_sides import Job as Training
from parallel.checkpoint import Saver
from parallel.collectives import barrier
from parallel.mesh import Mesh

_BOUND = 0.03
_KEEP = 1


@dataclass(frozen=True)
class _Options:
    """The options."""

    teacher: str = ""
    student: str = ""
    pp: int = 2
    microbatches: int = 4
    rows: int = 1
    seq_len: int = 256
    every: int = 10
    turn: int = 3
    pairs: int = 12
    limit_s: float = 900.0


@dataclass(frozen=True)
class _Turn:
    """Some steps, with a checkpoint beside them or without."""

    training: Training
    saves: bool
    root: str
    """Where checkpoints go."""


class _Result(NamedTuple):
    """What a rank measured: mean seconds of a step of the turn, and those that `save` took of the loop."""

    step_s: float
    save_s: float


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows.

    Args:
        options: as in the module's docstring.
    Raises:
        ConfigError: an unknown option, or a number out of range.
    """
    least = {"pp": 1, "microbatches": 1, "rows": 1, "seq_len": 2, "every": 1, "turn": 1, "pairs": 2}
    chosen = read_options(_Options, options, least=least)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = model_folders(chosen.teacher, chosen.student, Path(folder))
        training = Training(
            side="fill",
            teacher=teacher,
            student=student,
            pp=chosen.pp,
            microbatches=chosen.microbatches,
            rows=chosen.rows,
            seq_len=chosen.seq_len,
            turn=chosen.turn,
        )
        turns = [_Turn(training, saves, folder) for saves in (False, True)]
        # The first pair warms up: `fill` measures and makes its plan in it.
        jobs = [turn for pair in range(1 + chosen.pairs) for turn in turns[:: -1 if pair % 2 else 1]]
        found: defaultdict[bool, list[_Result]] = defaultdict(list)
        for turn, results in run_jobs(
            jobs, size=chosen.pp, begin=Session, limit_s=lambda turn: chosen.limit_s
        ):
            if isinstance(results, str):
                raise ConfigError(f"a turn of the benchmark failed: {results}")
            slowest = _Result(*(max(each) for each in zip(*results, strict=True)))
            found[turn.saves].append(slowest)
            kind = f"saving, {slowest.save_s * 1e3:.0f} ms in save" if turn.saves else "no saving"
            say(f"{kind}: {slowest.step_s:.3f} s a step")
    return _rows(chosen, {saves: each[1:] for saves, each in found.items()})


class Session:
    """One process: its place among the ranks, and the training that it has built."""

    def __init__(self) -> None:
        disable_progress_bar()
        self._mesh = Mesh.create(pp=dist.get_world_size(), dp=1, tp=1)
        self._number = 0
        self._built: Training | None = None

    def __call__(self, turn: _Turn) -> _Result:
        """Take a turn; its ranks start together, and a checkpoint that it asked for is complete at its end."""
        training = turn.training
        if self._built is None:
            self._built = training
            self._step, self._planner = load_step(
                training.config(),
                self._mesh,
                lambda step: microbatches(training.input_ids(step), training.rows),
            )
            # One for all turns, as a round has one.
            self._saver = Saver(Path(turn.root) / "checkpoints", self._step.optimizer, self._mesh, keep=_KEEP)
        barrier(self._mesh.world)
        start_s = time.perf_counter()
        if turn.saves:
            self._saver.save(self._number, {})
        save_s = time.perf_counter() - start_s
        for _ in range(training.turn):
            self._take_step()
        self._saver.wait()
        step_s = (time.perf_counter() - start_s) / training.turn
        assert self._saver.failure is None, self._saver.failure
        return _Result(step_s, save_s)

    def _take_step(self) -> None:
        self._step(self._number)
        plan = self._step.last_plan
        assert plan is not None
        self._planner.observe(plan, self._step.last_events)
        self._number += 1


def _rows(chosen: _Options, found: Mapping[bool, Sequence[_Result]]) -> list[dict[str, Any]]:
    step_s = statistics.median(each.step_s for each in found[False])
    differences = [
        chosen.turn * (saving.step_s - other.step_s)
        for saving, other in zip(found[True], found[False], strict=True)
    ]
    low_s, cost_s, high_s = statistics.quantiles(differences, n=4, method="inclusive")
    save_s = statistics.median(each.save_s for each in found[True])
    case = f"pp {chosen.pp}, {chosen.microbatches} x {chosen.rows} x {chosen.seq_len} tokens, float32"
    peer, steps_s = f"{chosen.every} steps without", chosen.every * step_s
    return [
        _row(f"{case}: a checkpoint, s", cost_s, steps_s, peer, _BOUND),
        _row(f"{case}: a quarter of the pairs below, s", low_s, steps_s, peer, None),
        _row(f"{case}: a quarter of the pairs above, s", high_s, steps_s, peer, None),
        _row(f"{case}: the loop waits in `save`, s", save_s, step_s, "a step", None),
    ]


def _row(case: str, ours: float, peer: float, peer_name: str, bound: float | None) -> dict[str, Any]:
    return {
        "case": case,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ours / peer,
        "bound": bound,
    }
