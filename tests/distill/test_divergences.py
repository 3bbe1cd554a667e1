"""Every divergence against its formula and autograd, on one process and on shards; ties, extremes, small differences."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distill.config import Loss
from distill.divergences import divergence_of, most_likely_columns
from parallel.collectives import all_gather
from parallel.mesh import Axis, Mesh
from tests.distill.loss_cases import EXACT, KINDS, OTHER_CASES, Case, errors, plain_loss, sharded_loss
from tests.workers import run_distributed

SINGLE = Axis("tp")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_value_and_gradients_agree_with_the_formula_on_one_process(kind: str) -> None:
    for case in (case for case in OTHER_CASES if case.kind == kind):
        assert max(errors(case, SINGLE).values()) < EXACT, case


def with_equal_models(case: Case, dtype: torch.dtype, tp: Axis) -> float:
    """Return the largest number that is not 0 in the soft loss and the gradients."""
    tensors = case.tensors(dtype)
    tensors |= {f"teacher_{name}": tensors[name] for name in ("hidden", "weight", "bias")}
    found = sharded_loss(case, tensors, tp, num_valid_tokens=10)
    assert found["hard"] > 1
    return max(value.abs().max().item() for name, value in found.items() if name != "hard")


def _no_second_gather(numbers: Tensor, axis: Axis, **options: Any) -> Tensor:
    if numbers.shape[1] > 2:
        return all_gather(numbers, axis, **options)
    return numbers.expand(axis.size, *numbers.shape[1:])


def _own_rows_only(rows: slice, num_rows: int) -> Any:
    """Return a gather that keeps a rank's own numbers in some rows of a message of `num_rows`."""

    def gather(numbers: Tensor, axis: Axis, **options: Any) -> Tensor:
        gathered = all_gather(numbers, axis, **options)
        if numbers.shape[1] == num_rows:
            gathered[:, rows] = numbers[:, rows]
        return gathered

    return gather


ALL = {"soft", "grad_hidden", "grad_weight"}
SLOPES = {"grad_hidden", "grad_weight"}
TOP_K = 6 + 3 * 5 + 4
BREAKAGES = {
    **{f"{kind}: second gather": (kind, _no_second_gather, ALL) for kind in ("reverse_kl", "jsd", "skew_kl", "tvd")},
    "values are not summed": ("jsd", _own_rows_only(slice(0, 1), 2), {"soft"}),
    "slopes are not summed": ("jsd", _own_rows_only(slice(1, 2), 2), SLOPES),
    "candidates are not gathered": ("top_k_kl", _own_rows_only(slice(6, 21), TOP_K), ALL),
    "the student's rest is not gathered": ("top_k_kl", _own_rows_only(slice(21, 23), TOP_K), ALL),
    "the teacher's rest is not gathered": ("top_k_kl", _own_rows_only(slice(23, 25), TOP_K), ALL),
}  # fmt: skip


def on_shards(num_ranks: int) -> tuple[list[float], list[float], dict[str, dict[str, float]]]:
    """Return errors of every case, what is left of equal models, and the errors of broken reductions."""
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp
    found = [max(errors(case, tp).values()) for case in OTHER_CASES]
    left = [with_equal_models(Case(alpha=0.0, lopsided=True, kind=k), torch.float32, tp) for k in KINDS]
    broken = {}
    for name, (kind, gather, _) in BREAKAGES.items():
        with mock.patch("distill.vocab_chunks.all_gather", gather):
            broken[name] = errors(Case(lopsided=True, kind=kind), tp)
    return found, left, broken


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_value_and_gradients_agree_with_the_formula_on_shards_and_show_a_broken_reduction(
    num_ranks: int,
) -> None:
    """Uneven shards, an empty one (3 ids on 4 ranks), shards of fewer ids than k, ties over shards, unequal mass."""
    ranks = run_distributed(num_ranks, on_shards, num_ranks)
    for found, left, _ in ranks:
        for case, error in zip(OTHER_CASES, found, strict=True):
            assert error < EXACT, case
        assert left == [0.0] * len(KINDS)
    for name, (_, _, wrong) in BREAKAGES.items():
        by_name = {key: max(broken[name][key] for _, _, broken in ranks) for key in ranks[0][2][name]}
        assert {key for key, error in by_name.items() if error > 1e-4} >= wrong, (name, by_name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_exactly_no_soft_loss_and_no_soft_gradient(kind: str, dtype: torch.dtype) -> None:
    for temperature in (1.0, 2.0, 5.0):
        case = Case(kind=kind, temperature=temperature, alpha=0.0, bias=True, vocab=1031, student_width=64)
        assert with_equal_models(case, dtype, SINGLE) == 0


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_small_divergence_keeps_its_digits_in_float32(kind: str) -> None:
    case = Case(
        kind=kind, alpha=0.0, temperature=1.0, vocab=4099, student_width=16, teacher_width=16, top_k=64
    )
    tensors = case.tensors(torch.float32)
    tensors |= {"teacher_hidden": tensors["hidden"] * 1.0001, "teacher_weight": tensors["weight"]}
    expected = plain_loss(case, tensors, 10)
    assert expected["soft"].item() < (1e-4 if kind == "tvd" else 1e-7)
    found = sharded_loss(case, tensors, SINGLE, num_valid_tokens=10)
    assert found["soft"].item() == pytest.approx(expected["soft"].item(), rel=2e-3)
    for name in ("grad_hidden", "grad_weight"):
        # The sign of q - p, all that the gradient of tvd knows, is lost where the logits' own rounding hides it.
        share = 0.1 if kind == "tvd" else 1e-2
        assert (found[name] - expected[name]).norm() < share * expected[name].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_the_value_of_the_formula_and_no_nan(kind: str) -> None:
    """Probabilities of e**-10000 and less on either side."""
    for dtype, exact in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        case = Case(kind=kind, alpha=0.0, vocab=11, student_width=7, top_k=3)
        tensors = case.tensors(torch.float32)
        tensors = {k: v.to(dtype) if v is not None and k != "labels" else v for k, v in tensors.items()}
        for name in ("hidden", "teacher_hidden"):
            tensors[name] = tensors[name] * 1e4
        expected = plain_loss(case, tensors, 10)
        found = sharded_loss(case, tensors, SINGLE, num_valid_tokens=10)
        for name in ("soft", "grad_hidden", "grad_weight"):
            assert found[name].isfinite().all()
            size = expected[name].abs().max().item()
            assert (found[name] - expected[name]).abs().max() <= exact * max(1.0, size), (name, dtype)


def test_of_equal_logits_the_lowest_columns_are_taken() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 6, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    columns = most_likely_columns(logits, 3)
    assert columns.sort(1).values.tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert most_likely_columns(logits[:, :0], 0).shape == (3, 0)


def test_symmetry_bounds_and_limits() -> None:
    tensors = Case(student_width=7).tensors()
    swapped = {name: tensors[f"teacher_{name}"] for name in ("hidden", "weight", "bias")}
    swapped |= {f"teacher_{name}": tensors[name] for name in ("hidden", "weight", "bias")}

    def soft(given: dict[str, Any], **changes: Any) -> float:
        changed = Case(alpha=0.0, temperature=5.0, student_width=7, **changes)
        return sharded_loss(changed, given, SINGLE, num_valid_tokens=10)["soft"].item() / 25

    both_ways = [
        soft(given | {"labels": tensors["labels"]}, kind="jsd", beta=0.5) for given in (tensors, swapped)
    ]
    assert both_ways[0] == pytest.approx(both_ways[1], rel=1e-12) and 0 < both_ways[0] < math.log(2)
    forward, reverse = soft(tensors), soft(tensors, kind="reverse_kl")
    assert forward != pytest.approx(reverse, rel=0.01)
    assert soft(tensors, kind="jsd", beta=1e-7) / 1e-7 == pytest.approx(forward, rel=1e-3)
    assert soft(tensors, kind="jsd", beta=1 - 1e-7) / 1e-7 == pytest.approx(reverse, rel=1e-3)
    assert soft(tensors, kind="skew_kl", skew=1e-7) == pytest.approx(forward, rel=1e-3)
    assert soft(tensors, kind="top_k_kl", top_k=36) == pytest.approx(forward, rel=1e-12)


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ValueError, match="'backward_kl' is not one of forward_kl, reverse_kl, jsd, skew_kl, tvd"
    ):
        divergence_of(Loss(kind="backward_kl"))
    with pytest.raises(ValueError, match=r"TopKKL\(k=37\) needs 38 ids or more; there are 37"):
        sharded_loss(Case(top_k=37, kind="top_k_kl"), Case().tensors(), SINGLE, 10)
