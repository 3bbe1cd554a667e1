from __future__ import annotations

import pytest

from parallel.pipeline.cycle import Student
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs, simulate

UNIT = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, teacher_slice=1.0)


def student(schedule: str, num_ranks: int, num_microbatches: int, costs: Costs, **sizes: int) -> Student:
    num_slices = sizes.pop("num_slices", 1)
    plan = make_plan(
        schedule=schedule, teacher=None, num_ranks=num_ranks, num_microbatches=num_microbatches, **sizes
    )
    return Student(plan, costs, num_slices=num_slices)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble", "interleaved"])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 1), (4, 6), (5, 3), (8, 9)])
def test_without_slices_it_keeps_the_time_of_the_simulator(
    schedule: str, num_ranks: int, num_microbatches: int
) -> None:
    costs = Costs(0.9, 1.1, 0.7, latency=0.2, reduce=0.5, norm=0.1, step=0.4, gather=0.3)
    virtual_stages = 2 if schedule == "interleaved" else 1
    made = student(schedule, num_ranks, num_microbatches, costs, virtual_stages=virtual_stages)
    plan = make_plan(
        schedule=schedule,
        teacher=None,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        virtual_stages=virtual_stages,
    )
    step_s = made.replay([0] * len(made.operations)).step_s
    assert step_s == pytest.approx(simulate(plan, costs, num_steps=6).step_s)


def test_whole_backwards_are_one_operation_and_bare_ones_are_two() -> None:
    whole = student("1f1b", 2, 2, UNIT)
    assert [len(each.actions) for each in whole.operations if each.rank == 0][:4] == [1, 1, 2, 2]
    bare = student("zero_bubble", 2, 2, UNIT)
    assert all(len(each.actions) == 1 for each in bare.operations if each.rank == 1)


def test_the_bound_is_the_larger_of_work_and_student() -> None:
    assert student("1f1b", 4, 8, UNIT, num_slices=4).bound_s == 8 * 7
    assert student("1f1b", 4, 4, UNIT).bound_s == 21
    assert student("1f1b", 4, 4, Costs(1.0, 1.0, 1.0, norm=5.0)).bound_s == 26
    uneven = Costs([1.0, 1.0, 1.0, 3.0], 1.0, 1.0, 4.0)
    assert student("1f1b", 4, 8, uneven).bound_s == 8 * 9


def test_settling_reaches_the_bound_and_closes() -> None:
    made = student("1f1b", 8, 16, UNIT, num_slices=4)
    cycle = made.settle(look_ahead=8 * 4, overrun=1.0)
    assert cycle.step_s == pytest.approx(112)
    per_rank = [0] * 8
    for operation, count in zip(made.operations, cycle.counts, strict=True):
        per_rank[operation.rank] += count
    assert per_rank == [64] * 8


def test_less_look_ahead_costs_time() -> None:
    made = student("1f1b", 8, 16, UNIT, num_slices=4)
    times = [made.settle(look_ahead=each * 4, overrun=1.0).step_s for each in (1, 3, 5, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[1] > times[2] > times[3]


def test_no_overrun_never_delays_a_student_that_is_the_bottleneck() -> None:
    costs = Costs(1.0, 1.0, 1.0, 0.37)
    made = student("1f1b", 8, 8, costs, num_slices=2)
    assert made.settle(look_ahead=18, overrun=0.0).step_s == pytest.approx(made.bound_s) == pytest.approx(45)
    assert made.settle(look_ahead=18, overrun=1.0).step_s > 45


def test_slices_without_cost_take_no_time() -> None:
    made = student("1f1b", 4, 6, Costs(1.0, 1.0, 1.0, 0.0), num_slices=2)
    assert made.settle(look_ahead=4, overrun=1.0).step_s == 27
