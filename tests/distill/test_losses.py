from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distill import losses, vocab_chunks
from distill.head import Head
from distill.losses import distillation_loss, evaluate_tokens, fused_distillation_loss
from distill.packing import IGNORE
from parallel.collectives import all_gather, all_reduce_, shard_range
from parallel.mesh import Axis, Mesh
from tests.distill.loss_cases import (
    CASES,
    EXACT,
    Case,
    distance,
    errors,
    heads,
    plain_loss,
    sharded_loss,
    student_logits,
    teacher_logits,
)
from tests.workers import run_distributed


def every_case(num_ranks: int) -> list[dict[str, float]]:
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp
    return [errors(case, tp) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_agree_with_the_formula_on_one_process(case: Case) -> None:
    assert max(errors(case, Mesh.single().tp).values()) < EXACT


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_value_and_gradients_agree_with_the_formula_on_shards(num_ranks: int) -> None:
    """Uneven shards, an empty one (3 ids on 4 ranks), unequal teacher mass, ignored positions, every T and alpha."""
    for by_case in run_distributed(num_ranks, every_case, num_ranks):
        for case, found in zip(CASES, by_case, strict=True):
            assert max(found.values()) < EXACT, (case, found)


def _no_reduction(tensor: Tensor, axis: Axis, **options: Any) -> None:
    return None


def _double_reduction(tensor: Tensor, axis: Axis, **options: Any) -> None:
    all_reduce_(tensor, axis)
    tensor.mul_(2)


def _own_numbers_only(numbers: Tensor, axis: Axis, **options: Any) -> Tensor:
    return numbers.expand(axis.size, *numbers.shape[1:])


def _lose_a_row(row: int) -> Any:
    def gather(numbers: Tensor, axis: Axis, **options: Any) -> Tensor:
        gathered = all_gather(numbers, axis, **options)
        gathered[:, row] = numbers[0, row] / axis.size
        return gathered

    return gather


BREAKAGES = {
    "hidden gradient is not reduced": ("losses.all_reduce_", _no_reduction, {"grad_hidden"}),
    "hidden gradient is reduced twice": ("losses.all_reduce_", _double_reduction, {"grad_hidden"}),
    "numbers are not gathered": (
        "vocab_chunks.all_gather",
        _own_numbers_only,
        {"hard", "soft", "grad_hidden", "grad_weight"},
    ),
    "divergence is not summed": ("vocab_chunks.all_gather", _lose_a_row(6), {"soft"}),
    "label logit is not summed": ("vocab_chunks.all_gather", _lose_a_row(3), {"hard"}),
    "teacher's sum is not summed": ("vocab_chunks.all_gather", _lose_a_row(5), {"soft", "grad_hidden", "grad_weight"}),
}  # fmt: skip


def broken(num_ranks: int) -> dict[str, dict[str, float]]:
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp
    found = {}
    for name, (target, replacement, _) in BREAKAGES.items():
        with mock.patch(f"distill.{target}", replacement):
            found[name] = errors(Case(lopsided=True), tp)
    return found


def test_the_comparison_fails_when_a_reduction_is_broken() -> None:
    by_rank = run_distributed(2, broken, 2)
    for name, (_, _, wrong) in BREAKAGES.items():
        worst = {key: max(rank[name][key] for rank in by_rank) for key in by_rank[0][name]}
        assert {key for key, error in worst.items() if error > 1e-4} >= wrong, (name, worst)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_exactly_no_soft_loss_and_no_soft_gradient(
    temperature: float, dtype: torch.dtype
) -> None:
    case = Case(temperature=temperature, alpha=0.0, bias=True, vocab=1031, student_width=64)
    tensors = case.tensors(dtype)
    tensors |= {f"teacher_{name}": tensors[name] for name in ("hidden", "weight", "bias")}
    found = sharded_loss(case, tensors, Axis("tp"), num_valid_tokens=10)
    assert found["hard"] > 1
    assert [found[name].abs().max().item() for name in found if name != "hard"] == [0.0] * 4


def equal_models(num_ranks: int) -> list[float]:
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp
    case = Case(alpha=0.0, lopsided=True)
    tensors = case.tensors(torch.float32)
    tensors |= {f"teacher_{name}": tensors[name] for name in ("hidden", "weight", "bias")}
    found = sharded_loss(case, tensors, tp, num_valid_tokens=10)
    return [found[name].abs().max().item() for name in found if name != "hard"]


def test_equal_models_have_exactly_no_soft_loss_on_shards() -> None:
    assert run_distributed(2, equal_models, 2) == [[0.0] * 4] * 2


def test_a_small_kl_keeps_its_digits_in_float32() -> None:
    case = Case(alpha=0.0, temperature=1.0, vocab=4099, student_width=16, teacher_width=16)
    tensors = case.tensors(torch.float32)
    tensors |= {"teacher_hidden": tensors["hidden"] * 1.001, "teacher_weight": tensors["weight"]}
    expected = plain_loss(case, tensors, 10)["soft"].item()
    assert expected < 1e-4
    found = sharded_loss(case, tensors, Axis("tp"), num_valid_tokens=10)["soft"].item()
    assert found == pytest.approx(expected, rel=1e-2)


def test_gradient_tends_to_the_difference_of_logits_as_temperature_grows() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, 19, generator=generator, dtype=torch.float64)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    identity = Head(torch.eye(19, dtype=torch.float64))
    result = fused_distillation_loss(
        student, identity, teacher, identity, torch.arange(6), temperature=1e5, alpha=0.0, num_valid_tokens=1
    )
    torch.testing.assert_close(result.grad_hidden_TD, (student - teacher) / 19, rtol=1e-3, atol=1e-6)


def test_gradients_are_added_to_what_the_buffers_hold() -> None:
    case = Case(bias=True)
    grad_weight, grad_bias = torch.ones(37, 5, dtype=torch.float64), torch.ones(37, dtype=torch.float64)
    options = {"grad_weight_out_VD": grad_weight, "grad_bias_out_V": grad_bias}
    sharded_loss(case, case.tensors(), Axis("tp"), 10, **options)
    sharded_loss(case, case.tensors(), Axis("tp"), 10, **options)
    expected = plain_loss(case, case.tensors(), 10)
    torch.testing.assert_close(grad_weight, 1 + 2 * expected["grad_weight"], rtol=0, atol=EXACT)
    torch.testing.assert_close(grad_bias, 1 + 2 * expected["grad_bias"], rtol=0, atol=EXACT)


def test_without_gradients_the_values_are_the_same_and_no_buffer_is_touched() -> None:
    case = Case()
    found = sharded_loss(case, case.tensors(), Axis("tp"), 10, need_grad=False)
    expected = plain_loss(case, case.tensors(), 10)
    assert found.keys() == {"hard", "soft", "grad_weight"}
    assert found["grad_weight"].abs().max() == 0
    assert found["soft"].item() == pytest.approx(expected["soft"].item(), abs=EXACT)


def test_alpha_one_needs_no_teacher_and_alpha_below_one_does() -> None:
    case = Case(alpha=1.0)
    tensors = case.tensors()
    head = Head(tensors["weight"])
    options = {"temperature": 2.0, "num_valid_tokens": 10}
    result = fused_distillation_loss(
        tensors["hidden"], head, None, None, tensors["labels"], alpha=1.0, **options
    )
    expected = plain_loss(case, tensors, 10)
    torch.testing.assert_close(result.grad_hidden_TD, expected["grad_hidden"], rtol=0, atol=EXACT)
    assert result.total(1.0) == result.hard and result.soft == 0
    with pytest.raises(ValueError, match="no teacher"):
        fused_distillation_loss(tensors["hidden"], head, None, None, tensors["labels"], alpha=0.9, **options)


def autograd_errors(num_ranks: int) -> list[float]:
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp if num_ranks > 1 else Axis("tp")
    case = Case(bias=True)
    tensors = case.tensors()
    expected = plain_loss(case, tensors, 10)
    own = slice(*shard_range(case.vocab, tp.size, tp.rank))
    hidden = tensors["hidden"].requires_grad_()
    student, teacher = heads(case, tensors, tp)
    for leaf in (student.weight_VD, student.bias_V):
        leaf.requires_grad_()
    loss = distillation_loss(
        hidden,
        student,
        tensors["teacher_hidden"],
        teacher,
        tensors["labels"],
        temperature=2.0,
        alpha=0.3,
        tp=tp,
    )
    (3 * loss).backward()
    total = 0.3 * expected["hard"] + 0.7 * expected["soft"]
    pairs = [
        (loss.detach(), total),
        (hidden.grad, 3 * expected["grad_hidden"]),
        (student.weight_VD.grad, 3 * expected["grad_weight"][own]),
        (student.bias_V.grad, 3 * expected["grad_bias"][own]),
    ]
    return [distance(found, right) for found, right in pairs]


def test_autograd_form_counts_the_tokens_and_scales_with_the_outer_gradient() -> None:
    assert max(autograd_errors(1)) < EXACT
    assert max(map(max, run_distributed(2, autograd_errors, 2))) < EXACT


def test_autograd_form_leaves_frozen_inputs_alone() -> None:
    tensors = Case().tensors(torch.bfloat16)
    hidden = tensors["hidden"].requires_grad_()
    head, teacher = Head(tensors["weight"]), Head(tensors["teacher_weight"])
    loss = distillation_loss(
        hidden, head, tensors["teacher_hidden"], teacher, tensors["labels"], temperature=2.0, alpha=0.3
    )
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert head.weight_VD.grad is None


def dense_stats(case: Case, tensors: dict[str, Any]) -> tuple[float, float, int, int]:
    valid = tensors["labels"] != IGNORE
    student = student_logits(tensors, case)[valid]
    teacher = teacher_logits(tensors, case)[valid]
    labels = tensors["labels"][valid]
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    return (
        -log_q.gather(1, labels[:, None]).sum().item(),
        (log_p.exp() * (log_p - log_q)).sum().item(),
        (student.argmax(1) == teacher.argmax(1)).sum().item(),
        (student.argmax(1) == labels).sum().item(),
    )


def dense_buckets(case: Case, tensors: dict[str, Any]) -> list[tuple[float, ...]]:
    """Return nll, KL, agreement and count of the tokens in each bucket of the teacher's entropy."""
    teacher = teacher_logits(tensors, case)
    log_p = teacher.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    rows = []
    for low, high in itertools.pairwise((0.0, *losses.ENTROPY_BOUNDS, math.inf)):
        inside = tensors["labels"].where((low <= entropy) & (entropy < high), IGNORE)
        nll, kl, agreement, _ = dense_stats(case, tensors | {"labels": inside})
        rows.append((nll, kl, agreement, (inside != IGNORE).sum().item()))
    return rows


def likely_tensors(case: Case) -> dict[str, Any]:
    """A teacher close to the student, and labels that the student often predicts: counts in the middle."""
    tensors = case.tensors()
    tensors |= {"teacher_weight": tensors["weight"], "teacher_hidden": tensors["hidden"].roll(1, 0) * 0.6}
    tensors["teacher_hidden"] += tensors["hidden"]
    # From a teacher that is nearly uniform to one that is sure.
    tensors["teacher_hidden"] *= torch.linspace(0.02, 4, case.tokens, dtype=torch.float64)[:, None]
    best = student_logits(tensors, case).argmax(1)
    tensors["labels"] = torch.where(torch.arange(case.tokens) % 3 == 1, best, tensors["labels"])
    return tensors


EVALUATED = Case(
    tokens=41,
    vocab=211,
    student_width=6,
    teacher_width=6,
    softcap=20.0,
    scale=0.7,
    teacher_scale=1.3,
    chunk=7,
)


def evaluated(num_ranks: int) -> tuple[tuple[float, ...], list[list[float]]]:
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp if num_ranks > 1 else Axis("tp")
    tensors = likely_tensors(EVALUATED)
    student, teacher = heads(EVALUATED, tensors, tp)
    stats = evaluate_tokens(
        tensors["hidden"],
        student,
        tensors["teacher_hidden"],
        teacher,
        tensors["labels"],
        tp=tp,
        chunk_tokens=7,
    )
    alone = evaluate_tokens(tensors["hidden"], student, None, None, tensors["labels"], tp=tp)
    assert (alone.nll_sum, alone.kl_sum, alone.agreement_count) == (pytest.approx(stats.nll_sum), 0.0, 0)
    assert alone.correct_count == stats.correct_count and alone.by_entropy == ()
    # Every id equally likely: the lowest one, whatever the shards.
    flat = Head(torch.zeros_like(student.weight_VD))
    zeros = torch.zeros(3, dtype=torch.int64)
    ties = evaluate_tokens(tensors["hidden"][:3], flat, tensors["hidden"][:3], flat, zeros, tp=tp)
    assert (ties.correct_count, ties.agreement_count, ties.num_tokens) == (3, 3, 3)
    nothing = evaluate_tokens(tensors["hidden"][:3], flat, None, None, torch.full((3,), IGNORE), tp=tp)
    assert nothing == losses.TokenStats(0.0, 0.0, 0, 0, 0)
    whole = (stats.nll_sum, stats.kl_sum, stats.agreement_count, stats.correct_count, stats.num_tokens)
    return whole, [list(sums) for sums in stats.by_entropy]


def test_evaluation_agrees_with_dense_logits() -> None:
    nll, kl, agreement, correct = dense_stats(EVALUATED, likely_tensors(EVALUATED))
    assert 5 < agreement < 38 and 5 < correct < 38
    buckets = dense_buckets(EVALUATED, likely_tensors(EVALUATED))
    assert sum(count > 2 for *_, count in buckets) >= 3, "the entropies must be spread"
    for num_ranks in (1, 2, 4):
        ranks = [evaluated(1)] if num_ranks == 1 else run_distributed(num_ranks, evaluated, num_ranks)
        for whole, by_entropy in ranks:
            assert whole == pytest.approx((nll, kl, agreement, correct, 38 + 1), abs=1e-10)
            for found, expected in zip(by_entropy, buckets, strict=True):
                assert found == pytest.approx(expected, abs=1e-10)


def test_a_teacher_without_any_doubt_is_in_the_bucket_that_begins_at_zero() -> None:
    identity, sure = Head(torch.eye(7, dtype=torch.float64)), torch.zeros(1, 7, dtype=torch.float64)
    # The others' exponentials underflow, so that the entropy is exactly the bound.
    sure[0, 3] = 1e4
    with mock.patch.object(losses, "ENTROPY_BOUNDS", (0.0, 1.5, 3.0, 5.0)):
        stats = evaluate_tokens(torch.zeros_like(sure), identity, sure, identity, torch.tensor([3]))
    assert [bucket.num_tokens for bucket in stats.by_entropy] == [0, 1, 0, 0, 0]


def test_mistakes_are_named() -> None:
    tensors = Case().tensors()
    head, teacher = Head(tensors["weight"]), Head(tensors["teacher_weight"])
    good = {
        "student_hidden_TD": tensors["hidden"],
        "student_head": head,
        "teacher_hidden_TE": tensors["teacher_hidden"],
        "teacher_head": teacher,
        "labels_T": tensors["labels"],
        "temperature": 2.0,
        "alpha": 0.3,
        "num_valid_tokens": 10,
    }
    mistakes = [
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"teacher_head": Head(tensors["teacher_weight"][:36])}, "36 ids"),
        ({"teacher_head": None}, "teacher"),
        ({"labels_T": tensors["labels"][1:]}, "12 labels"),
        ({"labels_T": torch.full((13,), 37)}, "0..36"),
        ({"labels_T": torch.full((13,), -1)}, "0..36"),
        ({"student_head": head.__class__(head.weight_VD, vocab_size=38)}, "0..37"),
    ]
    for change, message in mistakes:
        with pytest.raises(ValueError, match=message):
            fused_distillation_loss(**good | change)


def test_breakages_name_existing_functions() -> None:
    assert losses.all_reduce_ is all_reduce_ and vocab_chunks.all_gather is all_gather
