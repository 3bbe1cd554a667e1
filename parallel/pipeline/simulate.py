"""How long a plan takes and what it holds, from the costs of its actions; no clock, no device.

Decides: when each action starts and ends. A rank runs its list in order. F, B, W, K and STEP occupy it; a SEND leaves at
once and arrives `latency` later; REDUCE, NORM and GATHER run beside the list and hold up only what needs them. NORM
ends on all ranks after the last REDUCE of any stage. The next step's F needs the GATHER of this one, its K does not.
Assumes that links and collectives do not contend, and that costs are the same for every micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.pipeline.actions import COMPUTE, RECVS, SENDS, STEP_END, Action, Kind, Plan, Shape
from parallel.pipeline.lower import add_communication, requirements
from parallel.pipeline.order import walk
from parallel.pipeline.validate import count_peaks

OCCUPYING = COMPUTE | {Kind.STEP}


@dataclass(frozen=True)
class Costs:
    """Durations in seconds; each is one number for all stages, or one entry a stage.

    Args:
        forward: F of one micro-batch; the embedding belongs to the first stage.
        backward_input: B; both heads and the loss belong to the last stage.
        backward_weight: W.
        teacher_slice: one K, an entry a rank.
        latency: from the end of an action to the arrival of its message on the next rank.
        reduce, norm, step, gather: the end of the step.
    """

    forward: float | Sequence[float]
    backward_input: float | Sequence[float]
    backward_weight: float | Sequence[float]
    teacher_slice: float | Sequence[float] = 0.0
    latency: float = 0.0
    reduce: float | Sequence[float] = 0.0
    norm: float | Sequence[float] = 0.0
    step: float | Sequence[float] = 0.0
    gather: float | Sequence[float] = 0.0

    def table(self, shape: Shape) -> dict[Kind, tuple[float, ...]]:
        """Return the seconds of each kind that takes time, an entry a stage (K: an entry a rank).

        Raises:
            ValueError: a list has another length, or a cost is negative.
        """
        fields = dict(zip((Kind.F, Kind.B, Kind.W, Kind.K, *STEP_END), _COST_FIELDS, strict=True))
        return {
            kind: self._each(name, shape.num_ranks if kind is Kind.K else shape.num_stages)
            for kind, name in fields.items()
        }

    def _each(self, name: str, count: int) -> tuple[float, ...]:
        value = getattr(self, name)
        each = tuple(value) if isinstance(value, Sequence) else (value,) * count
        if len(each) != count:
            raise ValueError(f"{name} has {len(each)} entries for {count} stages")
        if min(each) < 0:
            raise ValueError(f"{name}={value} must not be negative")
        return each


_COST_FIELDS = (
    "forward",
    "backward_input",
    "backward_weight",
    "teacher_slice",
    "reduce",
    "norm",
    "step",
    "gather",
)


class Event(NamedTuple):
    """When a rank did an action, planned or measured."""

    rank: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A step in time.

    Args:
        events: of the last simulated step, in ascending order of start, SEND events last as long as their latency.
        step_s: the time from step to step; of a single step its makespan.
        bubble_fraction: share of num_ranks * step_s in which ranks neither compute nor run the optimizer.
        peak_activations: micro-batches between F and W, an entry a stage.
        peak_teacher_queue: teacher outputs that wait on the last rank.
    """

    events: tuple[Event, ...]
    step_s: float
    bubble_fraction: float
    peak_activations: tuple[int, ...]
    peak_teacher_queue: int


def simulate(plan: Plan, costs: Costs, *, num_steps: int = 1) -> Timeline:
    """Return when everything of a plan happens.

    Args:
        plan: with or without messages; they are added where they are missing.
        costs: seconds.
        num_steps: steps in a row, of which the last is returned. With more than one, `step_s` is the mean time from
            step to step over the later half: the steady state, in which a plan with look-ahead is meant to be judged.
    Raises:
        PlanError: the plan cannot run.
    """
    clock = _Clock(plan if plan.lowered else add_communication(plan), costs)
    steps = [clock.run() for _ in range(num_steps)]
    events = steps[-1]
    ends = [max((event.end_s for event in step), default=0.0) for step in steps]
    half = num_steps // 2
    step_s = (ends[-1] - ends[half - 1]) / (num_steps - half) if num_steps > 1 else ends[-1]
    events.sort(key=lambda event: (event.start_s, event.rank))
    peaks = count_peaks(plan)
    return Timeline(
        events=tuple(events),
        step_s=step_s,
        bubble_fraction=bubble_fraction(events, num_ranks=plan.shape.num_ranks, step_s=step_s),
        peak_activations=peaks.activations,
        peak_teacher_queue=peaks.teacher_outputs,
    )


def steady_state(plan: Plan, costs: Costs) -> Timeline:
    """Return a step as it goes once the steps before it have settled."""
    return simulate(plan, costs, num_steps=6)


def bubble_fraction(events: Sequence[Event], *, num_ranks: int, step_s: float) -> float:
    """Return the share of a step in which ranks neither compute nor run the optimizer.

        1 - busy / (num_ranks * step_s)

    Args:
        events: of all ranks and one step, planned or measured.
        step_s: the time from step to step.
    """
    return max(0.0, 1 - busy_seconds(events) / (num_ranks * step_s)) if step_s else 0.0


def busy_seconds(events: Sequence[Event]) -> float:
    """Return for how long ranks computed or ran the optimizer, added over the ranks; what overlaps on a rank counts once."""
    total, end_s = 0.0, -math.inf
    occupying = (event for event in events if event.action.kind in OCCUPYING)
    rank: int | None = None
    for event in sorted(occupying, key=lambda event: (event.rank, event.start_s)):
        end_s = end_s if event.rank == rank else -math.inf
        total += max(0.0, event.end_s - max(event.start_s, end_s))
        rank, end_s = event.rank, max(end_s, event.end_s)
    return total


class _Entry(NamedTuple):
    """An action with all that its time depends on."""

    rank: int
    action: Action
    needs: tuple[Action, ...]
    duration_s: float
    holds_rank: bool


class _Clock:
    """The time of each rank and of each action done, step after step; actions are numbered as seen from the step."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self._shape = plan.shape
        self._entries = list(_entries(plan, costs))
        self._free = [0.0] * plan.shape.num_ranks
        self._parameters = [0.0] * plan.shape.num_stages
        self._end: dict[Action, float] = {}

    def run(self) -> list[Event]:
        """Return the events of one step, and turn to the next."""
        end, events = self._end, []
        for rank, action, needs, duration_s, holds_rank in self._entries:
            start = self._free[rank]
            for need in needs:
                # What an earlier step has done but this clock has not seen was there from the start.
                start = max(start, end.get(need, 0.0))
            if action.kind is Kind.F:
                start = max(start, self._parameters[action.stage])
            end[action] = start + duration_s
            if holds_rank:
                self._free[rank] = start + duration_s
            events.append(Event(rank, action, start, start + duration_s))
        self._turn()
        return events

    def _turn(self) -> None:
        """Keep what the next step needs: its parameters, and the teacher's work ahead under its new numbers."""
        num_microbatches, end = self._shape.num_microbatches, self._end
        self._parameters = [
            end.get(Action(stage, Kind.GATHER), 0.0) for stage in range(self._shape.num_stages)
        ]
        self._end = {
            action._replace(microbatch=action.microbatch - num_microbatches): time
            for action, time in end.items()
            if action.microbatch is not None and action.microbatch >= num_microbatches
        }


def _entries(plan: Plan, costs: Costs) -> Iterator[_Entry]:
    """The plan's actions in an order in which they can run."""
    table = costs.table(plan.shape)
    for rank, _, action in walk(plan):
        duration_s = table[action.kind][action.stage] if action.kind in table else 0.0
        if action.kind in SENDS:
            duration_s = costs.latency
        needs = requirements(action, plan.shape, lowered=True)
        yield _Entry(rank, action, needs, duration_s, action.kind in OCCUPYING or action.kind in RECVS)
