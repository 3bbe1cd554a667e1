"""The cases of the benchmark `schedule`, and how long a step of each engine takes in theory.

Decides: the engines, the costs of a case (a forward and both gradients of the student F each, the teacher's forward of a
stage and micro-batch K = r F), and the times that measured ones are held against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from launch.benchmarks._torch_pipelining import ENGINES
from parallel.pipeline.actions import Plan
from parallel.pipeline.course import look_ahead_steps
from parallel.pipeline.fill import bound_s, fill_teacher
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs, simulate

_SLICES_PER_FORWARD = 2
_SIMULATED_STEPS = 12


class Ours(NamedTuple):
    """One of our engines: the student's schedule, the teacher's way, and the student's stages a rank."""

    schedule: str
    teacher: str
    virtual_stages: int = 1


OURS = {
    "fill": Ours("1f1b", "fill"),
    "fill_interleaved": Ours("interleaved", "fill", virtual_stages=2),
    "fill_zero_bubble": Ours("zero_bubble", "fill"),
    "inline": Ours("1f1b", "inline"),
    "batch": Ours("1f1b", "batch"),
}


@dataclass(frozen=True)
class Case:
    """A point of the grid: ranks, micro-batches, K / F, and F."""

    pp: int
    m: int
    r: float
    forward_s: float

    def __str__(self) -> str:
        return f"pp {self.pp}, m {self.m}, r {self.r:g}"

    @property
    def num_slices(self) -> int:
        """Pieces of a teacher's forward."""
        return max(1, math.ceil(_SLICES_PER_FORWARD * self.r))

    def costs(self, virtual_stages: int = 1, latency_s: float = 0.0) -> Costs:
        """Return the seconds of a stage's actions."""
        stage_s = self.forward_s / virtual_stages
        return Costs(stage_s, stage_s, stage_s, self.r * self.forward_s / self.num_slices, latency=latency_s)

    def student(self, ours: Ours) -> Plan:
        """Return the student's step without teacher."""
        return make_plan(
            schedule=ours.schedule,
            teacher=None,
            num_ranks=self.pp,
            num_microbatches=self.m,
            virtual_stages=ours.virtual_stages,
        )

    def plan(self, engine: str, latency_s: float = 0.0) -> Plan:
        """Return the step that one of our engines repeats."""
        ours = OURS[engine]
        if ours.teacher == "fill":
            costs = self.costs(ours.virtual_stages, latency_s)
            return fill_teacher(self.student(ours), costs, num_slices=self.num_slices)
        return make_plan(
            schedule=ours.schedule,
            teacher=ours.teacher,
            num_ranks=self.pp,
            num_microbatches=self.m,
            num_slices=self.num_slices,
        )

    def planned_s(self, engine: str, latency_s: float = 0.0) -> float:
        """Return the simulated step time of one of our engines."""
        costs = self.costs(OURS[engine].virtual_stages, latency_s)
        return simulate(self.plan(engine, latency_s), costs, num_steps=_SIMULATED_STEPS).step_s

    def textbook_s(self, engine: str) -> float:
        """Return the step time that an engine has without any overhead; for torch's a step that it cannot beat.

        With the teacher's batch first a rank works m(F + B + K) and waits for the way through the stages and back, of
        which v stages a rank make it 1/v as long, and gradients of weights that are put off fill a part.
        """
        if engine in OURS:
            return self.planned_s(engine)
        forward_s, teacher_s = self.forward_s, self.r * self.forward_s
        back_s = 0.0 if engine == "torch_zero_bubble" else 2 * forward_s
        hop_s = (max(teacher_s, forward_s) + back_s) / ENGINES[engine].virtual_stages
        return self.m * (3 * forward_s + teacher_s) + (self.pp - 1) * hop_s

    def bound_s(self, engine: str) -> float:
        """Return the least step time of a `fill` in any order of the teacher's slices."""
        ours = OURS[engine]
        return bound_s(self.student(ours), self.costs(ours.virtual_stages), num_slices=self.num_slices)


class Job(NamedTuple):
    """A run of one engine: a step to warm up, and those that are counted."""

    case: Case
    engine: str
    steps: int

    @property
    def expected_s(self) -> float:
        """Seconds that it should take."""
        step_s = self.case.textbook_s(self.engine)
        num_steps = self.steps + 1
        if self.engine in OURS:
            num_steps += look_ahead_steps(self.case.plan(self.engine))
        return step_s * num_steps

    def limit_s(self) -> float:
        """Return the seconds after which it counts as hung; torch's stages first meet one by one."""
        return 60 + 3 * self.expected_s
