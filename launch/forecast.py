"""How long a layout's step takes with the teacher inline, before the batch, or in the bubbles, and what that tells the user.

Decides the numbers that `launch.plan` reports, and its sentences. Everything follows from the costs of the pipeline's
actions, in the steady state that steps settle into. Imports no torch. Who made the costs is not known here, except
whether the layers were split by the planner, by the user, or outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from distill.config import Config
from distill.convert import show
from distill.costs import MOST_SLICES, choose_slices
from parallel.pipeline.actions import Kind, Plan
from parallel.pipeline.fill import bound_s, fill_teacher
from parallel.pipeline.schedules import TEACHER, make_plan
from parallel.pipeline.simulate import Costs, Timeline, steady_state

WAYS = (*TEACHER, "fill")
_WORTH_IT, _UNEVEN, _OFF_BOUND = 1.03, 1.1, 1.02
_CLOSE = 1e-6


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh, and the micro-batches that each of its pipelines runs in a step."""

    pp: int
    dp: int
    tp: int
    num_microbatches: int

    @staticmethod
    def of(config: Config) -> Layout:
        """Return the layout of checked settings, `mesh.dp` filled in."""
        mesh = config.mesh
        return Layout(mesh.pp, mesh.dp, mesh.tp, config.num_microbatches)

    def __str__(self) -> str:
        return f"pp {self.pp} dp {self.dp} tp {self.tp}"


@dataclass(frozen=True)
class Job:
    """What a step of a layout is made of."""

    layout: Layout
    schedule: str
    virtual_stages: int
    costs_with: Callable[[int], Costs]
    """Seconds, with the teacher in a number of slices."""
    has_teacher: bool = True
    num_slices: int | None = None
    """None chooses."""
    most_slices: int = MOST_SLICES
    microbatch_size: int = 1
    """Rows, for advice on the global batch."""
    split_by: Literal["planner", "user", "nobody"] = "nobody"
    """Who decided which layers a stage holds; nobody when only costs are known."""
    student_layers: tuple[int, ...] | None = None
    """Layers on each stage, and of the teacher on each rank; None when only costs are known."""
    teacher_layers: tuple[int, ...] | None = None
    bytes_a_tensor: int | None = None
    """Of a hidden state of the teacher for one micro-batch; None when only costs are known."""
    alternative: Job | None = None
    """The same with layers split by the planner, where the user has split them."""
    state_bytes: int | None = None
    """Weights of both models, gradients and moments on the fullest rank; None when only costs are known."""


@dataclass(frozen=True)
class Forecast:
    """A step of a layout in each way to run the teacher."""

    layout: Layout
    num_slices: int
    ideal_s: float
    """Work of the busiest rank: m * (F + B + K)."""
    bound_s: float
    """The least time that any order of the teacher's slices could reach."""
    timelines: dict[str, Timeline]
    """By `WAYS`. Where there is nothing to fill, `fill` is `inline`; without a teacher all are the student's step."""
    queue_tensors: int
    """Teacher outputs that wait on the last rank at most, and tensors between ranks and slices that a step hands to the next."""
    advice: tuple[str, ...]

    fills: bool
    """Whether there is a teacher and idle time to run it in."""

    @property
    def step_s(self) -> dict[str, float]:
        """Seconds from step to step in each way."""
        return {way: self.timelines[way].step_s for way in WAYS}

    @property
    def bubble_fraction(self) -> dict[str, float]:
        """Idle share of a step in each way."""
        return {way: self.timelines[way].bubble_fraction for way in WAYS}

    @property
    def gain(self) -> float:
        """How many times as fast as inline filling is."""
        return self.step_s["inline"] / self.step_s["fill"]


def forecast(job: Job) -> Forecast:
    """Plan and time a step in each way.

    Raises:
        ValueError: costs that do not fit the sizes, or none that takes any time.
    """
    layout, student = job.layout, _plan(job, None)
    fills = job.has_teacher and layout.pp > 1
    num_slices = job.num_slices or 1
    if max(_rank_work_s(student, job.costs_with(1))) <= 0:
        raise ValueError("all are zero, so a step takes no time")
    if fills and job.num_slices is None:
        num_slices = choose_slices(student, job.costs_with, most=job.most_slices)
    whole, sliced = job.costs_with(1), job.costs_with(num_slices)
    if not job.has_teacher:
        whole = sliced = replace(sliced, teacher_slice=0.0)
    timelines = {way: steady_state(_plan(job, way), whole) for way in TEACHER}
    timelines["fill"], queue_tensors = timelines["inline"], int(job.has_teacher)
    if fills:
        filled = fill_teacher(student, sliced, num_slices=num_slices)
        timelines["fill"] = steady_state(filled, sliced)
        queue_tensors = timelines["fill"].peak_teacher_queue + _carried_tensors(filled)
    work_s = _rank_work_s(student, whole)
    found = Forecast(
        layout=layout,
        num_slices=num_slices,
        ideal_s=layout.num_microbatches * max(work_s),
        bound_s=bound_s(student, sliced, num_slices=num_slices),
        timelines=timelines,
        queue_tensors=queue_tensors,
        advice=(),
        fills=fills,
    )
    return replace(found, advice=tuple(_advice(job, found, student, whole)))


def seconds(value: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.4g} {unit}"
    return f"{value * 1e6:.4g} us"


def _plan(job: Job, way: str | None, num_microbatches: int | None = None) -> Plan:
    """Return a step's plan without messages; without a teacher every way is the student's."""
    return make_plan(
        schedule=job.schedule,
        teacher=way if job.has_teacher else None,
        num_ranks=job.layout.pp,
        num_microbatches=num_microbatches or job.layout.num_microbatches,
        virtual_stages=job.virtual_stages,
    )


def _rank_work_s(student: Plan, costs: Costs) -> list[float]:
    """Return F + B + K of each rank for one micro-batch, with the teacher whole."""
    shape, table = student.shape, costs.table(student.shape)
    return [
        table[Kind.K][rank]
        + sum(table[kind][stage] for kind in (Kind.F, Kind.B, Kind.W) for stage in shape.stages_of(rank))
        for rank in range(shape.num_ranks)
    ]


def _carried_tensors(filled: Plan) -> int:
    """Count hidden states that the end of a step finds between two ranks, or between two slices of one rank."""
    shape, count = filled.shape, 0
    first, last = shape.slices[0], shape.last_slice
    begun = [0] * (shape.num_ranks + 1)
    ended = [0] * shape.num_ranks
    for action in filled.carried:
        begun[action.stage] += action.slice == first
        ended[action.stage] += action.slice == last
    for rank in range(shape.num_ranks):
        between_ranks = ended[rank] - begun[rank + 1] if rank + 1 < shape.num_ranks else 0
        count += between_ranks + begun[rank] - ended[rank]
    return count


def _advice(job: Job, found: Forecast, student: Plan, costs: Costs) -> list[str]:
    """Return what the numbers say, a sentence each."""
    if not job.has_teacher:
        return ["loss.alpha=1 needs no teacher, so there is nothing to fill bubbles with."]
    if job.layout.pp == 1:
        return ["mesh.pp=1 has no bubbles to fill: the teacher runs inline."]
    return [
        _advice_on_filling(found, _rank_work_s(student, costs), costs),
        *_advice_on_microbatches(job, found, student, costs),
        *_advice_on_balance(job, _rank_work_s(student, costs)),
        *_advice_on_layers(job, student, costs),
        *_advice_on_slices(job, found),
    ]


def _advice_on_filling(found: Forecast, work_s: list[float], costs: Costs) -> str:
    layout, fill_s = found.layout, found.step_s["fill"]
    if found.gain >= _WORTH_IT:
        inline_s = found.step_s["inline"]
        return (
            f"Filling is worth it: {seconds(fill_s)} a step instead of {seconds(inline_s)}, {found.gain:.2f} times as fast "
            "as pipeline.teacher=inline."
        )
    m, p = layout.num_microbatches, layout.pp
    teacher_s = costs.teacher_slice
    if isinstance(teacher_s, float | int):
        teacher_s = [teacher_s] * p
    if (p - 1) / m < _WORTH_IT - 1:
        reason = (
            f"{m} micro-batches are many for {p} stages, and what can be gained is (pp - 1) / micro-batches"
        )
    elif sum(teacher_s) < 0.1 * sum(work_s):
        reason = f"the teacher is only {sum(teacher_s) / sum(work_s):.1%} of the work"
    else:
        reason = "the step has little idle time that the teacher could use"
    return f"Filling is NOT worth it: {found.gain - 1:+.1%} over inline, as {reason}; pipeline.teacher=inline needs no queue."


def _advice_on_microbatches(job: Job, found: Forecast, student: Plan, costs: Costs) -> list[str]:
    """Say from which number of micro-batches on a step would have no bubble."""
    layout = found.layout
    enough = _bubble_free_microbatches(job, student, costs)
    if enough is None or enough <= layout.num_microbatches:
        return []
    rows = enough * layout.dp * job.microbatch_size
    sentence = (
        f"{layout.num_microbatches} micro-batches are too few for a step without bubbles: the teacher fits into the "
        f"student's idle time and costs nothing, and {found.bubble_fraction['fill']:.0%} stay idle. From {enough} on "
        f"(train.global_batch_size={rows}) filling leaves none but what ranks wait for the busiest one."
    )
    return [sentence]


def _bubble_free_microbatches(job: Job, student: Plan, costs: Costs) -> int | None:
    """Return the least m at which the busiest rank's work is as long as the student's step; None if it never is.

    The student's step is a fixed part and a part for each micro-batch, once the pipeline fills up: r * m >= 3 * (p - 1)
    when all stages are alike.
    """
    alone = replace(costs, teacher_slice=0.0)
    shape, table = student.shape, costs.table(student.shape)
    work_s = _rank_work_s(student, costs)
    busiest = work_s.index(max(work_s))
    end_s = sum(table[Kind.STEP][stage] for stage in shape.stages_of(busiest))

    def student_s(num_microbatches: int) -> float:
        return bound_s(_plan(job, None, num_microbatches), alone, num_slices=1)

    filled_up = 2 * shape.num_ranks
    slope_s = (student_s(2 * filled_up) - student_s(filled_up)) / filled_up
    spare_s = work_s[busiest] - slope_s
    if spare_s <= _CLOSE * slope_s:
        return None
    fixed_s = student_s(filled_up) - slope_s * filled_up
    enough = max(1, math.ceil((fixed_s - end_s) / spare_s - _CLOSE))
    # Shorter steps do not fill the pipeline up, and zero_bubble then has more idle time.
    while enough < filled_up and student_s(enough) > (enough * work_s[busiest] + end_s) * (1 + _CLOSE):
        enough += 1
    return enough


def _advice_on_balance(job: Job, work_s: list[float]) -> list[str]:
    """Say which rank the others wait for."""
    mean_s = sum(work_s) / len(work_s)
    worst = work_s.index(max(work_s))
    if work_s[worst] <= _UNEVEN * mean_s:
        return []
    remedy = {
        "nobody": "give it fewer layers with pipeline.student_layers or pipeline.teacher_layers",
        "user": "pipeline.student_layers and pipeline.teacher_layers make it so",
        "planner": "no split of whole layers is more even; fewer stages are (mesh.pp)",
    }[job.split_by]
    sentence = (
        f"Rank {worst} has {work_s[worst] / mean_s:.2f} times the mean work of a rank ({seconds(work_s[worst])} a "
        f"micro-batch), and the others wait for it: {remedy}."
    )
    return [sentence]


def _advice_on_layers(job: Job, student: Plan, costs: Costs) -> list[str]:
    """Say what the planner's split would bring instead of the user's."""
    if job.alternative is None:
        return []
    now_s = bound_s(student, costs, num_slices=1)
    then_s = bound_s(student, job.alternative.costs_with(1), num_slices=1)
    if now_s < _WORTH_IT * then_s:
        return []
    sentence = (
        f"With pipeline.student_layers={show(job.alternative.student_layers)} "
        f"pipeline.teacher_layers={show(job.alternative.teacher_layers)} (null chooses them) the bound is "
        f"{seconds(then_s)} a step instead of {seconds(now_s)}."
    )
    return [sentence]


def _advice_on_slices(job: Job, found: Forecast) -> list[str]:
    fill_s = found.step_s["fill"]
    if fill_s <= _OFF_BOUND * found.bound_s:
        return []
    sentence = f"Filling stays {fill_s / found.bound_s - 1:.1%} above the bound of {seconds(found.bound_s)}"
    if job.num_slices is None:
        return [f"{sentence}, with the best of up to {job.most_slices} slices."]
    pieces = "1 slice" if found.num_slices == 1 else f"{found.num_slices} slices"
    return [f"{sentence} with the teacher in {pieces}; pipeline.slices=null tries others."]
