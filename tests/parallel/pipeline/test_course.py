"""The plans of a run: every micro-batch's teacher once, whatever the look-ahead, the length of the run, and changes of plan."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from parallel.pipeline.actions import Kind, Plan
from parallel.pipeline.course import Course
from parallel.pipeline.fill import fill_teacher
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1), ("interleaved", 2)]


def _plans(num_ranks: int, num_microbatches: int, schedule: str, virtual_stages: int) -> tuple[Plan, Plan]:
    """A filled plan, and the inline one of the same shape."""
    shape = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "virtual_stages": virtual_stages}
    costs = Costs(1.0, 1.0, 1.0, teacher_slice=0.25, latency=0.1, reduce=1.0, step=0.5)
    student = make_plan(schedule=schedule, teacher=None, **shape)
    inline = make_plan(schedule=schedule, teacher="inline", num_slices=2, **shape)
    return fill_teacher(student, costs, num_slices=2), inline


def _run(course: Course, changes: dict[int, Plan] | None = None) -> list[tuple[Plan, int]]:
    runs = []
    for step in range(course.num_steps):
        if changes and step in changes:
            course.change(changes[step])
        runs += course.of(step)
    return runs


def _teacher_runs(runs: list[tuple[Plan, int]]) -> Counter[tuple[int, int, int | None]]:
    """How often each slice of each micro-batch of the run is computed on each rank."""
    return Counter(
        (action.stage, action.microbatch + first, action.slice)
        for plan, first in runs
        for actions in plan.ranks
        for action in actions
        if action.kind is Kind.K
    )


@pytest.mark.parametrize(("schedule", "virtual_stages"), SCHEDULES)
def test_the_teacher_runs_once_for_each_microbatch(schedule: str, virtual_stages: int) -> None:
    for num_ranks, num_microbatches in itertools.product((1, 2, 4), (1, 2, 5, 8)):
        filled, inline = _plans(num_ranks, num_microbatches, schedule, virtual_stages)
        expected = {
            num_steps: Counter(
                itertools.product(range(num_ranks), range(num_steps * num_microbatches), range(2))
            )
            for num_steps in (1, 2, 5, 9)
        }
        for num_steps in (1, 2, 5):
            assert _teacher_runs(_run(Course(filled, num_steps=num_steps))) == expected[num_steps]
        changed = _run(Course(filled, num_steps=9), {1: inline, 6: filled, 7: inline})
        assert _teacher_runs(changed) == expected[9], (schedule, num_ranks, num_microbatches)
        if num_ranks == 2 and num_microbatches == 8:
            assert {plan.teacher for plan, _ in changed} == {"fill", "inline"}


def test_a_run_begins_anywhere_and_ends_without_look_ahead() -> None:
    filled, _ = _plans(4, 4, "1f1b", 1)
    course = Course(filled, num_steps=20)
    (prologue, before), (first, start) = course.of(7)
    assert (before, start) == (6 * 4, 7 * 4)
    assert {action.kind for actions in prologue.ranks for action in actions} == {
        *(Kind.K, Kind.SEND_K, Kind.RECV_K)
    }
    assert prologue.ahead() == first.carried == filled.carried
    for step in range(8, 20):
        ((plan, start),) = course.of(step)
        assert start == 4 * step
    assert not plan.ahead()


def test_a_step_out_of_turn_is_refused() -> None:
    filled, inline = _plans(2, 4, "1f1b", 1)
    course = Course(filled, num_steps=5)
    course.of(0)
    with pytest.raises(ValueError, match="step 3 of 5; the teacher is ahead for 1"):
        course.of(3)
    with pytest.raises(ValueError, match="step 5 of 5"):
        Course(inline, num_steps=5).of(5)


def test_plans_are_proven_once() -> None:
    filled, _ = _plans(2, 4, "1f1b", 1)
    course = Course(filled, num_steps=50)
    handed_out = [plan for plan, _ in _run(course)[1:]]
    assert len({id(plan) for plan in handed_out}) <= 4
