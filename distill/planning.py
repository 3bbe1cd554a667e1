"""Which plan a run follows: one that needs no costs while it measures, then one made from what was measured.

Decides: the first `pipeline.measure_steps` steps run the teacher inline and measure; the medians of each kind of action on
each stage then make the plan (`fill`), which is equal on all ranks because all make it from the same numbers, and is
compared by its hash. Every `pipeline.replan_every` steps the medians since then are held against those of the plan, and
when one has moved by more than 15 % against the others the plan is made again; a rank that has become slower than the others is
named (`distill.stragglers`). `inline` and `batch` need no costs; for them
the numbers only predict the step. What is planned never changes what is computed.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from distill.config import Config
from distill.stragglers import Stragglers
from parallel.collectives import gather_objects
from parallel.mesh import Mesh
from parallel.pipeline.actions import STEP_END, Kind, Plan, PlanError, Shape
from parallel.pipeline.course import Course
from parallel.pipeline.fill import fill_teacher
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import OCCUPYING, Costs, Event, Timeline, steady_state

DRIFT = 0.15
"""By how much a cost may leave the plan's, relative to the others."""
_SMALL = 0.02
"""Share of the step below which a cost decides nothing."""

Seconds = dict[tuple[Kind, int], float]
"""Median seconds of an action by kind and stage."""


def make_step_plan(config: Config, *, teacher: str | None, num_slices: int) -> Plan:
    """Return the plan of one step, without messages, that the settings ask for.

    Args:
        teacher: `inline`, `batch` or None.
        num_slices: pieces of the teacher's forward on a rank and micro-batch.
    """
    return make_plan(
        schedule=config.pipeline.schedule,
        teacher=teacher,
        num_ranks=config.mesh.pp,
        num_microbatches=config.num_microbatches,
        num_slices=num_slices,
        virtual_stages=config.pipeline.virtual_stages,
    )


def costs_of(seconds: Mapping[tuple[Kind, int], float], shape: Shape, *, latency: float = 0.0) -> Costs:
    """Return measured medians as costs.

    A whole backward is measured as one: it is booked as B, and its W costs nothing.
    """

    def each(kind: Kind, count: int) -> list[float]:
        return [seconds.get((kind, stage), 0.0) for stage in range(count)]

    stages = shape.num_stages
    ends = {kind: each(kind, stages) for kind in STEP_END}
    return Costs(
        forward=each(Kind.F, stages),
        backward_input=each(Kind.B, stages),
        backward_weight=each(Kind.W, stages),
        teacher_slice=each(Kind.K, shape.num_ranks),
        latency=latency,
        # A rank that comes early to a collective only waits there.
        reduce=min(ends[Kind.REDUCE]),
        norm=min(ends[Kind.NORM]),
        step=ends[Kind.STEP],
        gather=ends[Kind.GATHER],
    )


def medians(events: Sequence[Event]) -> Seconds:
    """Return the median seconds of each kind of action on each stage; of slices, which may differ, the mean of theirs."""
    durations: defaultdict[tuple[Kind, int], defaultdict[int | None, list[float]]]
    durations = defaultdict(lambda: defaultdict(list))
    for event in events:
        kind, stage, piece = event.action.kind, event.action.stage, event.action.slice
        durations[kind, stage][piece].append(event.end_s - event.start_s)
    return {
        key: statistics.fmean(statistics.median(each) for each in pieces.values())
        for key, pieces in durations.items()
    }


class Planner:
    """Measures a run's actions, and keeps its course planned.

    Args:
        config: checked settings.
        mesh: all ranks.
        num_slices: pieces the teacher's stage can be run in.
        latency: seconds of a message between stages, equal on all ranks.
    """

    def __init__(self, config: Config, mesh: Mesh, *, num_slices: int, latency: float = 0.0) -> None:
        self._config, self._mesh, self._num_slices, self._latency = config, mesh, num_slices, latency
        mode = config.pipeline.teacher if config.needs_teacher else None
        # A pipeline of one rank has no idle time.
        self._fills = mode == "fill" and mesh.pp.size > 1
        first = make_step_plan(config, teacher="inline" if mode == "fill" else mode, num_slices=num_slices)
        self.course = Course(first, num_steps=config.train.steps)
        self.costs: Costs | None = None
        """What the plan in force was made from, or what predicts it; None while measuring."""
        self.planned: Timeline | None = None
        """A step of the steady state at these costs."""
        self.typical: tuple[Plan, list[Event]] | None = None
        """The last step of the steady state: its plan and this rank's events."""
        self._seen: list[Event] = []
        self._num_seen = 0
        self._measured: Seconds = {}
        self._stragglers = Stragglers(mesh)
        self._said: list[str] = []

    def observe(self, plan: Plan, events: Sequence[Event], *, step: int = 0) -> list[str]:
        """Take note of a step that ran by `plan`; return lines for the user about stages and about a new plan.

        Args:
            step: its number in the run, counted from 1, for what is said.
        Collectives: at the same steps on every rank, gathers over the world.
        """
        self._said = []
        planned = self._take_note(plan, events, step)
        return self._said if planned is None else [*self._said, planned]

    def _take_note(self, plan: Plan, events: Sequence[Event], step: int) -> str | None:
        self._num_seen += 1
        if plan.ahead() == plan.carried:
            self.typical = plan, list(events)
        if self.costs is None and self._num_seen == 1 < self._config.pipeline.measure_steps:
            # The first step warms up.
            return None
        every = self._config.pipeline.replan_every
        if self.costs is not None and not every:
            return None
        self._seen += events
        if self.costs is None:
            if self._num_seen < self._config.pipeline.measure_steps:
                return None
            return self._adopt(self._gather(step))
        if self._num_seen < every:
            return None
        seconds = self._gather(step)
        return self._adopt(seconds) if _drifted(self._measured, seconds) and self._fills else None

    def _gather(self, step: int) -> Seconds:
        """Return the medians of all ranks, and begin anew. Collectives: a gather over the world."""
        per_rank = gather_objects(medians(self._seen), self._mesh.world)
        self._said += self._stragglers.look(per_rank, since=step - self._num_seen + 1)
        self._seen, self._num_seen = [], 0
        together: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)
        for seconds in per_rank:
            for key, value in seconds.items():
                together[key].append(value)
        return {key: statistics.median(values) for key, values in sorted(together.items())}

    def _adopt(self, seconds: Seconds) -> str | None:
        """Plan with these costs. Collectives: a gather over the world."""
        plan = self.course.plan
        remade = self.planned is not None
        costs = costs_of(seconds, plan.shape, latency=self._latency)
        self._measured, self.costs = seconds, costs
        inline = steady_state(plan, costs)
        self.planned = inline
        if not self._fills:
            return None
        student = make_step_plan(self._config, teacher=None, num_slices=self._num_slices)
        filled = fill_teacher(student, costs, num_slices=self._num_slices)
        prints = set(gather_objects(filled.fingerprint(), self._mesh.world))
        if len(prints) > 1:
            raise PlanError(f"the ranks made {len(prints)} different plans from the same costs")
        self.course.change(filled)
        self.planned = steady_state(filled, costs)
        if remade:
            return f"costs have moved: new plan, {self.planned.step_s:.3g} s a step"
        gain = inline.step_s / self.planned.step_s - 1
        return (
            f"plan: the teacher's next batch fills the student's idle time, {self.planned.step_s:.3g} s a step instead "
            f"of {inline.step_s:.3g} s ({gain:+.0%}), bubble {self.planned.bubble_fraction:.1%} instead of "
            f"{inline.bubble_fraction:.1%}"
        )


def _drifted(before: Mapping[tuple[Kind, int], float], now: Mapping[tuple[Kind, int], float]) -> bool:
    """Whether a cost that matters has moved against the others; a factor on all of them changes no plan.

    Of waiting, which plans change, nothing is asked.
    """
    keys = {key for key in before.keys() & now.keys() if key[0] in OCCUPYING}
    total_before, total_now = (sum(seconds[key] for key in keys) for seconds in (before, now))
    if not total_before or not total_now:
        return False
    shares = ((before[key] / total_before, now[key] / total_now) for key in keys)
    return any(max(a, b) > _SMALL and abs(b - a) > DRIFT * a for a, b in shares)
