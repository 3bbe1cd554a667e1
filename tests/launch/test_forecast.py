from __future__ import annotations

import pytest

from launch.forecast import Forecast, Job, Layout, _carried_tensors, forecast, seconds
from parallel.pipeline.actions import Plan, Shape, parse
from parallel.pipeline.simulate import Costs


def job(p: int, m: int, r: float, *, latency: float = 0.0, end: float = 0.0, **more: object) -> Job:
    """Stages that all take F = B = W = 1 and K = r."""
    values: dict[str, object] = {
        "layout": Layout(p, 1, 1, m),
        "schedule": "1f1b",
        "virtual_stages": 1,
        "costs_with": lambda count: Costs(1.0, 1.0, 1.0, r / count, latency=latency, norm=end),
    }
    return Job(**{**values, **more})


def over_ideal(found: Forecast) -> list[float]:
    return [found.step_s[way] / found.ideal_s for way in ("inline", "batch", "fill")]


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (8, 8)])
@pytest.mark.parametrize("end", [0.0, 5.0])
def test_the_closed_forms(p: int, m: int, r: int, end: float) -> None:
    found = forecast(job(p, m, r, end=end))
    assert found.ideal_s == m * (3 + r)
    assert found.step_s["inline"] == pytest.approx((m + p - 1) * (3 + r) + end)
    assert found.step_s["batch"] == pytest.approx(m * (3 + r) + (p - 1) * (max(r, 1) + 2) + end)
    assert found.bound_s == pytest.approx(max(m * (3 + r), (m + p - 1) * 3 + end))
    assert found.step_s["fill"] == pytest.approx(found.bound_s, rel=0.005)
    assert found.bubble_fraction["inline"] == pytest.approx(1 - found.ideal_s / found.step_s["inline"])


def test_the_published_figures() -> None:
    assert [
        round(forecast(job(8, m, 4)).gain, 2) for m in (8, 16, 32)
    ] == [1.88, 1.44, 1.22]  # fmt: skip
    hidden = forecast(job(8, 16, 4, latency=0.3, end=12.0))
    assert over_ideal(hidden) == pytest.approx([1.652, 1.589, 1.0], abs=6e-4)
    # A last stage half as heavy again, and the teacher split evenly.
    load = [1.0] * 7 + [1.5]
    heavy = forecast(job(8, 16, 4, costs_with=lambda count: Costs(load, load, load, 4 / count)))
    mean = (sum(load) * 3 + 8 * 4) / 8
    assert heavy.step_s["fill"] / (16 * mean) <= 1.184
    assert "Rank 7 has 1.18 times the mean work" in " ".join(heavy.advice)


@pytest.mark.parametrize("m", [1, 5, 8, 20, 21, 22])
def test_advice_says_from_which_number_of_microbatches_no_bubble_is_left(m: int) -> None:
    """r * m >= 3 * (p - 1): 21 at p = 8, r = 1."""
    found = forecast(job(8, m, 1, microbatch_size=2, layout=Layout(8, 3, 1, m)))
    text = " ".join(found.advice)
    assert (
        "From 21 on (train.global_batch_size=126) filling leaves none but what ranks wait for" in text
    ) == (m < 21)
    assert (found.bubble_fraction["fill"] < 1e-6) == (m >= 21)


@pytest.mark.parametrize(
    ("schedule", "virtual_stages", "step"),
    [("zero_bubble", 1, 0.0), ("interleaved", 2, 0.0), ("gpipe", 1, 0.0), ("1f1b", 1, 2.0)],
)
def test_that_number_is_right_for_other_schedules(schedule: str, virtual_stages: int, step: float) -> None:
    each = 1 / virtual_stages
    sizes = {"schedule": schedule, "virtual_stages": virtual_stages}

    def forecast_of(m: int) -> Forecast:
        return forecast(
            job(
                4,
                m,
                1,
                costs_with=lambda count: Costs(each, each, each, 1 / count, step=step * each),
                **sizes,
            )
        )

    text = " ".join(forecast_of(1).advice)
    enough = int(text.partition("From ")[2].partition(" on")[0])
    assert (
        forecast_of(enough).bubble_fraction["fill"] < 1e-6 < forecast_of(enough - 2).bubble_fraction["fill"]
    )


@pytest.mark.parametrize(
    ("case", "part"),
    [
        (job(8, 8, 4), "Filling is worth it: 56 s a step instead of 105 s, 1.88 times as fast as"),
        (job(2, 64, 4), "NOT worth it: +1.6% over inline, as 64 micro-batches are many for 2 stages"),
        (job(4, 8, 0.05), "NOT worth it: +1.7% over inline, as the teacher is only 1.6% of the work"),
        (job(1, 8, 4), "mesh.pp=1 has no bubbles to fill: the teacher runs inline."),
        (job(4, 8, 4, has_teacher=False), "loss.alpha=1 needs no teacher"),
        (
            job(8, 8, 4, num_slices=1),
            "above the bound of 56 s with the teacher in 1 slice; pipeline.slices=null tries others.",
        ),
        (job(8, 8, 4, most_slices=1), "above the bound of 56 s, with the best of up to 1 slices."),
    ],
)
def test_advice(case: Job, part: str) -> None:
    assert part in " ".join(forecast(case).advice)


@pytest.mark.parametrize(
    ("split_by", "part"),
    [("nobody", "pipeline.student_layers or"), ("user", "make it so"), ("planner", "no split")],
)
def test_advice_on_an_uneven_split_depends_on_who_made_it(split_by: str, part: str) -> None:
    uneven = job(
        4, 8, 4, split_by=split_by, costs_with=lambda count: Costs([1, 1, 3, 1], 1.0, 1.0, 4 / count)
    )
    assert any(part in sentence for sentence in forecast(uneven).advice if sentence.startswith("Rank 2 has"))


def test_a_better_split_is_named() -> None:
    planner = job(4, 8, 4, student_layers=(3, 3, 3, 2), teacher_layers=(5, 5, 5, 9))
    by_user = job(
        4, 8, 4, costs_with=lambda count: Costs([1, 1, 3, 1], 1.0, 1.0, 4 / count), alternative=planner
    )
    better = (
        "With pipeline.student_layers=[3,3,3,2] pipeline.teacher_layers=[5,5,5,9] (null chooses them) the bound is 56 s a "
        "step instead of 72 s."
    )
    assert better in forecast(by_user).advice
    assert not any("null chooses" in each for each in forecast(job(4, 8, 4, alternative=planner)).advice)


def test_where_nothing_can_be_filled_it_is_the_step_that_runs() -> None:
    alone = forecast(job(1, 8, 4))
    assert alone.step_s["fill"] == alone.step_s["inline"] == 56
    assert (alone.queue_tensors, alone.num_slices, alone.fills) == (1, 1, False)
    student = forecast(job(4, 8, 4, has_teacher=False))
    assert set(student.step_s.values()) == {33.0} and student.ideal_s == 24
    assert (student.queue_tensors, student.fills) == (0, False)


def test_the_queue_is_what_waits_and_what_is_under_way() -> None:
    """p = 8, r = 4: 3 (p - 1) / r outputs at the loss and a few tensors a link."""
    found = forecast(job(8, 32, 4, num_slices=4))
    waiting = found.timelines["fill"].peak_teacher_queue
    assert 4 <= waiting <= 7
    assert waiting < found.queue_tensors <= waiting + 7 * 5 + 8


def test_tensors_between_ranks_and_between_slices_are_counted() -> None:
    """Rank 0 is one slice into micro-batch 2, rank 1 into micro-batch 0, and micro-batch 1 is on the way."""
    done = "0K0.0 0K0.1 0K1.0 0K1.1 0K2.0 1K0.0"
    plan = Plan(Shape(2, 2, 4, 2), "1f1b", "fill", ((), ()), frozenset(map(parse, done.split())))
    assert _carried_tensors(plan) == 3


def test_costs_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="all are zero"):
        forecast(job(2, 4, 0, costs_with=lambda count: Costs(0.0, 0.0, 0.0)))


def test_seconds() -> None:
    assert [seconds(each) for each in (12.34567, 0.0123, 4e-5, 0.0)] == [
        "12.35 s",
        "12.3 ms",
        "40 us",
        "0 us",
    ]
