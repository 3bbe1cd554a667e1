"""One optimizer step: the same statistics in every layout, with and without a teacher, with nothing to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import distill.step as step_module
from distill.annealing import Ramp, Stages
from distill.config import Hidden, Loss
from distill.data import IGNORE
from distill.step import DistillationStep, head_of, messages
from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage
from parallel.pipeline.actions import Kind
from parallel.pipeline.executor import ActionFailed
from parallel.pipeline.p2p import Message
from tests.equivalence.trajectory import (
    LOSS,
    RATE,
    ROWS,
    SINGLE,
    Case,
    batch_of,
    make_step,
    mesh_of,
    run_reference,
    save_models,
    state_of,
    train,
)
from tests.families import tiny_config
from tests.workers import run_distributed

HARD = replace(LOSS, alpha=1.0)
LAYOUTS = [
    replace(SINGLE, pp=2, num_microbatches=8),
    replace(SINGLE, tp=2, schedule="gpipe", teacher="batch", slices=2),
    replace(SINGLE, dp=2, num_microbatches=2),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _statistics(cases: list[Case], folders: dict[str, str], loss: Loss, with_teacher: bool) -> list:
    results = []
    for case in cases:
        step = make_step(case, folders, mesh_of(case), loss=loss, with_teacher=with_teacher)
        stats = train(step, range(2))
        assert step.links.is_empty
        results.append([asdict(each) for each in stats])
    return results


def _compare(ranks: list[list[list[dict]]], expected: list[dict]) -> None:
    """Compare what every rank reports in every layout with one process; times differ, idle shares agree."""
    for layout in range(len(ranks[0])):
        idle = {tuple(step["bubble_fraction"] for step in rank[layout]) for rank in ranks}
        assert len(idle) == 1, "the mean idle share is one number"
        assert all(0 <= share < 1 for share in next(iter(idle)))
        for rank in ranks:
            for mine, other in zip(rank[layout], expected, strict=True):
                assert mine["num_valid_tokens"] == other["num_valid_tokens"]
                assert mine["learning_rate"] == other["learning_rate"]
                assert 0 < mine["step_s"]
                for name in ("hard", "soft", "total", "grad_norm"):
                    assert mine[name] == pytest.approx(other[name], rel=1e-9, abs=1e-12), (layout, name)


def test_statistics_do_not_depend_on_the_layout(folders: dict[str, str]) -> None:
    counts = [int((half != IGNORE).sum()) for half in batch_of(0).labels_BS.chunk(2)]
    assert counts[0] != counts[1], "the replicas must have unequal numbers of valid tokens"
    (single,) = _statistics([SINGLE], folders, LOSS, True)
    reference = run_reference("tied", folders)
    for index, step in enumerate(single):
        got = (step["total"], step["hard"], step["soft"])
        assert got == pytest.approx(reference.losses[index], rel=1e-9)
        assert step["grad_norm"] == pytest.approx(reference.norms[index], rel=1e-9)
        assert step["learning_rate"] == RATE.at(index)
        assert step["num_valid_tokens"] == batch_of(index).num_valid_tokens
    _compare(run_distributed(2, _statistics, LAYOUTS, folders, LOSS, True), single)


def test_the_hard_loss_alone_needs_no_teacher(folders: dict[str, str]) -> None:
    (single,) = _statistics([SINGLE], folders, HARD, False)
    batch = batch_of(0)
    model = AutoModelForCausalLM.from_pretrained(folders["tied"], dtype=torch.float64)
    logits = model(
        input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
    ).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, batch.labels_BS.flatten(), ignore_index=IGNORE).item()
    assert single[0]["hard"] == single[0]["total"] == pytest.approx(expected, rel=1e-9)
    assert single[0]["soft"] == single[1]["soft"] == 0
    _compare(run_distributed(2, _statistics, LAYOUTS, folders, HARD, False), single)
    (with_teacher,) = _statistics([SINGLE], folders, HARD, True)
    _compare([[with_teacher]], single)


def test_temperature_and_alpha_are_those_of_the_step(folders: dict[str, str]) -> None:
    """The second step is one of alpha 1: hard alone, though the teacher has run."""
    loss = replace(
        LOSS,
        kind="jsd",
        temperature=Ramp("linear", 4.0, 2.0),
        alpha=Stages("steps", {0: 0.25, 1: 1.0, 2: 0.5}),
    )
    step = make_step(SINGLE, folders, Mesh.single(), loss=loss, num_steps=3)
    taught = train(step, range(3))
    assert [(each.temperature, each.alpha) for each in taught] == [(4.0, 0.25), (3.0, 1.0), (2.0, 0.5)]
    assert taught[1].soft == 0 and taught[1].total == taught[1].hard
    for each in taught:
        assert each.total == each.alpha * each.hard + (1 - each.alpha) * each.soft
    # The same trajectory from steps whose loss stands still.
    by_hand = make_step(SINGLE, folders, Mesh.single(), num_steps=3)
    for index, constant in enumerate(taught):
        by_hand.loss = lambda _, at=constant: replace(
            LOSS, kind="jsd", temperature=at.temperature, alpha=at.alpha
        )
        again = by_hand(index)
        assert (again.hard, again.soft, again.grad_norm) == (constant.hard, constant.soft, constant.grad_norm)
    half, double = (
        train(
            make_step(
                SINGLE, folders, Mesh.single(), loss=replace(LOSS, kind=kind, temperature=t), num_steps=1
            ),
            range(1),
        )[0]
        for kind, t in (("jsd", 4.0), ("forward_kl", 4.0))
    )
    assert half.soft == taught[0].soft != double.soft


def test_a_soft_loss_without_a_teacher_fails_at_the_action(folders: dict[str, str]) -> None:
    step = make_step(SINGLE, folders, Mesh.single(), with_teacher=False)
    with pytest.raises(ActionFailed, match=r"rank 0 .* failed at 0B0: ValueError: .*no teacher"):
        train(step, range(1))


def _without_tokens(
    cases: list[Case], folders: dict[str, str], loss: Loss = LOSS
) -> list[tuple[list[dict], bool]]:
    """Run a step in which the first half of the rows has no label, then one without any label."""
    results = []
    for case in cases:
        batch = batch_of(0)
        labels = batch.labels_BS.clone()
        labels[: ROWS // 2] = IGNORE
        batches = [replace(batch, labels_BS=each) for each in (labels, torch.full_like(labels, IGNORE))]
        step = make_step(case, folders, mesh_of(case), loss=loss, batch_at=batches.__getitem__)
        half, none = train(step, range(2))
        finite = all(bool(value.isfinite().all()) for value in state_of(step).values())
        results.append(([asdict(half), asdict(none)], finite))
    return results


def test_micro_batches_replicas_and_steps_without_valid_tokens(folders: dict[str, str]) -> None:
    (single,) = _without_tokens([SINGLE], folders)
    labels = batch_of(0).labels_BS[ROWS // 2 :]
    assert single[0][0]["num_valid_tokens"] == int((labels != IGNORE).sum())
    assert single[0][1]["hard"] == single[0][1]["soft"] == single[0][1]["grad_norm"] == 0
    ranks = run_distributed(2, _without_tokens, LAYOUTS, folders)
    assert all(finite for rank in ranks for _, finite in rank)
    _compare([[stats for stats, _ in rank] for rank in ranks], single[0])


def test_a_step_without_valid_tokens_has_no_distance_of_hidden_states(folders: dict[str, str]) -> None:
    loss = replace(LOSS, hidden=Hidden(weight=1.0))
    (((half, none), finite),) = _without_tokens([SINGLE], folders, loss)
    assert finite and half["hidden"] > 0
    assert none["num_valid_tokens"] == none["hidden"] == none["total"] == none["grad_norm"] == 0


def _failing_bucket(folders: dict[str, str]) -> str:
    """Let the reduction of a bucket fail that a backward started; return what the step says."""
    case = replace(SINGLE, dp=2, num_microbatches=2)
    step = make_step(case, folders, mesh_of(case))
    reduce = step.optimizer.reduce_bucket

    def reduce_and_fail(chunk: int, index: int) -> None:
        reduce(chunk, index)
        if index == 0:
            raise OSError("the network is gone")

    step.optimizer.reduce_bucket = reduce_and_fail
    with pytest.raises(ActionFailed) as caught:
        step(0)
    step.close()
    return str(caught.value.__cause__)


def test_what_goes_wrong_beside_a_backward_ends_the_step(folders: dict[str, str]) -> None:
    assert run_distributed(2, _failing_bucket, folders) == ["the network is gone"] * 2


def _two_ways(folders: dict[str, str]) -> list[str]:
    """Train with whole and with split backwards; return the names that differ."""
    differ = []
    for layout in ({"pp": 2}, {"tp": 2}):
        case = replace(SINGLE, num_microbatches=8, **layout)
        mesh = mesh_of(case)
        whole = make_step(case, folders, mesh)
        apart = make_step(replace(case, schedule="zero_bubble"), folders, mesh)
        if mesh.pp.size == 1:
            # The zero-bubble order of one stage has nothing to split.
            apart._is_whole = lambda action: False
        for step in (whole, apart):
            train(step, range(2))
        if mesh.pp.size > 1 and mesh.pp.is_last:
            assert len(apart._whole) < case.num_microbatches
        expected = state_of(whole)
        differ += [name for name, value in state_of(apart).items() if not torch.equal(value, expected[name])]
    return differ


def test_split_backwards_train_bit_for_bit_like_whole_ones(folders: dict[str, str]) -> None:
    assert run_distributed(2, _two_ways, folders) == [[], []]


def test_messages_have_the_width_and_dtype_of_their_model() -> None:
    student, teacher = (
        build_stage(tiny_config("llama", hidden_size=width), pp=Axis("pp"), tp=Axis("tp"), dtype=dtype)
        for width, dtype in ((32, torch.float32), (64, torch.bfloat16))
    )
    assert messages(student, teacher, rows=3, seq_len=5) == {
        Kind.F: Message((3, 5, 32), torch.float32),
        Kind.B: Message((3, 5, 32), torch.float32),
        Kind.K: Message((3, 5, 64), torch.bfloat16),
    }
    assert messages(None, teacher, rows=1, seq_len=2).keys() == {Kind.K}
    assert messages(student, None, rows=1, seq_len=2).keys() == {Kind.F, Kind.B}


def test_the_head_carries_the_familys_logits_transform() -> None:
    for family, scale, softcap in (("granite", 0.25, None), ("gemma2", 1.0, 2.0), ("llama", 1.0, None)):
        stage = build_stage(tiny_config(family), pp=Axis("pp"), tp=Axis("tp", 2, 1))
        head = head_of(stage)
        assert (head.scale, head.softcap, head.vocab_size) == (scale, softcap, 97)
        assert head.weight_VD is stage.head.weight and head.weight_VD.shape == (48, 32)


def _spoil(
    step: DistillationStep, loss: Callable, steps: set[int], student: StageModel, microbatch: int
) -> torch.Tensor:
    """Put a NaN into the teacher's output before the loss looks at it."""
    if step._now.step in steps:
        step._signals[microbatch].view(-1)[0] = torch.nan
    return loss(student, microbatch)


def _with_nan(cases: list[Case], folders: dict[str, str], spoilt: set[int]) -> list[dict]:
    """Train with a teacher that is NaN on the last replica in some steps."""
    results = []
    for case in cases:
        mesh = mesh_of(case)
        step = make_step(case, folders, mesh)
        if mesh.dp.is_last:
            step._loss = partial(_spoil, step, step._loss, spoilt)
        states, stats = [state_of(step)], []
        for index in range(3):
            stats.append(step(index))
            states.append(state_of(step))
        results.append(
            {
                "skipped": [each.skipped for each in stats],
                "rates": [each.learning_rate for each in stats],
                "updates": step.optimizer.num_updates,
                "same": [
                    all(torch.equal(now[name], before[name]) for name in now)
                    for before, now in pairwise(states)
                ],
                "finite": all(bool(value.isfinite().all()) for value in states[-1].values()),
            }
        )
    return results


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(folders: dict[str, str]) -> None:
    expected = {
        "skipped": [False, True, False],
        "rates": [RATE.at(index) for index in range(3)],
        "updates": 2,
        "same": [False, True, False],
        "finite": True,
    }
    assert _with_nan([SINGLE], folders, {1}) == [expected]
    for rank in run_distributed(2, _with_nan, LAYOUTS, folders, {1}):
        assert rank == [expected] * len(LAYOUTS)


def test_a_loss_that_is_infinite_skips_the_step_though_gradients_are_finite(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = step_module.fused_distillation_loss

    def infinite(*given: object, **named: object) -> object:
        result = original(*given, **named)
        return replace(result, hard=result.hard + torch.inf)

    step = make_step(SINGLE, folders, Mesh.single())
    before = state_of(step)
    monkeypatch.setattr(step_module, "fused_distillation_loss", infinite)
    assert step(0).skipped
    assert all(torch.equal(value, before[name]) for name, value in state_of(step).items())
