"""Who is slower than planned, and when that is told."""

from __future__ import annotations

from dataclasses import replace

from distill.stragglers import Stragglers
from parallel.mesh import Axis, Mesh
from parallel.pipeline.actions import Kind

MESH = replace(Mesh.single(), pp=Axis("pp", 2), dp=Axis("dp", 2))


def _ranks(*factors: float) -> list[dict[tuple[Kind, int], float]]:
    return [
        {(Kind.F, rank // 2): 0.1 * factor, (Kind.B, rank // 2): 0.2 * factor, (Kind.NORM, 0): 9.0 * factor}
        for rank, factor in enumerate(factors)
    ]


def test_a_rank_is_told_once_and_when_it_is_over() -> None:
    stragglers = Stragglers(MESH)
    assert stragglers.look(_ranks(1, 1, 1, 1), since=2) == []
    assert stragglers.look(_ranks(1, 1, 1.8, 1), since=50) == [
        "stage 1 (rank 2) takes 1.8 times its planned time since step 50"
    ]
    assert stragglers.look(_ranks(1, 1, 1.7, 1), since=100) == []
    assert stragglers.look(_ranks(1, 1, 1.3, 1), since=150) == [], "between the limits nothing is told"
    assert stragglers.look(_ranks(1, 1.1, 1.1, 1), since=200) == [
        "stage 1 (rank 2) is as planned again since step 200; it was slow from step 50 on"
    ]


def test_when_all_are_slower_nobody_straggles() -> None:
    stragglers = Stragglers(MESH)
    stragglers.look(_ranks(1, 1, 1, 1), since=2)
    assert stragglers.look(_ranks(2, 2, 2, 2), since=50) == []
    assert len(stragglers.look(_ranks(2, 2, 2, 4), since=100)) == 1


def test_waiting_at_the_end_of_a_step_is_nobodys_slowness() -> None:
    stragglers = Stragglers(MESH)
    stragglers.look(_ranks(1, 1, 1, 1), since=2)
    late = _ranks(1, 1, 1, 1)
    late[3][Kind.NORM, 0] = 90.0
    assert stragglers.look(late, since=50) == []


def test_each_rank_is_measured_by_its_own_plan() -> None:
    stragglers = Stragglers(MESH)
    stragglers.look(_ranks(1, 4, 1, 1), since=2)
    assert stragglers.look(_ranks(1, 4, 1, 1), since=50) == []
