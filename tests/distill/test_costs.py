from __future__ import annotations

import random
import subprocess
import sys

import pytest

from distill.costs import Profile, Split, choose_slices, stage_costs
from parallel.pipeline.fill import fill_teacher
from parallel.pipeline.partition import Layers
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs, simulate

PROFILE = Profile(
    forward=Layers([1.0, 2.0, 3.0], first_s=0.5),
    backward_input=Layers([2.0, 2.0, 2.0], last_s=7.0),
    backward_weight=Layers([1.0, 1.0, 1.0], first_s=0.25),
    teacher=Layers([4.0, 8.0], first_s=2.0),
    step=Layers([0.1, 0.1, 0.1], first_s=1.0, last_s=2.0),
    call_s=0.01,
)


def test_stages_cost_what_their_parts_cost() -> None:
    split = Split((range(1), range(1, 3)), (range(2), range(2, 2)), num_slices=2)
    costs = stage_costs(PROFILE, split, latency=0.3)
    assert costs.forward == [1.51, 5.01]
    assert costs.backward_input == [2.0, 11.0]
    assert costs.backward_weight == [1.25, 2.0]
    assert costs.teacher_slice == [7.01, 0.01]
    assert (costs.latency, costs.step) == (0.3, [1.1, 2.2])
    assert PROFILE.student == Layers([4.0, 5.0, 6.0], first_s=0.75, last_s=7.0)


def test_shards_divide_the_work_and_pay_for_their_messages() -> None:
    shared = PROFILE.sharded(2, message_s=0.1)
    assert shared.forward == Layers([0.7, 1.2, 1.7], first_s=0.35)
    assert shared.backward_input == Layers([1.2, 1.2, 1.2], last_s=3.6)
    assert shared.backward_weight == Layers([0.5, 0.5, 0.5], first_s=0.125)
    assert shared.teacher == Layers([2.2, 4.2], first_s=1.1)
    assert PROFILE.sharded(1, message_s=0.1) == PROFILE


@pytest.mark.parametrize("seed", range(12))
def test_the_fewest_slices_that_are_about_as_fast_as_any(seed: int) -> None:
    rng = random.Random(seed)
    p, r = rng.randint(2, 5), rng.uniform(0.5, 8)
    m, most = rng.choice((p, p + 3, 2 * p)), rng.choice((3, 8))
    stages = [[rng.uniform(0.8, 1.2) for _ in range(p)] for _ in range(3)]
    end = rng.choice((0.0, 4.0))

    def costs(num_slices: int) -> Costs:
        return Costs(*stages, [0.02 + r / num_slices] * p, latency=0.2, norm=end)

    plan = make_plan(schedule="1f1b", teacher=None, num_ranks=p, num_microbatches=m)
    step_s = {
        number: simulate(
            fill_teacher(plan, costs(number), num_slices=number), costs(number), num_steps=4
        ).step_s
        for number in range(2, most + 1)
    }
    best = min(step_s.values())
    chosen = choose_slices(plan, costs, most=most)
    assert step_s[chosen] <= best * 1.01
    assert all(step_s[fewer] > best * 1.005 for fewer in range(2, chosen))


def test_costs_need_no_torch() -> None:
    code = "import sys, distill.costs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
