"""Plans from measured costs: when they are made, that all ranks make the same, and when they are made again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import Config, MeshShape, Pipeline, Train
from distill.planning import Planner, _drifted, costs_of, make_step_plan, medians
from parallel.mesh import Axis, Mesh
from parallel.pipeline.actions import RECVS, Kind, Plan, PlanError, parse
from parallel.pipeline.simulate import Costs, Event, simulate
from tests.workers import run_distributed

COSTS = Costs(0.1, [0.1, 0.14], 0.1, teacher_slice=[0.05, 0.04], step=0.03, norm=0.01)
NUM_MICROBATCHES = 4


def _config(**pipeline: object) -> Config:
    values = {"teacher": "fill", "measure_steps": 3, "replan_every": 4, **pipeline}
    config = replace(Config(), mesh=MeshShape(pp=2, dp=1), pipeline=Pipeline(**values))
    return replace(config, train=Train(global_batch_size=NUM_MICROBATCHES, steps=40))


def _event(text: str, start_s: float, end_s: float) -> Event:
    action = parse(text)
    return Event(action.stage % 2, action, start_s, end_s)


def _alone(rank: int = 0) -> Mesh:
    """A rank of two that needs no other to gather from."""
    return replace(Mesh.single(), pp=Axis("pp", 2, rank))


def _events(plan: Plan, costs: Costs, factor: float = 1.0) -> list[Event]:
    """All ranks' events of a step; `factor` makes the first one slow."""
    events = simulate(plan, costs).events
    return [
        each._replace(end_s=each.start_s + factor * (each.end_s - each.start_s)) if factor != 1 else each
        for each in events
    ]


def test_costs_are_medians_by_kind_and_stage() -> None:
    events = [_event(f"0F{index}", index, index + length) for index, length in enumerate((0.1, 0.9, 0.2))]
    events += [_event("1F0", 0, 0.5), _event("1B0", 1, 1.25), _event("0W0", 1, 1.125)]
    events += [_event("0K0.0", 0, 1), _event("0K0.1", 0, 3), _event("1K0.0", 0, 4), _event("0SEND_F0", 0, 9)]
    events += [_event("0REDUCE", 0, 5), _event("1REDUCE", 0, 2), _event("0NORM", 0, 0.5)]
    events += [_event("1NORM", 0, 7), _event("0STEP", 0, 6), _event("1STEP", 0, 8)]
    events += [_event("0GATHER", 0, 1), _event("1GATHER", 0, 2)]
    shape = make_step_plan(_config(), teacher="inline", num_slices=2).shape
    costs = costs_of(medians(events), shape, latency=0.25)
    assert costs.forward == pytest.approx([0.2, 0.5]) and costs.latency == 0.25
    assert (costs.backward_input, costs.backward_weight) == ([0.0, 0.25], [0.125, 0.0])
    assert costs.teacher_slice == [2, 4]
    # Five layers in four slices: the first has two, and is no exception.
    uneven = [
        _event(f"0K{index}.{piece}", 0, 2 if piece == 0 else 1) for index in (0, 1) for piece in range(4)
    ]
    assert medians(uneven)[Kind.K, 0] == 1.25
    assert (costs.reduce, costs.norm) == (2, 0.5), "who comes first waits, so the shortest is the cost"
    assert (costs.step, costs.gather) == ([6, 8], [1, 2])


def test_a_plan_is_made_after_the_measuring_steps_and_enters_by_its_prologue() -> None:
    planner = Planner(_config(), _alone(), num_slices=2, latency=0.002)
    said = []
    for step in range(5):
        (*_, (plan, _)) = planner.course.of(step)
        assert plan.teacher == ("inline" if step < 3 else "fill")
        # The first step warms up: what it took must not count.
        said.append(planner.observe(plan, _events(plan, COSTS, factor=50.0 if step == 0 else 1.0)))
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0]
    assert planner.costs.forward == pytest.approx([0.1, 0.1])
    assert planner.costs.backward_input == pytest.approx([0.1, 0.14]) and planner.costs.latency == 0.002
    inline = simulate(make_step_plan(_config(), teacher="inline", num_slices=2), COSTS, num_steps=6)
    assert planner.planned.step_s < inline.step_s
    assert f"{planner.planned.step_s:.3g} s a step instead of {inline.step_s:.3g} s" in said[2][0]
    assert planner.typical[0].teacher == "fill", "what is drawn is a step of the steady state"


def test_costs_that_move_for_long_make_a_new_plan() -> None:
    planner = Planner(_config(), _alone(), num_slices=2)
    slower = replace(COSTS, forward=[0.1, 0.2])
    doubled = Costs(0.2, [0.2, 0.28], 0.2, teacher_slice=[0.1, 0.08], step=0.06, norm=0.02)
    plans, said = [], []
    for step in range(20):
        (*_, (plan, _)) = planner.course.of(step)
        costs = COSTS if step < 7 else doubled if step < 11 else slower
        said += [step] if planner.observe(plan, _events(plan, costs)) else []
        plans.append(planner.course.plan)
    assert said == [2, 14], "not when all costs double, but when one stage becomes slower than the others"
    assert len({plan.fingerprint() for plan in plans}) == 3
    never = Planner(_config(replan_every=0), _alone(), num_slices=2)
    for step in range(20):
        (*_, (plan, _)) = never.course.of(step)
        assert not (never.observe(plan, _events(plan, COSTS if step < 7 else slower)) and step > 2)
    assert never._seen == [], "what nobody looks at is not kept"


def test_waiting_that_a_plan_has_done_away_with_makes_no_new_one() -> None:
    """A receive's seconds are those of waiting, which filling is there to take."""
    planner, said = Planner(_config(), _alone(), num_slices=2), []
    for step in range(12):
        (*_, (plan, _)) = planner.course.of(step)
        waits = 0.3 if plan.teacher == "inline" else 0.0
        events = [
            event._replace(end_s=event.end_s + waits) if event.action.kind in RECVS else event
            for event in _events(plan, COSTS)
        ]
        said += [step] if planner.observe(plan, events) else []
    assert said == [2]


@pytest.mark.parametrize("teacher", ["inline", "batch"])
def test_ways_without_look_ahead_are_predicted_only(teacher: str) -> None:
    planner = Planner(_config(teacher=teacher), _alone(), num_slices=1)
    first = planner.course.plan
    for step in range(12):
        ((plan, _),) = planner.course.of(step)
        assert planner.observe(plan, _events(plan, COSTS)) == []
    assert planner.course.plan is first and first.teacher == teacher
    assert planner.planned.step_s == pytest.approx(simulate(first, COSTS, num_steps=6).step_s, rel=1e-3)


def test_one_rank_has_nothing_to_fill_and_a_hard_loss_no_teacher() -> None:
    alone = replace(_config(), mesh=MeshShape(pp=1, dp=1))
    assert Planner(alone, Mesh.single(), num_slices=1).course.plan.teacher == "inline"
    hard = replace(_config(), loss=replace(Config().loss, alpha=1.0))
    assert Planner(hard, _alone(), num_slices=1).course.plan.teacher == "none"


def _with_a_straggler() -> list[str]:
    """The last stage becomes three times as slow, and recovers."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    planner = Planner(_config(teacher="inline"), mesh, num_slices=2)
    slow = replace(
        COSTS, forward=[0.1, 0.3], backward_input=[0.1, 0.42], backward_weight=[0.1, 0.3], teacher_slice=0.1
    )
    said = []
    for step in range(1, 20):
        ((plan, _),) = planner.course.of(step - 1)
        events = _events(plan, slow if 8 <= step < 14 else COSTS)
        mine = [event for event in events if event.rank == mesh.pp.rank]
        said += [f"{step}: {line}" for line in planner.observe(plan, mine, step=step)]
    return said


def test_a_stage_that_becomes_slow_is_named_once_and_when_it_is_over() -> None:
    assert (
        run_distributed(2, _with_a_straggler)
        == [
            [
                "11: stage 1 (rank 1) takes 2.9 times its planned time since step 8",
                "19: stage 1 (rank 1) is as planned again since step 16; it was slow from step 8 on",
            ]
        ]
        * 2
    )


def _plan_together(disagree: bool) -> str:
    """Each rank sees its own events only, and other times than the other."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    planner = Planner(_config(), mesh, num_slices=2)
    for step in range(4):
        (*_, (plan, _)) = planner.course.of(step)
        events = [event for event in _events(plan, COSTS) if event.rank == mesh.pp.rank]
        if disagree and step == 2:
            planner._latency = 0.01 * mesh.pp.rank
        planner.observe(plan, events)
    return planner.course.plan.fingerprint()


def test_all_ranks_make_the_same_plan_or_none() -> None:
    first, second = run_distributed(2, _plan_together, False)
    assert first == second
    with pytest.raises(AssertionError, match=f"{PlanError.__name__}: the ranks made 2 different plans"):
        run_distributed(2, _plan_together, True)


def test_a_drift_is_relative_to_the_others_and_to_what_matters() -> None:
    before = {(Kind.F, 0): 1.0, (Kind.F, 1): 1.0, (Kind.B, 0): 2.0, (Kind.NORM, 0): 0.001}
    assert not _drifted(before, before)
    assert not _drifted(before, {key: 3 * value for key, value in before.items()})
    assert not _drifted(before, {**before, (Kind.NORM, 0): 0.01})
    assert _drifted(before, {**before, (Kind.F, 1): 1.4})
    assert not _drifted(before, {**before, (Kind.F, 1): 1.1})
