from __future__ import annotations

import math

import pytest

from distill.annealing import Ramp, Stages, extremes, is_schedule, value_at


def test_ramps_go_from_start_to_end() -> None:
    linear, cosine = Ramp("linear", 4.0, 1.0), Ramp("cosine", 4.0, 1.0)
    assert [linear.at(step, 4) for step in range(4)] == pytest.approx([4.0, 3.0, 2.0, 1.0], rel=1e-12)
    expected = [1 + 3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert [cosine.at(step, 5) for step in range(5)] == pytest.approx(expected, rel=1e-12)
    assert cosine.at(1, 5) > linear.at(1, 5) and cosine.at(3, 5) < linear.at(3, 5), "slow at both ends"


def test_ramps_are_exact_at_their_ends_and_never_beyond() -> None:
    for kind in ("linear", "cosine"):
        for ramp in (Ramp(kind, 0.3, 1.0), Ramp(kind, 1.0, 0.1), Ramp(kind, 1.0, 1.0), Ramp(kind, 0.1, 0.1)):
            for num_steps in (2, 3, 7, 1000):
                values = [ramp.at(step, num_steps) for step in range(num_steps)]
                assert (values[0], values[-1]) == (ramp.start, ramp.end)
                assert min(ramp.extremes) <= min(values) and max(values) <= max(ramp.extremes)
        assert Ramp(kind, 4.0, 1.0).at(0, 1) == 4.0, "a round of one step has the start"
        assert Ramp(kind, 4.0, 1.0).at(9, 5) == 1.0, "and what comes after the last step its end"


def test_stages_hold_from_their_step_on() -> None:
    stages = Stages("steps", {100: 2.0, 0: 4.0, 7: 3.0})
    assert [stages.at(step, 10) for step in (0, 6, 7, 99, 100, 1000)] == [4.0, 4.0, 3.0, 3.0, 2.0, 2.0]


def test_a_number_stands_still() -> None:
    assert value_at(0.3, 5, 10) == 0.3 and extremes(0.3) == (0.3,)
    assert value_at(Stages("steps", {0: 1.0, 4: 2.0}), 4, 10) == 2.0
    assert sorted(extremes(Stages("steps", {0: 4.0, 9: 2.0}))) == [2.0, 4.0]


def test_a_group_of_keys_is_no_schedule() -> None:
    assert is_schedule({"kind": "linear"}) and is_schedule({"kind": "steps", "values": {}})
    assert not is_schedule({"kind": "forward_kl", "temperature": 2.0}) and not is_schedule(3.0)
    assert not is_schedule({"kind": "cosine", "weight": 1.0}), (
        "a group whose kind has the name of a schedule's"
    )
