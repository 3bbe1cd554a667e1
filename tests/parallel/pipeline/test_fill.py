from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from torch.distributed.pipelining.schedules import _Action, _simulate_comms_compute, _validate_schedule

from parallel.pipeline.actions import Action, Kind, Plan, parse
from parallel.pipeline.cycle import Student
from parallel.pipeline.fill import Limits, _look_ahead, bound_s, fill_teacher, prologue, truncate
from parallel.pipeline.lower import add_communication
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.trace import to_torch_csv
from parallel.pipeline.validate import check_deadlock, smallest_window, validate
from tests.pace import quiet_seconds
from tests.parallel.pipeline.test_simulate import ROWS
from tests.parallel.pipeline.test_validate import run_with_random_delays


def student(schedule: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Plan:
    return make_plan(
        schedule=schedule,
        teacher=None,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        virtual_stages=virtual_stages,
    )


def unit(r: float, num_slices: int, v: int = 1, **costs: float) -> Costs:
    return Costs(1 / v, 1 / v, 1 / v, r / num_slices, **costs)


def uneven(p: int, r: float, num_slices: int, seed: int) -> Costs:
    rng = random.Random(seed)

    def each(mean: float) -> list[float]:
        return [mean * rng.uniform(0.85, 1.15) for _ in range(p)]

    end = {"reduce": 2.0, "norm": 0.1, "step": 1.0, "gather": 1.0}
    return Costs(each(1), each(1), each(1), each(r / num_slices), latency=0.1, **end)


def steps(cycle: Plan, num_steps: int) -> list[Plan]:
    """A whole run: what comes before the first step, and all steps, with nothing done for data that never comes."""
    return [
        truncate(prologue(cycle), num_steps + 1),
        *(truncate(cycle, num_steps - done) for done in range(num_steps)),
    ]


def strung(plans: list[Plan]) -> Plan:
    """Plans with messages as one, micro-batches numbered through."""
    size = plans[0].shape.num_microbatches
    ranks = [
        [
            action
            if action.microbatch is None
            else action._replace(microbatch=action.microbatch + index * size)
            for index, plan in enumerate(plans)
            for action in plan.ranks[rank]
        ]
        for rank in range(plans[0].shape.num_ranks)
    ]
    return replace(plans[0], ranks=tuple(map(tuple, ranks)))


def test_no_slower_than_the_oracle_and_never_below_the_bound() -> None:
    rows = [row for row in ROWS if row["variant"] == "fill"]
    assert len(rows) == 108
    for row in rows:
        p, m, r, q = int(row["p"]), int(row["m"]), float(row["r"]), int(row["slices"])
        costs = unit(r, q, latency=float(row["latency"]), norm=float(row["step_end"]))
        plan = student("1f1b", p, m)
        assert bound_s(plan, costs, num_slices=q) == pytest.approx(float(row["bound"]))
        cycle = fill_teacher(plan, costs, num_slices=q)
        step_s = simulate(cycle, costs, num_steps=4).step_s
        assert float(row["bound"]) * (1 - 1e-9) <= step_s <= float(row["step_time"]) * 1.005, row
        if q >= r:
            assert step_s == pytest.approx(float(row["bound"]))


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_every_filled_plan_is_valid_over_a_whole_run(num_ranks: int) -> None:
    for schedule, virtual_stages in (("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1), ("interleaved", 2)):
        for m, r, q in ((1, 3, 3), (3, 1, 2), (7, 4, 3)) if num_ranks <= 6 else ((5, 2, 2),):
            plan = student(schedule, num_ranks, m, virtual_stages)
            cycle = fill_teacher(plan, unit(r, q, virtual_stages, latency=0.05), num_slices=q)
            run = steps(cycle, 3)
            for made, following in pairwise(run):
                validate(add_communication(made), ahead=following.carried)
            validate(add_communication(run[-1]), ahead=frozenset())
            lowered = add_communication(cycle)
            validate(lowered)
            check_deadlock(lowered, posted_ahead=smallest_window(lowered))
            bare = [tuple(each for each in actions if each.kind is not Kind.K) for actions in cycle.ranks]
            assert tuple(bare) == plan.ranks, "the student's order, and so its gradients, must not change"


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"), [("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2)]
)
def test_a_whole_run_survives_random_delays(schedule: str, virtual_stages: int) -> None:
    for num_ranks, m, r, q in ((2, 3, 3, 3), (4, 2, 3, 2), (5, 7, 1, 1)):
        plan = student(schedule, num_ranks, m, virtual_stages)
        cycle = fill_teacher(plan, unit(r, q, virtual_stages), num_slices=q)
        run = strung([add_communication(each) for each in steps(cycle, 3)])
        window = smallest_window(add_communication(cycle))
        for seed in range(3):
            assert run_with_random_delays(run, seed=seed, posted_ahead=None)
            assert run_with_random_delays(run, seed=seed, posted_ahead=window)


def test_a_whole_run_does_the_teachers_work_exactly_once() -> None:
    cycle = fill_teacher(student("1f1b", 4, 4), unit(1, 2), num_slices=2)
    assert max(action.microbatch for action in cycle.carried) >= 4, "looks ahead more than one step"
    for num_steps in (1, 2, 5):
        run = strung(steps(cycle, num_steps))
        done = sorted(action for actions in run.ranks for action in actions if action.kind is Kind.K)
        wanted = [
            Action(stage, Kind.K, microbatch, piece)
            for stage in range(4)
            for microbatch in range(4, 4 * (num_steps + 1))
            for piece in (0, 1)
        ]
        assert done == wanted


@pytest.mark.parametrize(
    ("latency", "end", "ratio"),
    [
        (0, 0, 1),
        (0, 4, 1),
        (0, 12, 1),
        (0.1, 12, 1),
        (0.3, 0, 1),
        (0.3, 12, 1),
        (1, 0, 1),
        (1, 4, 1.009),
        (1, 12, 1.081),
    ],
)
def test_latency_and_the_end_of_the_step_are_hidden(latency: float, end: float, ratio: float) -> None:
    """The ratios to the ideal of p=8, m=16, r=4, from a simulator that was written apart from this one."""
    costs = unit(4, 4, latency=latency, norm=end)
    cycle = fill_teacher(student("1f1b", 8, 16), costs, num_slices=4)
    assert simulate(cycle, costs, num_steps=6).step_s / 112 <= ratio + 5e-4


def test_the_teacher_as_ballast_evens_out_a_heavy_last_stage() -> None:
    """p=8, m=16, r=4, heads half a stage: 1.183 with the teacher split evenly, 1.002 with a fitted split."""
    load = [1.0] * 7 + [1.5]
    mean = (sum(load) * 3 + 8 * 4) / 8
    for teacher, ratio in (([4.0] * 8, 1.183), ([mean - 3 * each for each in load], 1.002)):
        costs = Costs(load, load, load, [each / 4 for each in teacher])
        cycle = fill_teacher(student("1f1b", 8, 16), costs, num_slices=4)
        assert simulate(cycle, costs, num_steps=6).step_s / (16 * mean) <= ratio * 1.001


@pytest.mark.parametrize(("p", "m", "r"), [(4, 4, 1), (8, 8, 1), (8, 16, 1), (8, 8, 2)])
def test_zero_bubble_lowers_the_bound_where_the_student_is_the_bottleneck(p: int, m: int, r: int) -> None:
    costs = unit(r, r)
    cycle = fill_teacher(student("zero_bubble", p, m), costs, num_slices=r)
    assert simulate(cycle, costs, num_steps=6).step_s == pytest.approx(max(m * (3 + r), 3 * m + p - 1))


def test_interleaving_and_filling_go_together() -> None:
    costs = unit(4, 8, 2)
    plan = student("interleaved", 8, 16, 2)
    assert simulate(fill_teacher(plan, costs, num_slices=8), costs, num_steps=6).step_s == pytest.approx(112)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_the_look_ahead_is_no_longer_than_theory_needs(r: int) -> None:
    """At the loss: 3(p - 1) / r micro-batches when the step begins."""
    cycle = fill_teacher(student("1f1b", 8, 32), unit(r, r), num_slices=r, limits=Limits(margin=0))
    outputs = sum(action.stage == 7 and action.slice in (None, r - 1) for action in cycle.carried)
    assert outputs <= ceil(3 * 7 / r)
    assert validate(cycle).teacher_outputs <= ceil(3 * 7 / r) + 1


def test_a_limit_on_the_queue_is_kept_and_costs_time() -> None:
    plan, costs = student("1f1b", 8, 16), unit(4, 4)
    times = []
    for limit in (1, 2, 4, None):
        cycle = fill_teacher(plan, costs, num_slices=4, limits=Limits(teacher_outputs=limit, margin=0))
        peak = validate(cycle).teacher_outputs
        assert limit is None or peak <= limit
        times.append(simulate(cycle, costs, num_steps=6).step_s)
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1] == pytest.approx(112)
    assert (
        times[0]
        < simulate(
            make_plan(schedule="1f1b", teacher="inline", num_ranks=8, num_microbatches=16), unit(4, 1)
        ).step_s
    )


def test_time_given_away_shortens_the_queue() -> None:
    plan, costs = student("1f1b", 8, 16), unit(4, 4)
    exact, short = (
        fill_teacher(plan, costs, num_slices=4, limits=Limits(tolerance=each, margin=0))
        for each in (0.0, 0.06)
    )
    assert validate(short).teacher_outputs < validate(exact).teacher_outputs
    assert 112 < simulate(short, costs, num_steps=6).step_s <= 112 * 1.06


def test_a_step_needs_nothing_that_another_rank_does_in_the_next_step() -> None:
    """Rank 0 is already in its next step, and done with its slices there, when rank 1 runs its last one in this."""
    costs = Costs(1.0, 1.0, 1.0, [0.1, 5.0])
    made = Student(student("1f1b", 2, 2), costs, num_slices=1)
    counts = [0] * len(made.operations)
    for index, operation in enumerate(made.operations):
        if operation.actions[0] == parse("0F0") or operation.actions[0] == parse("1STEP"):
            counts[index] = 2
    assert _look_ahead(made, made.replay(counts), latency=0.0, margin=0) == [2, 2]


@pytest.mark.parametrize(
    ("p", "m", "r", "q"), [(4, 8, 4, 4), (8, 16, 4, 4), (16, 16, 2, 4), (5, 7, 2.3, 4), (8, 8, 1, 2)]
)
def test_uneven_stages_come_close_to_the_bound(p: int, m: int, r: float, q: int) -> None:
    for seed in range(3):
        costs = uneven(p, r, q, seed)
        plan = student("1f1b", p, m)
        step_s = simulate(fill_teacher(plan, costs, num_slices=q), costs, num_steps=8).step_s
        assert step_s / bound_s(plan, costs, num_slices=q) < 1.03


@pytest.mark.parametrize(("p", "m", "r", "q"), [(4, 8, 4, 4), (8, 16, 4, 4), (8, 8, 8, 8)])
def test_a_frozen_plan_holds_when_stages_are_up_to_15_percent_off(p: int, m: int, r: float, q: int) -> None:
    plan = student("1f1b", p, m)
    cycle = fill_teacher(plan, unit(r, q), num_slices=q)
    for seed in range(4):
        rng = random.Random(seed)
        off = [rng.uniform(0.85, 1.15) for _ in range(p)]
        costs = Costs(off, off, off, [each * r / q for each in off])
        step_s = simulate(cycle, costs, num_steps=8).step_s
        assert step_s / bound_s(plan, costs, num_slices=q) < 1.003


def test_planning_a_long_pipeline_takes_less_than_two_seconds() -> None:
    plan = student("1f1b", 16, 128)
    for costs in (unit(8, 8), uneven(16, 8, 8, seed=0)):
        seconds, cycle = quiet_seconds(lambda costs=costs: fill_teacher(plan, costs, num_slices=8))
        assert seconds < 2
        assert simulate(cycle, costs, num_steps=2).step_s < 1.01 * bound_s(plan, costs, num_slices=8)


def test_the_same_costs_give_the_same_plan() -> None:
    made = [fill_teacher(student("1f1b", 6, 9), uneven(6, 3, 3, seed=1), num_slices=3) for _ in range(2)]
    assert made[0].fingerprint() == made[1].fingerprint()


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"), [("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1), ("interleaved", 2)]
)
def test_torch_accepts_the_students_part(schedule: str, virtual_stages: int) -> None:
    cycle = fill_teacher(student(schedule, 4, 8, virtual_stages), unit(3, 3, virtual_stages), num_slices=3)
    shape = cycle.shape

    def torch_actions(text: str) -> dict[int, list[_Action]]:
        return {
            rank: [_Action.from_str(cell) for cell in row.split(",")]
            for rank, row in enumerate(text.splitlines())
        }

    _validate_schedule(
        torch_actions(to_torch_csv(cycle)), shape.num_ranks, shape.num_stages, shape.num_microbatches
    )
    lowered = torch_actions(to_torch_csv(add_communication(cycle), messages=True))
    _simulate_comms_compute(lowered, shape.rank_of, shape.num_stages)


def test_wrong_requests_are_refused() -> None:
    plan = student("1f1b", 2, 2)
    with pytest.raises(ValueError, match="without teacher"):
        fill_teacher(fill_teacher(plan, unit(1, 1), num_slices=1), unit(1, 1), num_slices=1)
    with pytest.raises(ValueError, match="without teacher and messages"):
        fill_teacher(add_communication(plan), unit(1, 1), num_slices=1)
    with pytest.raises(ValueError, match="num_slices=0"):
        fill_teacher(plan, unit(1, 1), num_slices=0)
    with pytest.raises(ValueError, match="teacher_outputs=0"):
        fill_teacher(plan, unit(1, 1), num_slices=1, limits=Limits(teacher_outputs=0))
    with pytest.raises(ValueError, match="all costs are zero"):
        fill_teacher(plan, Costs(0.0, 0.0, 0.0), num_slices=1)
