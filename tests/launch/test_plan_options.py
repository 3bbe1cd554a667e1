from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, ConfigError, MeshShape, Pipeline
from launch.plan_options import KEYS, Options, given_costs, read_options
from parallel.pipeline.simulate import Costs

CASE = Config(mesh=MeshShape(pp=4, dp=1, tp=1))


def test_values_are_read(tmp_path: Path) -> None:
    options = read_options(
        {
            "plan.costs.forward": 1,
            "plan.costs.teacher": [1, 2.5],
            "plan.costs.latency": None,
            "plan.slices": 3,
            "plan.out": str(tmp_path / "a.json"),
        }
    )
    assert options == Options({"forward": 1.0, "teacher": (1.0, 2.5)}, slices=3, out=tmp_path / "a.json")
    assert options.missing_costs(needs_teacher=True) == ["plan.costs.backward"]
    assert set(KEYS) >= {
        f"plan.costs.{name}" for name in ("forward", "backward", "teacher", "latency", "step_end")
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plan.costs.forwrd": 1}, "there is no key plan.costs.forwrd; did you mean plan.costs.forward?"),
        ({"plan.costs": 3}, "plan.costs=3 is not a group of keys"),
        ({"plan.costs.forward": -1}, "plan.costs.forward=-1 must be a number of seconds, 0 or more, or a list"),
        ({"plan.costs.backward": [1, float("inf")]}, "plan.costs.backward=.1,inf. must be a number"),
        ({"plan.costs.teacher": True}, "plan.costs.teacher=true must be"),
        ({"plan.costs.step_end": "long"}, "plan.costs.step_end=long must be"),
        ({"plan.costs.latency": [1, 2]}, "plan.costs.latency=.1,2. must be one number of seconds"),
        ({"plan.slices": 0}, "plan.slices=0 must be a whole number of 1 or more"),
        ({"plan.devices": 2.0}, "plan.devices=2.0 must be a whole number"),
        ({"plan.devices": 4, "plan.costs.forward": [1, 2]}, "is a list for one layout, but plan.devices=4"),
        ({"plan.out": "/nowhere/plan.json"}, "plan.out=/nowhere/plan.json cannot be written: /nowhere is no folder"),
        ({"plan.svg": "/"}, "plan.svg=/ is a folder"),
    ],
)  # fmt: skip
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(values)


def test_given_costs_take_the_place_of_measured_ones() -> None:
    measured = Costs([1.0] * 4, [2.0] * 4, [3.0] * 4, [4.0] * 4, latency=0.5, norm=0.6, step=[0.7] * 4)
    assert given_costs(measured, Options(), CASE.mesh, CASE, 2) == measured
    options = Options({"backward": (1.0, 2.0, 3.0, 4.0), "teacher": 6.0, "step_end": 9.0})
    assert given_costs(measured, options, CASE.mesh, CASE, 2) == replace(
        measured,
        backward_input=(0.5, 1.0, 1.5, 2.0),
        backward_weight=(0.5, 1.0, 1.5, 2.0),
        teacher_slice=3.0,
        norm=9.0,
        step=0.0,
    )


def test_a_rank_of_another_layout_has_its_share() -> None:
    options = Options({"forward": 6.0, "teacher": 8.0, "latency": 0.1})
    other = replace(CASE, mesh=MeshShape(pp=2, dp=1, tp=4))
    costs = given_costs(Costs(0.0, 0.0, 0.0), options, CASE.mesh, other, 4)
    assert (costs.forward, costs.teacher_slice, costs.latency) == (3.0, 1.0, 0.1)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"forward": (1.0,) * 4}, "has 4 entries, but there are mesh.pp=4 x pipeline.virtual_stages=2 = 8 stages"),
        ({"teacher": (1.0,) * 8}, "has 8 entries, but there are mesh.pp=4 stages; use one number or 4 entries"),
        ({"step_end": (1.0,)}, "plan.costs.step_end=.1.0. has 1 entries"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit(costs: dict[str, Any], message: str) -> None:
    case = replace(CASE, pipeline=Pipeline(schedule="interleaved", virtual_stages=2))
    with pytest.raises(ConfigError, match=message):
        given_costs(Costs(0.0, 0.0, 0.0), Options(costs), CASE.mesh, case, 1)
