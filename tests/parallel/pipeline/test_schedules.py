from __future__ import annotations

import pytest

from parallel.pipeline.actions import Kind, Plan
from parallel.pipeline.schedules import TEACHER, TRAINING, forward_only, make_plan
from parallel.pipeline.trace import to_text

ONE_F_ONE_B = """\
    rank 0   rank 1   rank 2   rank 3
00  0F0      1F0      2F0      3F0
01  0F1      1F1      2F1      3B0
02  0F2      1F2      2B0      3W0
03  0F3      1B0      2W0      3F1
04  0B0      1W0      2F2      3B1
05  0W0      1F3      2B1      3W1
06  0F4      1B1      2W1      3F2
07  0B1      1W1      2F3      3B2
08  0W1      1F4      2B2      3W2
09  0F5      1B2      2W2      3F3
10  0B2      1W2      2F4      3B3
11  0W2      1F5      2B3      3W3
12  0B3      1B3      2W3      3F4
13  0W3      1W3      2F5      3B4
14  0B4      1B4      2B4      3W4
15  0W4      1W4      2W4      3F5
16  0B5      1B5      2B5      3B5
17  0W5      1W5      2W5      3W5
18  0REDUCE  1REDUCE  2REDUCE  3REDUCE
19  0NORM    1NORM    2NORM    3NORM
20  0STEP    1STEP    2STEP    3STEP
21  0GATHER  1GATHER  2GATHER  3GATHER
"""
GPIPE = """\
    rank 0   rank 1
00  0F0      1F0
01  0F1      1F1
02  0F2      1F2
03  0B0      1B0
04  0W0      1W0
05  0B1      1B1
06  0W1      1W1
07  0B2      1B2
08  0W2      1W2
09  0REDUCE  1REDUCE
10  0NORM    1NORM
11  0STEP    1STEP
12  0GATHER  1GATHER
"""
INTERLEAVED = """\
0F0 0F1 2F0 2F1 0F2 2B0 2W0 0F3 2B1 2W1 2F2 0B0 0W0 2F3 0B1 0W1 2B2 2W2 2B3 2W3 2REDUCE 0B2 0W2 0B3 0W3 0REDUCE
1F0 1F1 3F0 3B0 3W0 3F1 3B1 3W1 1F2 1B0 1W0 1F3 1B1 1W1 3F2 3B2 3W2 3F3 3B3 3W3 3REDUCE 1B2 1W2 1B3 1W3 1REDUCE
"""
ZERO_BUBBLE = """\
0F0 0F1 0F2 0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3
1F0 1F1 1B0 1F2 1B1 1W0 1F3 1B2 1W1 1B3 1W2 1W3
2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3
"""


def plan(schedule: str, teacher: str | None, num_ranks: int, num_microbatches: int, **sizes: int) -> Plan:
    return make_plan(
        schedule=schedule, teacher=teacher, num_ranks=num_ranks, num_microbatches=num_microbatches, **sizes
    )


def lines(made: Plan, num_end: int) -> list[str]:
    return [" ".join(map(str, actions[: len(actions) - num_end])) for actions in made.ranks]


def test_1f1b_as_text() -> None:
    assert to_text(plan("1f1b", None, 4, 6)) == ONE_F_ONE_B


def test_gpipe_as_text() -> None:
    assert to_text(plan("gpipe", None, 2, 3)) == GPIPE


def test_interleaved_as_text() -> None:
    assert lines(plan("interleaved", None, 2, 4, virtual_stages=2), 6) == INTERLEAVED.splitlines()


def test_zero_bubble_as_text() -> None:
    assert lines(plan("zero_bubble", None, 3, 4), 4) == ZERO_BUBBLE.splitlines()


def test_fewer_microbatches_than_ranks() -> None:
    assert lines(plan("1f1b", None, 4, 2), 4)[0] == "0F0 0F1 0B0 0W0 0B1 0W1"


def test_one_rank_alternates() -> None:
    assert lines(plan("1f1b", None, 1, 2), 4) == ["0F0 0B0 0W0 0F1 0B1 0W1"]


def test_interleaved_with_one_stage_a_rank_is_1f1b() -> None:
    assert plan("interleaved", None, 4, 7).ranks == plan("1f1b", None, 4, 7).ranks


def test_inline_puts_the_teacher_right_before_each_forward() -> None:
    assert lines(plan("1f1b", "inline", 2, 2, num_slices=2), 4) == [
        "0K0.0 0K0.1 0F0 0K1.0 0K1.1 0F1 0B0 0W0 0B1 0W1",
        "1K0.0 1K0.1 1F0 1B0 1W0 1K1.0 1K1.1 1F1 1B1 1W1",
    ]


def test_batch_puts_the_whole_teacher_first() -> None:
    assert lines(plan("1f1b", "batch", 2, 2), 4) == [
        "0K0 0K1 0F0 0F1 0B0 0W0 0B1 0W1",
        "1K0 1K1 1F0 1B0 1W0 1F1 1B1 1W1",
    ]


def test_virtual_stages_run_the_teacher_once() -> None:
    made = plan("interleaved", "inline", 2, 2, virtual_stages=3)
    assert [str(action) for action in made.ranks[1] if action.kind is Kind.K] == ["1K0", "1K1"]


def test_forward_only_of_both_models_keeps_the_teacher_first() -> None:
    made = forward_only(num_ranks=2, num_microbatches=2, student=True, teacher=True, num_slices=2)
    assert lines(made, 0) == ["0K0.0 0K0.1 0F0 0K1.0 0K1.1 0F1", "1K0.0 1K0.1 1F0 1K1.0 1K1.1 1F1"]


@pytest.mark.parametrize(("student", "teacher", "kinds"), [(True, False, {Kind.F}), (False, True, {Kind.K})])
def test_forward_only_of_one_model(student: bool, teacher: bool, kinds: set[Kind]) -> None:
    made = forward_only(num_ranks=3, num_microbatches=2, student=student, teacher=teacher)
    assert {action.kind for actions in made.ranks for action in actions} == kinds
    assert [len(actions) for actions in made.ranks] == [2, 2, 2]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"schedule='pipedream'.*" + ", ".join(TRAINING)):
        plan("pipedream", None, 2, 2)
    with pytest.raises(ValueError, match=r"teacher='outline'.*" + ", ".join(TEACHER)):
        plan("1f1b", "outline", 2, 2)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="virtual_stages=2"):
        plan("1f1b", None, 2, 2, virtual_stages=2)
    with pytest.raises(ValueError, match="num_slices=0"):
        plan("1f1b", "inline", 2, 2, num_slices=0)
    with pytest.raises(ValueError, match="num_microbatches=0"):
        plan("1f1b", None, 2, 0)
    with pytest.raises(ValueError, match="nothing to run"):
        forward_only(num_ranks=1, num_microbatches=1, student=False, teacher=False)
