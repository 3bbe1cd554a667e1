from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import (
    STEP_END,
    Action,
    Kind,
    Plan,
    Shape,
    dependencies,
    format_grid,
    parse,
    peer_stage,
    whole_backwards,
)

SHAPE = Shape(num_ranks=4, num_stages=4, num_microbatches=3, num_slices=2)


def needs(text: str, shape: Shape = SHAPE) -> list[str]:
    return [str(action) for action in dependencies(parse(text), shape)]


@st.composite
def actions(draw: st.DrawFn) -> Action:
    kind = draw(st.sampled_from(Kind))
    number = st.integers(0, 10_000)
    microbatch = None if kind in STEP_END else draw(number)
    return Action(draw(number), kind, microbatch, draw(st.none() | number) if kind is Kind.K else None)


@given(actions())
def test_text_form_round_trips(action: Action) -> None:
    assert parse(str(action)) == action
    assert type(parse(str(action)).kind) is Kind


@pytest.mark.parametrize(
    "text", ["2F0", "1SEND_F3", "0K2.1", "0K2", "3REDUCE", "0STEP", "11GATHER", "7NORM", "1RECV_B12"]
)
def test_documented_text_forms(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "F0", "2X0", "2F", "2F0.1", "0STEP1", "-1F0", "2f0", "0K", "0K.1", "1F0 2F0", "3SEND0"]
)
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="action|micro-batch|slices"):
        parse(text)


def test_readiness_of_the_student() -> None:
    assert needs("0F1") == []
    assert needs("2F1") == ["1F1"]
    assert needs("1B2") == ["1F2", "2B2"]
    assert needs("1W2") == ["1B2"]


def test_the_loss_needs_the_teacher_only_where_there_is_one() -> None:
    assert needs("3B0") == ["3F0", "3K0.1"]
    assert needs("3B0", Shape(4, 4, 3)) == ["3F0"]
    assert needs("3B0", Shape(4, 4, 3, num_slices=1)) == ["3F0", "3K0"]


def test_readiness_of_the_teacher() -> None:
    assert needs("0K1.0") == []
    assert needs("0K1.1") == ["0K1.0"]
    assert needs("2K1.0") == ["1K1.1"]
    assert needs("0K1.2", Shape(4, 4, 3, num_slices=3)) == ["0K1.1"]
    assert needs("2K1", Shape(4, 4, 3, num_slices=1)) == ["1K1"]


def test_the_teacher_has_one_stage_a_rank_whatever_the_virtual_stages() -> None:
    shape = Shape(num_ranks=2, num_stages=6, num_microbatches=1, num_slices=1)
    assert needs("5B0", shape) == ["5F0", "1K0"]
    assert needs("1B0", shape) == ["1F0", "2B0"]


def test_readiness_of_the_end_of_the_step() -> None:
    assert needs("1REDUCE") == ["1W0", "1W1", "1W2"]
    assert needs("1NORM") == ["0REDUCE", "1REDUCE", "2REDUCE", "3REDUCE"]
    assert needs("1STEP") == ["1NORM"]
    assert needs("1GATHER") == ["1STEP"]


def test_readiness_of_messages() -> None:
    assert needs("1SEND_F2") == ["1F2"]
    assert needs("1SEND_B2") == ["1B2"]
    assert needs("1SEND_K2") == ["1K2.1"]
    assert needs("1RECV_F2") == ["0SEND_F2"]
    assert needs("1RECV_B2") == ["2SEND_B2"]
    assert needs("1RECV_K2") == ["0SEND_K2"]


@pytest.mark.parametrize(
    ("text", "peer"), [("1SEND_F0", 2), ("1RECV_F0", 0), ("1SEND_B0", 0), ("1RECV_B0", 2), ("1SEND_K0", 2)]
)
def test_the_other_end_of_a_message(text: str, peer: int) -> None:
    assert peer_stage(parse(text)) == peer


def test_stages_go_round_the_ranks() -> None:
    shape = Shape(num_ranks=3, num_stages=6, num_microbatches=1)
    assert [shape.rank_of(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert list(shape.stages_of(1)) == [1, 4]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 3, 1), (1, 1, 1, -1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="="):
        Shape(*sizes)


def test_the_grid_points_at_a_place_and_shows_only_what_is_near() -> None:
    ranks = [[Action(0, Kind.F, each) for each in range(100)], [Action(1, Kind.F, 0)]]
    text = format_grid(ranks, mark=(0, 50), margin=2)
    assert text.splitlines() == [
        "    rank 0  rank 1",
        "48  0F48",
        "49  0F49",
        "50  [0F50]  <-- ERROR HERE",
        "51  0F51",
        "52  0F52",
    ]


def test_the_grid_can_point_behind_the_last_action() -> None:
    assert format_grid([[Action(0, Kind.F, 0)]], mark=(0, 1)).splitlines()[-1] == "1  []  <-- ERROR HERE"


def test_fingerprints_tell_plans_apart() -> None:
    plan = Plan(Shape(1, 1, 1), "forward", "none", ((parse("0F0"),),))
    same = Plan(Shape(1, 1, 1), "forward", "none", ((Action(0, Kind.F, 0),),))
    assert plan.fingerprint() == same.fingerprint()
    others = [
        Plan(Shape(1, 1, 2), "forward", "none", ((parse("0F0"),),)),
        Plan(Shape(1, 1, 1), "forward", "none", ((parse("0F1"),),)),
        Plan(Shape(1, 1, 1), "forward", "none", ((parse("0F0"),),), frozenset({parse("0K0")})),
    ]
    assert len({plan.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_the_look_ahead_is_numbered_from_the_next_step() -> None:
    shape = Shape(1, 1, 2, num_slices=1)
    plan = Plan(
        shape, "none", "fill", (tuple(map(parse, ["0K2", "0K3"])),), frozenset({parse("0K0"), parse("0K4")})
    )
    assert plan.ahead() == {parse("0K0"), parse("0K1"), parse("0K2")}


def test_the_planner_starts_without_torch() -> None:
    code = (
        "import sys; from parallel.pipeline import actions, schedules, lower, order, validate, simulate, trace;"
        "from parallel.pipeline import cycle, fill, partition;"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whole_backwards_are_those_directly_followed_by_their_own_w() -> None:
    text = "0F0 0B0 0W0 0B1 0B2 0W2 0W1 0B3 1W3 0SEND_B3 0W3 0B4"
    actions = [parse(word) for word in text.split()]
    assert whole_backwards(actions) == {parse("0B0"), parse("0B2")}
    assert whole_backwards([]) == whole_backwards([Action(0, Kind.B, 0)]) == frozenset()
