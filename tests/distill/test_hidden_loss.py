"""The hidden-state term: its gradient, and five steps with it in every layout against plain PyTorch on whole models."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distill.annealing import Stages
from distill.config import Hidden
from distill.evaluate import num_parameters
from distill.hidden_loss import HiddenTerm, hidden_distance
from distill.hidden_map import Pair
from parallel import checkpoint
from parallel.gradients import WeightGradients
from parallel.mesh import Mesh
from parallel.pipeline.p2p import Message
from parallel.weights import export_weights
from tests.equivalence.trajectory import (
    LOSS,
    SINGLE,
    STEPS,
    Case,
    Trajectory,
    make_step,
    mesh_of,
    run_case,
    run_cases,
    run_reference,
    save_models,
    save_now,
    state_of,
    train,
)
from tests.workers import run_distributed

ACROSS = Hidden(weight=3.0, layers=((0, 3), (1, 0), (3, 2)))
"""With two layers and three on the first of two ranks: one pair on it, one from the second rank, one to it."""
COSINE = replace(ACROSS, kind="cosine", weight=Stages("steps", {0: 2.0, 2: 0.0, 3: 1.0}))
DEEP = Hidden(weight=3.0, every=3)
TIED = replace(SINGLE, hidden=ACROSS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[tuple[str, str], Trajectory]:
    wanted = [("tied", ACROSS), ("tied", COSINE), ("untied", ACROSS), ("deep", DEEP)]
    return {(student, str(hidden)): run_reference(student, folders, hidden) for student, hidden in wanted}


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_gradient_is_that_of_the_formula(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([True, False, True, True, False, True, True])
    # A token with a huge hidden state, as attention sinks have, counts like any other.
    student[2] *= 1e4
    teacher[2] *= 1e4
    student.requires_grad_()
    if kind == "mse":
        expected = ((student - teacher).pow(2).mean(1) / teacher.pow(2).mean(1))[valid].sum()
    else:
        expected = (1 - F.cosine_similarity(student, teacher, dim=1))[valid].sum()
    (gradient,) = torch.autograd.grad(expected, student)
    found, ours = hidden_distance(student.detach(), teacher, valid, kind)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-14)
    narrow = [each.detach().bfloat16() for each in (student, teacher)]
    assert [each.dtype for each in hidden_distance(*narrow, valid, kind)] == [torch.float64, torch.float32]


def test_without_projections_a_student_is_held_against_its_own_channels() -> None:
    channels = torch.arange(48)[torch.arange(48) % 3 != 1]
    term = HiddenTerm(
        Mesh.single(),
        [Pair(0, 1)],
        split=TIED.split,
        message=Message((1, 7, 48), torch.float64),
        kind="mse",
        students=[],
        first=None,
        channels=channels,
    )
    term._weight, term._num_valid_tokens = 1.0, lambda: 5
    teacher_TE = torch.randn(7, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid_T = torch.tensor([True, False, True, True, False, True, True])
    own_TD = teacher_TE[:, channels]
    gradient_TD = term._gradient(0, WeightGradients(), own_TD, teacher_TE, valid_T)
    assert gradient_TD.shape == (7, 32) and not gradient_TD.any() and term.sum == 0
    # Channels that it does not have are not counted in the teacher's length either.
    gradient_TD = term._gradient(0, WeightGradients(), 3 * own_TD, teacher_TE, valid_T)
    assert gradient_TD[valid_T].all() and not gradient_TD[~valid_T].any()
    torch.testing.assert_close(term.sum.item(), 4.0, rtol=1e-12, atol=0)


def _check(
    cases: list[Case], ranks: Iterable[list[Trajectory]], references: dict[tuple[str, str], Trajectory]
) -> None:
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    seen: list[set[str]] = [set() for _ in cases]
    for rank in ranks:
        for number, (case, trajectory) in enumerate(zip(cases, rank, strict=True)):
            reference = references[case.student, str(case.hidden)]
            for name in ("losses", "norms", "hidden"):
                found, wanted = (torch.tensor(getattr(each, name)) for each in (trajectory, reference))
                torch.testing.assert_close(
                    found, wanted, **tolerance, msg=lambda m, c=case, n=name: f"{c}: {n}: {m}"
                )
            for name, parameter in trajectory.parameters.items():
                name = name.removesuffix("@tied")
                torch.testing.assert_close(
                    parameter,
                    reference.parameters[name],
                    **tolerance,
                    msg=lambda m, c=case, n=name: f"{c}: {n}: {m}",
                )
                seen[number].add(name)
    for case, names in zip(cases, seen, strict=True):
        assert names == references[case.student, str(case.hidden)].parameters.keys()


def test_one_process_follows_plain_pytorch(
    folders: dict[str, str], references: dict[tuple[str, str], Trajectory]
) -> None:
    cases = [
        TIED,
        replace(TIED, hidden=COSINE, recompute="full"),
        replace(TIED, student="untied", recompute="selective", slices=2),
        replace(TIED, student="deep", hidden=DEEP, teacher="batch"),
    ]
    _check(cases, [[run_case(case, folders, Mesh.single()) for case in cases]], references)
    assert max(references["tied", str(ACROSS)].hidden) > 0.5, "the term matters"


@pytest.mark.parametrize(
    "layout",
    [
        "pp2",
        pytest.param("pp4", marks=pytest.mark.slow),
        "tp2",
        "dp2",
        pytest.param("dp2, one bucket", marks=pytest.mark.slow),
    ],
)
def test_no_layout_changes_anything(
    layout: str, folders: dict[str, str], references: dict[tuple[str, str], Trajectory]
) -> None:
    size = int(layout[2])
    case = replace(TIED, **{layout[:2]: size})
    if layout == "pp2":
        uneven = replace(case, student_layers=(1, 3), teacher_layers=(4, 1), num_microbatches=8)
        cases = [
            case,
            replace(uneven, teacher="fill", slices=2, recompute="full"),
            replace(case, schedule="zero_bubble", teacher="fill", slices=2, hidden=COSINE),
            replace(case, schedule="gpipe", teacher="batch", recompute="selective"),
            replace(
                case,
                student="deep",
                hidden=DEEP,
                schedule="interleaved",
                teacher="fill",
                virtual_stages=2,
            ),
        ]
    elif layout == "pp4":
        cases = [replace(case, teacher="fill"), replace(case, schedule="zero_bubble", teacher="batch")]
    else:
        apart = replace(case, student="untied", recompute="full", num_microbatches=2, bucket_bytes=1)
        cases = {"tp2": [case, apart], "dp2": [apart], "dp2, one bucket": [case]}[layout]
    _check(cases, run_distributed(size, run_cases, cases, folders, timeout_s=300), references)


def _stopped_and_resumed(case: Case, folders: dict[str, str], root: Path) -> tuple[int, bool, list[str]]:
    """Train; train again, save in the middle with the teacher ahead, close, go on in new objects; compare."""
    before = set(threading.enumerate())
    mesh, loss, num_steps = mesh_of(case), replace(LOSS, hidden=case.hidden), 7
    whole, first, second = (make_step(case, folders, mesh, loss=loss, num_steps=num_steps) for _ in range(3))
    totals = [stats.total for stats in train(whole, range(num_steps))]
    train(first, range(4))
    waiting = first.hidden.handover.num_waiting
    folder = save_now(root, 4, first.optimizer, mesh, extras={}, keep=1)
    first.close()
    checkpoint.restore(folder, second.optimizer, mesh)
    resumed = [stats.total for stats in train(second, range(4, num_steps))]
    expected, found = state_of(whole), state_of(second)
    same = all(torch.equal(found[name], value) for name, value in expected.items())
    whole.close()
    second.close()
    left = [thread.name for thread in set(threading.enumerate()) - before]
    return waiting, same and resumed == totals[4:], left


def test_a_kill_with_the_teacher_ahead_resumes_to_the_same_bits(
    folders: dict[str, str], tmp_path: Path
) -> None:
    case = replace(TIED, pp=2, teacher="fill", slices=2)
    results = run_distributed(2, _stopped_and_resumed, case, folders, tmp_path)
    assert all(waiting > 0 for waiting, _, _ in results), "both ranks have made what the next step needs"
    assert all(same for _, same, _ in results)
    assert not any(left for _, _, left in results), "a thread that waits in gloo aborts its process at exit"


def _restored_in_another_layout(case: Case, folders: dict[str, str], folder: Path) -> dict[str, torch.Tensor]:
    step = make_step(case, folders, mesh_of(case), loss=replace(LOSS, hidden=case.hidden))
    checkpoint.restore(folder, step.optimizer, step.mesh)
    return {name: value for name, value in state_of(step).items() if "hidden_projection" in name}


def test_any_layout_restores_the_projections(folders: dict[str, str], tmp_path: Path) -> None:
    step = make_step(TIED, folders, Mesh.single(), loss=replace(LOSS, hidden=ACROSS))
    train(step, range(2))
    folder = save_now(tmp_path, 2, step.optimizer, step.mesh, extras={}, keep=1)
    expected = {name: value for name, value in state_of(step).items() if "hidden_projection" in name}
    assert len(expected) == 3 * 4 and expected["exp_avg/hidden_projection.3.weight"].abs().max() > 0
    cases = [replace(TIED, pp=2), replace(TIED, tp=2)]
    for case in cases:
        ranks = run_distributed(2, _restored_in_another_layout, case, folders, folder)
        found = {name: value for rank in ranks for name, value in rank.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_round_without_a_cut_may_have_projections_where_the_one_before_had_none(
    folders: dict[str, str], tmp_path: Path
) -> None:
    plain, term = (
        make_step(TIED, folders, Mesh.single(), loss=replace(LOSS, hidden=hidden))
        for hidden in (Hidden(), ACROSS)
    )
    for name, step in (("plain", plain), ("term", term)):
        train(step, range(1))
        save_now(tmp_path / name, 1, step.optimizer, step.mesh, extras={}, keep=1)
    trained, without = state_of(term), state_of(plain)

    def restored(source: str, target: Hidden) -> dict[str, torch.Tensor]:
        step = make_step(TIED, folders, Mesh.single(), loss=replace(LOSS, hidden=target))
        folder = tmp_path / source / "step-00000001"
        with pytest.raises(checkpoint.CheckpointError, match="hidden_projection"):
            checkpoint.restore(folder, step.optimizer, step.mesh)
        checkpoint.restore(
            folder, step.optimizer, step.mesh, optional=lambda name: "hidden_projection" in name
        )
        return state_of(step)

    assert all(torch.equal(value, trained[name]) for name, value in restored("term", Hidden()).items())
    for name, value in restored("plain", ACROSS).items():
        begins_anew = "hidden_projection" in name
        assert begins_anew or torch.equal(value, without[name])
        assert not (begins_anew and name.startswith("exp_avg") and value.any())


def test_projections_are_no_part_of_the_student(folders: dict[str, str], tmp_path: Path) -> None:
    term, plain = (
        make_step(TIED, folders, Mesh.single(), loss=replace(LOSS, hidden=hidden))
        for hidden in (ACROSS, Hidden())
    )
    assert plain.hidden is None
    assert num_parameters(term.student_models, term.mesh) == num_parameters(plain.student_models, plain.mesh)
    for name, step in (("term", term), ("plain", plain)):
        (tmp_path / name).mkdir()
        export_weights(step.student_models, step.mesh, tmp_path / name, dtype=torch.float64)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("term", "plain")
    ]
    assert contents[0] == contents[1]


def test_a_student_that_is_its_teacher_is_at_no_distance(folders: dict[str, str]) -> None:
    """Layer by layer, through the identity or without a projection; a call from outside of a step hands nothing over."""
    for projection in ("learned", "none"):
        hidden = Hidden(weight=1.0, every=1, projection=projection)
        case = replace(TIED, twin=True, hidden=hidden)
        step = make_step(
            case, folders, Mesh.single(), loss=replace(LOSS, alpha=0.0, hidden=hidden), num_steps=1
        )
        batch = step._window.step(0)[0]
        for model in (*step.student_models, step.teacher_model):
            with torch.no_grad():
                model(batch.input_ids_BS, batch.position_ids_BS)
        assert step.hidden.handover.num_waiting == 0
        (stats,) = train(step, range(1))
        assert stats.hidden == 0 and stats.grad_norm < 1e-12
        assert len(step.hidden.projections) == (4 if projection == "learned" else 0)
        step.hidden.handover.close()


def test_what_waits_is_bounded_by_the_look_ahead(folders: dict[str, str]) -> None:
    step = make_step(TIED, folders, Mesh.single(), loss=replace(LOSS, hidden=ACROSS), num_steps=STEPS)
    train(step, range(STEPS))
    assert step.hidden.handover.most_waiting == len(ACROSS.layers), "inline: those of one micro-batch"
