"""One trajectory, whatever the layout: five steps against plain PyTorch in one process, float64, to 1e-9."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import pytest
import torch

from parallel.mesh import Axis, Mesh
from parallel.pipeline.stage import TrainStage
from tests.equivalence.trajectory import (
    ADAMW,
    ROWS,
    Case,
    Trajectory,
    layout_name,
    run_case,
    run_cases,
    run_reference,
    save_models,
)
from tests.workers import WorkerError, run_distributed

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
LAYOUTS += [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
SCHEDULES, TEACHERS, STUDENTS = ("gpipe", "1f1b"), ("inline", "batch"), ("untied", "tied")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[str, Trajectory]:
    return {student: run_reference(student, folders) for student in STUDENTS}


def _check(case: Case, ranks: list[Trajectory], reference: Trajectory) -> None:
    # The families' norms compute in float32 even here, and a compiler adds in another order.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if case.compiled else {"rtol": 1e-9, "atol": 1e-9}
    assert max(reference.norms) > ADAMW.clip, "clipping must be active"
    seen = set()
    for trajectory in ranks:
        torch.testing.assert_close(
            torch.tensor(trajectory.losses),
            torch.tensor(reference.losses),
            **tolerance,
            msg=f"{case}: losses",
        )
        torch.testing.assert_close(
            torch.tensor(trajectory.norms),
            torch.tensor(reference.norms),
            **tolerance,
            msg=f"{case}: norms",
        )
        for name, parameter in trajectory.parameters.items():
            expected = reference.parameters[name.removesuffix("@tied")]
            torch.testing.assert_close(
                parameter, expected, **tolerance, msg=lambda m, n=name: f"{case} {n}: {m}"
            )
            seen.add(name.removesuffix("@tied"))
    assert seen == reference.parameters.keys()


def _run(cases: list[Case], folders: dict[str, str], references: dict[str, Trajectory]) -> None:
    world_size = cases[0].pp * cases[0].dp * cases[0].tp
    results = run_distributed(world_size, run_cases, cases, folders, timeout_s=900)
    for index, case in enumerate(cases):
        _check(case, [rank[index] for rank in results], references[case.student])


@pytest.mark.parametrize(
    "layout",
    [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)],
    ids=layout_name,
)
def test_every_layout(
    layout: tuple[int, int, int], folders: dict[str, str], references: dict[str, Trajectory]
) -> None:
    most = ROWS // layout[1]
    cases = [
        Case(*layout, "1f1b", "inline", "untied", most),
        Case(*layout, "gpipe", "batch", "tied", most, slices=2),
        Case(*layout, "1f1b", "batch", "tied", 1),
        Case(*layout, "gpipe", "inline", "untied", 2),
    ]
    # Sums over tp take their time on two cores; all cases of all layouts are below.
    _run(cases[:2] if layout[2] > 1 else cases, folders, references)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_every_layout_in_every_way(
    layout: tuple[int, int, int], folders: dict[str, str], references: dict[str, Trajectory]
) -> None:
    counts = [count for count in (1, 2, 4, 8) if ROWS % (layout[1] * count) == 0]
    ways = itertools.product(SCHEDULES, TEACHERS, STUDENTS, counts)
    _run([Case(*layout, *way) for way in ways], folders, references)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    "layout", [(2, 1, 1), pytest.param((1, 1, 2), marks=pytest.mark.slow)], ids=["pp2", "tp2"]
)
def test_recomputing_activations_changes_nothing(
    layout: tuple[int, int, int], recompute: str, folders: dict[str, str], references: dict[str, Trajectory]
) -> None:
    case = Case(*layout, "1f1b", "inline", "tied", 4, slices=3, recompute=recompute)
    _run([case], folders, references)


@pytest.mark.parametrize(
    ("layout", "some"),
    [
        ((1, 1, 1), slice(None)),
        ((2, 1, 1), slice(None)),
        ((1, 1, 2), slice(1, 3)),
        pytest.param((1, 2, 1), slice(None), marks=pytest.mark.slow),
        pytest.param((1, 1, 2), slice(None), marks=pytest.mark.slow),
    ],
    ids=["pp1", "pp2", "tp2", "dp2", "tp2 whole"],
)
def test_linears_in_two_factors(layout: tuple[int, int, int], some: slice, folders: dict[str, str]) -> None:
    cases = [
        Case(*layout, "1f1b", "inline", "factored", 4),
        Case(*layout, "zero_bubble", "batch", "factored tied", 2),
        Case(*layout, "zero_bubble", "inline", "factored", 2, recompute="selective"),
        Case(*layout, "gpipe", "inline", "factored", 2, recompute="full"),
    ][some]
    students = {case.student for case in cases}
    _run(cases, folders, {student: run_reference(student, folders) for student in students})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiling_the_layers_changes_nothing(
    folders: dict[str, str], references: dict[str, Trajectory]
) -> None:
    for pp, tp, recompute in ((2, 1, "full"), (1, 2, "none")):
        _run(
            [Case(pp, 1, tp, "1f1b", "inline", "tied", 4, recompute=recompute, compiled=True)],
            folders,
            references,
        )


def _run_without_tie(case: Case, folders: dict[str, str]) -> Trajectory:
    mesh = Mesh.create(pp=case.pp, dp=case.dp, tp=case.tp)
    return run_case(case, folders, replace(mesh, gradients=replace(mesh.gradients, tie=Axis("tie"))))


def test_a_forgotten_tie_is_seen(folders: dict[str, str], references: dict[str, Trajectory]) -> None:
    case = Case(2, 1, 1, "1f1b", "inline", "tied", 2)
    results = run_distributed(2, _run_without_tie, case, folders)
    with pytest.raises(AssertionError, match="losses"):
        _check(case, results, references["tied"])


def _fails_in_the_middle(cases: list[Case], folders: dict[str, str]) -> None:
    original = TrainStage.backward

    def backward(self: TrainStage, microbatch: int, grad: torch.Tensor) -> torch.Tensor | None:
        if microbatch == 1 and torch.distributed.get_rank() == 1:
            raise ArithmeticError("broken on purpose")
        return original(self, microbatch, grad)

    TrainStage.backward = backward
    try:
        run_cases(cases, folders)
    finally:
        TrainStage.backward = original


def test_a_failure_names_the_rank_and_the_action(folders: dict[str, str]) -> None:
    case = Case(2, 1, 1, "1f1b", "inline", "tied", 4)
    with pytest.raises(
        WorkerError, match=r"rank 1 \(pp 1, dp 0, tp 0\) failed at 1B1: ArithmeticError: broken on purpose"
    ):
        run_distributed(2, _fails_in_the_middle, [case], folders)
