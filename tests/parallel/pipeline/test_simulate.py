from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import pytest

from parallel.pipeline.actions import Kind, Plan, parse
from parallel.pipeline.schedules import forward_only, make_plan
from parallel.pipeline.simulate import Costs, Event, bubble_fraction, busy_seconds, simulate
from tests.parallel.pipeline.sweep import plans
from tests.parallel.pipeline.test_validate import CYCLE

ROWS = list(csv.DictReader((Path(__file__).parent / "step_time.csv").open()))
UNIT = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0)


def plan(schedule: str, teacher: str | None, num_ranks: int, num_microbatches: int, **sizes: int) -> Plan:
    return make_plan(
        schedule=schedule, teacher=teacher, num_ranks=num_ranks, num_microbatches=num_microbatches, **sizes
    )


def unit(r: float = 0.0, num_slices: int = 1, **costs: float) -> Costs:
    return Costs(1.0, 1.0, 1.0, r / num_slices, **costs)


@pytest.mark.parametrize("variant", ["student", "inline", "batch"])
def test_closed_forms_of_the_oracle(variant: str) -> None:
    rows = [row for row in ROWS if row["variant"] == variant]
    assert len(rows) == 36
    for row in rows:
        p, m, r = int(row["p"]), int(row["m"]), float(row["r"])
        costs = unit(r, latency=float(row["latency"]), norm=float(row["step_end"]))
        step_s = simulate(plan("1f1b", None if variant == "student" else variant, p, m), costs).step_s
        assert step_s == float(row["step_time"])
        work = m * (3 + (r if variant != "student" else 0))
        assert step_s / work == pytest.approx(float(row["over_ideal"]), abs=5.1e-5)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16])
def test_closed_forms_with_an_end_of_step(schedule: str, num_ranks: int) -> None:
    end = {"reduce": 2.0, "norm": 0.5, "step": 3.0, "gather": 1.5}
    for m in (1, 2, 5, 9):
        p = num_ranks
        assert simulate(plan(schedule, None, p, m), unit(**end)).step_s == (m + p - 1) * 3 + 7
        for r, q in ((0.5, 1), (1, 2), (4, 2)):
            inline = simulate(plan(schedule, "inline", p, m, num_slices=q), unit(r, q, **end))
            batch = simulate(plan(schedule, "batch", p, m, num_slices=q), unit(r, q, **end))
            assert inline.step_s == (m + p - 1) * (3 + r) + 7
            # Slices do not leave one by one, so they do not shorten the way through the pipeline.
            assert batch.step_s == m * (3 + r) + (p - 1) * (max(r, 1) + 2) + 7


@pytest.mark.parametrize("num_microbatches", [8, 16, 32])
def test_closed_forms_of_the_schedules_with_smaller_bubbles(num_microbatches: int) -> None:
    m, p = num_microbatches, 8
    assert simulate(plan("zero_bubble", None, p, m), UNIT).step_s == 3 * m + (p - 1)
    for v in (1, 2, 4):
        costs = Costs(1 / v, 1 / v, 1 / v)
        assert (
            simulate(plan("interleaved", None, p, m, virtual_stages=v), costs).step_s
            == 3 * m + 3 * (p - 1) / v
        )


@pytest.mark.parametrize(
    ("latency", "inline", "batch"),
    [
        (0.0, 1.438, 1.375),
        (0.05, 1.455, 1.393),
        (0.1, 1.473, 1.411),
        (0.3, 1.545, 1.482),
        (1.0, 1.795, 1.732),
    ],
)
def test_latency_as_in_an_independent_simulation(latency: float, inline: float, batch: float) -> None:
    """The ratios to the ideal of p=8, m=16, r=4, from a simulator that was written apart from this one."""
    costs = unit(4, latency=latency)
    assert simulate(plan("1f1b", "inline", 8, 16), costs).step_s / 112 == pytest.approx(inline, abs=6e-4)
    assert simulate(plan("1f1b", "batch", 8, 16), costs).step_s / 112 == pytest.approx(batch, abs=6e-4)


@pytest.mark.parametrize("num_ranks", [1, 3, 5])
def test_every_plan_runs_in_order_and_after_what_it_needs(num_ranks: int) -> None:
    costs = Costs(0.9, 1.1, 0.7, 0.6, latency=0.2, reduce=0.5, norm=0.1, step=0.4, gather=0.3)
    for made in plans(num_ranks):
        timeline = simulate(made, costs)
        starts = {event.action: event.start_s for event in timeline.events}
        ends = {event.action: event.end_s for event in timeline.events}
        for actions in made.ranks:
            busy = [
                action for action in actions if action.kind in (Kind.F, Kind.B, Kind.W, Kind.K, Kind.STEP)
            ]
            for before, after in pairwise(busy):
                assert ends[before] <= starts[after]
        for action, start_s in starts.items():
            if action.kind is Kind.F and made.shape.rank_of(action.stage) and action.stage:
                before = parse(f"{action.stage - 1}F{action.microbatch}")
                assert start_s >= ends[before] + costs.latency - 1e-12
        assert 0 <= timeline.bubble_fraction < 1
        assert timeline.step_s == max(ends.values())


def test_costs_may_differ_by_stage() -> None:
    costs = Costs(forward=[1.0, 2.0], backward_input=[1.0, 3.0], backward_weight=1.0)
    assert simulate(plan("1f1b", None, 2, 4), costs).step_s == 1 + 4 * 6 + 2


def test_the_bubble_is_the_idle_share() -> None:
    timeline = simulate(plan("1f1b", None, 4, 6), UNIT)
    assert timeline.bubble_fraction == pytest.approx(3 / 9)
    assert bubble_fraction(timeline.events, num_ranks=4, step_s=timeline.step_s) == timeline.bubble_fraction
    measured = [
        Event(0, parse("0F0"), 0.0, 1.0),
        Event(1, parse("0SEND_F0"), 1.0, 2.0),
        Event(1, parse("1F0"), 2.0, 3.0),
    ]
    assert bubble_fraction(measured, num_ranks=2, step_s=4.0) == 0.75
    # On a GPU the teacher's lane overlaps the student's: a second in which both work is one.
    lanes = [
        (0, "0K0", 0.0, 3.0),
        (0, "0F0", 1.0, 2.0),
        (0, "0B0", 2.5, 3.5),
        (1, "1F0", 3.0, 4.0),
        (1, "1SEND_B0", 0.0, 9.0),
    ]
    overlapping = [Event(rank, parse(text), start_s, end_s) for rank, text, start_s, end_s in lanes]
    assert busy_seconds(overlapping) == 4.5 and busy_seconds([]) == 0


def test_peaks_are_reported() -> None:
    timeline = simulate(plan("1f1b", "batch", 4, 6), unit(1))
    assert timeline.peak_activations == (4, 3, 2, 1)
    assert timeline.peak_teacher_queue == 6


def test_the_end_of_the_step_runs_beside_the_work_of_others() -> None:
    """NORM ends after the last REDUCE of all ranks, and only STEP waits for it."""
    timeline = simulate(plan("1f1b", None, 2, 1), unit(reduce=1.0, norm=1.0, step=1.0, gather=1.0))
    times = {str(event.action): (event.start_s, event.end_s) for event in timeline.events}
    assert times["1REDUCE"] == (4.0, 5.0)
    assert times["0REDUCE"] == (6.0, 7.0)
    assert times["1NORM"] == times["0NORM"] == (7.0, 8.0)
    assert times["1STEP"] == (8.0, 9.0)
    assert times["1GATHER"] == (9.0, 10.0)


def test_several_steps_of_a_plain_plan_follow_each_other() -> None:
    costs = unit(2, norm=3.0, latency=0.1)
    once = simulate(plan("1f1b", "inline", 4, 8), costs)
    steady = simulate(plan("1f1b", "inline", 4, 8), costs, num_steps=4)
    assert steady.step_s == pytest.approx(once.step_s)


def test_the_next_step_waits_for_its_parameters_but_the_teacher_does_not() -> None:
    steady = simulate(CYCLE, unit(1, gather=5.0), num_steps=6)
    starts = {str(event.action): event.start_s for event in steady.events}
    assert steady.step_s == simulate(CYCLE, unit(1), num_steps=6).step_s + 5 == 14
    assert starts["1K1"] == starts["0F0"] - 5


def test_forward_only_is_timed() -> None:
    made = forward_only(num_ranks=4, num_microbatches=6, student=True, teacher=False)
    assert simulate(made, UNIT).step_s == 6 + 3


def test_wrong_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="forward has 3 entries for 2 stages"):
        simulate(plan("1f1b", None, 2, 1), Costs([1.0, 1.0, 1.0], 1.0, 1.0))
    with pytest.raises(ValueError, match="must not be negative"):
        simulate(plan("1f1b", None, 2, 1), Costs(-1.0, 1.0, 1.0))
