from __future__ import annotations

import pytest
import torch

from distill.packing import IGNORE
from parallel.mesh import Axis, Mesh
from tests.distill.loss_cases import EXACT, Case, errors, sharded_loss
from tests.workers import run_distributed


@pytest.mark.parametrize("chunk", [1, 3, 10, 64, None])
def test_the_chunk_size_does_not_change_the_result(chunk: int | None) -> None:
    case = Case(bias=True, softcap=4.0)
    whole = sharded_loss(case, case.tensors(), Axis("tp"), 10, chunk_tokens=10)
    found = sharded_loss(case, case.tensors(), Axis("tp"), 10, chunk_tokens=chunk)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=0, atol=EXACT)


def empty_then_full(num_ranks: int) -> tuple[list[float], dict[str, float]]:
    tp = Mesh.create(pp=1, dp=1, tp=num_ranks).tp
    case = Case()
    nothing = case.tensors() | {"labels": torch.full((case.tokens,), IGNORE)}
    found = sharded_loss(case, nothing, tp, num_valid_tokens=29)
    return [value.abs().max().item() for value in found.values()], errors(case, tp)


def test_a_microbatch_without_valid_tokens_gives_zeros_and_leaves_the_collectives_in_step() -> None:
    for sizes, later in run_distributed(2, empty_then_full, 2):
        assert sizes == [0.0] * 4
        assert max(later.values()) < EXACT


def test_ignored_positions_get_no_gradient() -> None:
    case = Case()
    tensors = case.tensors()
    grad = sharded_loss(case, tensors, Axis("tp"), 10)["grad_hidden"]
    assert ((grad == 0).all(1) == (tensors["labels"] == IGNORE)).all()


def test_ignored_positions_are_not_read() -> None:
    case = Case()
    tensors = case.tensors()
    tensors["hidden"][tensors["labels"] == IGNORE] = torch.nan
    assert all(value.isfinite().all() for value in sharded_loss(case, tensors, Axis("tp"), 10).values())
