"""When the teacher runs changes nothing: `fill`, `inline` and `batch` give the same bits after ten steps.

Also what look-ahead must not do: grow, leave something behind at the end of the data, survive a kill as anything else than
the uninterrupted run, or be disturbed by an evaluation between steps.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import Loss
from distill.evaluate import evaluate
from distill.forward import run_forward
from distill.step import messages
from parallel import checkpoint
from parallel.pipeline.actions import Kind
from parallel.pipeline.fill import prologue
from parallel.pipeline.p2p import Links
from parallel.pipeline.validate import count_peaks
from tests.equivalence.trajectory import (
    SEQ_LEN,
    Case,
    batch_of,
    layout_name,
    make_step,
    mesh_of,
    plan_of,
    run_case,
    run_reference,
    save_models,
    save_now,
    share_of,
    state_of,
    train,
)
from tests.workers import run_distributed

NUM_STEPS = 10
WAYS = ("fill", "inline", "batch")
DTYPES = (torch.float64, torch.float32)
STAGES = {1: ("1f1b", "tied"), 2: ("interleaved", "deep")}
"""Virtual stages -> a schedule and a student with layers for them."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _case(layout: tuple[int, int, int], virtual_stages: int, num_microbatches: int, way: str) -> Case:
    schedule, student = STAGES[virtual_stages]
    rows = layout[1] * num_microbatches
    return Case(
        *layout, schedule, way, student, num_microbatches, 2, virtual_stages=virtual_stages, rows=rows
    )


def _train_in_every_way(
    cases: list[Case], dtypes: tuple[torch.dtype, ...], folders: dict[str, str], num_steps: int
) -> list[str]:
    """Train each case in the three ways; return what differs from `inline` anywhere on this rank."""
    mesh = mesh_of(cases[0])
    different = []
    for case, dtype in itertools.product(cases, dtypes):
        results = {}
        for way in WAYS:
            step = make_step(replace(case, teacher=way), folders, mesh, dtype=dtype, num_steps=num_steps)
            stats = train(step, range(num_steps))
            assert step.links.is_empty and not step._signals, "the queue has drained"
            results[way] = {
                "losses": torch.tensor([(s.hard, s.soft, s.total, s.grad_norm) for s in stats]).double(),
                "gradients": step.optimizer.flat_grad.clone(),
                **state_of(step),
            }
            step.close()
        different += [
            f"{way} {case} {dtype} {name}"
            for way in ("fill", "batch")
            for name, value in results["inline"].items()
            if not torch.equal(results[way][name], value)
        ]
    return different


def _check(
    layout: tuple[int, int, int],
    counts: tuple[int, ...],
    folders: dict[str, str],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    num_steps: int = NUM_STEPS,
) -> None:
    cases = [_case(layout, stages, count, "inline") for stages, count in itertools.product(STAGES, counts)]
    world_size = layout[0] * layout[1] * layout[2]
    arguments = (cases, dtypes, folders, num_steps)
    for different in run_distributed(world_size, _train_in_every_way, *arguments, timeout_s=1500):
        assert not different


@pytest.mark.parametrize(
    "layout",
    [
        (2, 1, 1),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ((2, 2, 1), (2, 1, 2))),
        (4, 1, 1),
    ],
    ids=layout_name,
)
def test_the_same_bits(layout: tuple[int, int, int], folders: dict[str, str]) -> None:
    dtypes, num_steps = (DTYPES, 4) if layout == (2, 1, 1) else (DTYPES[:1], 3)
    _check(layout, (3,), folders, dtypes, num_steps)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 16])
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)], ids=layout_name)
def test_the_same_bits_from_one_to_sixteen_microbatches(
    layout: tuple[int, int, int], num_microbatches: int, folders: dict[str, str]
) -> None:
    # Sixteen micro-batches on four processes take minutes in one type.
    dtypes = DTYPES if num_microbatches < 16 or layout == (2, 1, 1) else DTYPES[:1]
    _check(layout, (num_microbatches,), folders, dtypes)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("layout", [(4, 2, 1), (4, 1, 2), (2, 2, 2)], ids=layout_name)
def test_the_same_bits_on_eight_ranks(layout: tuple[int, int, int], folders: dict[str, str]) -> None:
    _check(layout, (1, 5), folders, DTYPES[:1], num_steps=4)


def _trajectories(cases: list[Case], folders: dict[str, str]) -> list[Any]:
    mesh = mesh_of(cases[0])
    return [run_case(case, folders, mesh) for case in cases]


@pytest.mark.parametrize(
    "layout", [(2, 1, 1), pytest.param((4, 1, 1), marks=pytest.mark.slow)], ids=layout_name
)
def test_other_schedules_follow_one_process(layout: tuple[int, int, int], folders: dict[str, str]) -> None:
    """Zero-bubble, interleaved and gpipe with virtual stages, the teacher filling: losses, norms and parameters to 1e-9."""
    cases = [
        Case(*layout, "zero_bubble", "fill", "tied", 4, 2),
        Case(*layout, "interleaved", "fill", "deep", 4, 3, virtual_stages=2),
        Case(*layout, "gpipe", "fill", "deep", 2, 1, virtual_stages=2),
        Case(*layout, "interleaved", "batch", "deep", 4, 1, virtual_stages=2, recompute="full"),
        Case(*layout, "zero_bubble", "inline", "untied", 2, 1, recompute="selective"),
    ]
    references = {case.student: run_reference(case.student, folders) for case in cases}
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    seen = [set() for _ in cases]
    for rank in run_distributed(layout[0], _trajectories, cases, folders, timeout_s=300):
        for number, (case, trajectory) in enumerate(zip(cases, rank, strict=True)):
            reference = references[case.student]
            for name in ("losses", "norms"):
                found, wanted = (torch.tensor(getattr(each, name)) for each in (trajectory, reference))
                torch.testing.assert_close(found, wanted, **tolerance, msg=lambda m, c=case: f"{c}: {m}")
            for name, parameter in trajectory.parameters.items():
                name = name.removesuffix("@tied")
                torch.testing.assert_close(parameter, reference.parameters[name], **tolerance)
                seen[number].add(name)
    for case, names in zip(cases, seen, strict=True):
        assert names == references[case.student].parameters.keys()


def _killed_and_resumed(case: Case, folders: dict[str, str], root: Path) -> tuple[int, bool]:
    """Train; train again, save in the middle with a full queue, go on in new objects; compare."""
    mesh = mesh_of(case)
    whole = make_step(case, folders, mesh, num_steps=NUM_STEPS)
    losses = [stats.total for stats in train(whole, range(NUM_STEPS))]
    first = make_step(case, folders, mesh, num_steps=NUM_STEPS)
    train(first, range(4))
    queued = len(first._signals)
    folder = save_now(root, 4, first.optimizer, mesh, extras={}, keep=1)
    second = make_step(case, folders, mesh, num_steps=NUM_STEPS)
    checkpoint.restore(folder, second.optimizer, mesh)
    resumed = [stats.total for stats in train(second, range(4, NUM_STEPS))]
    expected, found = state_of(whole), state_of(second)
    same = all(torch.equal(found[name], value) for name, value in expected.items())
    return queued, same and resumed == losses[4:]


def test_a_kill_with_a_full_queue_resumes_to_the_same_bits(folders: dict[str, str], tmp_path: Path) -> None:
    for number, case in enumerate([_case((2, 1, 1), 1, 4, "fill"), _case((2, 1, 1), 2, 3, "fill")]):
        results = run_distributed(2, _killed_and_resumed, case, folders, tmp_path / str(number))
        assert results[1][0] > 0, "teacher outputs are waiting on the last rank when the run is killed"
        assert all(same for _, same in results)


def _judged_between_steps(case: Case, folders: dict[str, str]) -> bool:
    """Evaluate between steps, with messages of the teacher under way; compare with a run that is left alone."""
    mesh = mesh_of(case)
    states: list[dict[str, Tensor]] = []
    for judged in (False, True):
        step = make_step(case, folders, mesh, num_steps=4)
        traffic = messages(step.student_models[0], step.teacher_model, rows=1, seq_len=SEQ_LEN)
        links = Links(mesh, {kind: traffic[kind] for kind in (Kind.F, Kind.K)})
        text = share_of(batch_of(99, case.rows), case, mesh)
        for index in range(4):
            step(index)
            if judged:
                models = {"students": step.student_models, "teacher": step.teacher_model}
                evaluate(mesh, links, text, **models)
        states.append(state_of(step))
    return all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_an_evaluation_between_steps_disturbs_nothing(folders: dict[str, str]) -> None:
    assert all(run_distributed(2, _judged_between_steps, _case((2, 1, 1), 1, 3, "fill"), folders))


def _outputs_ahead(case: Case, folders: dict[str, str]) -> bool:
    """Compare what waits on the last rank after a step with a teacher run on its own; it must be frozen too."""
    mesh = mesh_of(case)
    step, fresh = (make_step(case, folders, mesh, num_steps=6) for _ in range(2))
    before = [parameter.clone() for parameter in step.teacher_model.parameters()]
    train(step, range(2))
    traffic = messages(None, step.teacher_model, rows=1, seq_len=SEQ_LEN)
    links = Links(mesh, traffic)
    kept: dict[int, Tensor] = {}
    batches = [batch for index in (2, 3) for batch in share_of(batch_of(index, case.rows), case, mesh)]
    names = {id(batch): number for number, batch in enumerate(batches, 2 * case.num_microbatches)}
    run_forward(
        mesh,
        links,
        batches,
        teacher=fresh.teacher_model,
        consume=lambda batch, hidden: kept.update({names[id(batch)]: hidden[Kind.K]}),
    )
    frozen = all(torch.equal(a, b) for a, b in zip(before, step.teacher_model.parameters(), strict=True))
    assert not step.teacher_model.training
    assert not any(parameter.requires_grad for parameter in step.teacher_model.parameters())
    assert not mesh.pp.is_last or step._signals
    return frozen and all(torch.equal(kept[number], signal) for number, signal in step._signals.items())


def test_outputs_ahead_are_those_of_a_fresh_teacher(folders: dict[str, str]) -> None:
    assert all(run_distributed(2, _outputs_ahead, _case((2, 1, 1), 1, 4, "fill"), folders))


def _a_hundred_steps(case: Case, folders: dict[str, str]) -> tuple[list[int], list[int], int]:
    """Return the buffers made so far and the pending sends after each step, and the longest queue."""
    step = make_step(case, folders, mesh_of(case), num_steps=200)
    buffers, pending = [], []
    for index in range(100):
        step(index)
        buffers.append(step.links.num_buffers)
        pending.append(step.links.num_under_way)
    return buffers, pending, step.most_signals


@pytest.mark.slow
@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_nothing_grows_over_a_hundred_steps(virtual_stages: int, folders: dict[str, str]) -> None:
    case = _case((2, 1, 1), virtual_stages, 3, "fill")
    plan = plan_of(case, teacher="fill")
    ranks = run_distributed(2, _a_hundred_steps, case, folders)
    for buffers, pending, _ in ranks:
        assert len(set(buffers[2:])) == 1, "no message needs memory of its own from the third step on"
        assert max(pending[50:]) <= max(pending[:50])
    planned = max(count_peaks(each).teacher_outputs for each in (plan, prologue(plan)))
    assert 0 < ranks[1][2] <= planned and ranks[0][2] == 0


def _same_model(case: Case, folders: dict[str, str]) -> tuple[float, bool]:
    """Return the soft loss and whether all gradients are exactly zero."""
    mesh = mesh_of(case)
    step = make_step(case, folders, mesh, loss=Loss(alpha=0.0, temperature=2.0), num_steps=2)
    stats = step(0)
    return stats.soft, not step.optimizer.flat_grad.any().item()


def test_a_teacher_that_is_the_student_teaches_nothing(folders: dict[str, str]) -> None:
    case = replace(_case((2, 1, 1), 1, 3, "fill"), twin=True)
    for soft, no_gradient in run_distributed(2, _same_model, case, folders):
        assert soft == 0.0 and no_gradient
