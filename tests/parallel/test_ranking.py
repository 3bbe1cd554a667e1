"""The smallest entries of a matrix against a stable sort of the whole one, for every way to cut it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel import ranking
from parallel.layers import ShardSpec
from parallel.mesh import Mesh
from parallel.ranking import float_keys, smallest
from tests.workers import run_distributed

ROWS, COLUMNS = 7, 11


def _matrices() -> list[Tensor]:
    """Return keys without ties, with many, with nothing else, and of all sizes that int32 has."""
    random = np.random.default_rng(1)
    shape = (ROWS, COLUMNS)
    floats = float_keys(torch.from_numpy(random.random(shape)))
    few = torch.from_numpy(random.integers(0, 4, shape, dtype=np.int32))
    wide = torch.from_numpy(random.integers(0, 2**31 - 1, shape, dtype=np.int32))
    return [floats, few, torch.full(shape, 5, dtype=torch.int32), wide, wide // 2**24 * 2**24]


def _expected(keys_RC: Tensor, count: int, per_row: bool) -> Tensor:
    sets = keys_RC if per_row else keys_RC.reshape(1, -1)
    order = torch.from_numpy(np.argsort(sets.numpy(), axis=1, kind="stable"))
    return torch.zeros_like(sets, dtype=torch.bool).scatter_(1, order[:, :count], True).view_as(keys_RC)


def _counts(per_row: bool) -> list[int]:
    size = COLUMNS if per_row else ROWS * COLUMNS
    return [0, 1, size // 3, size - 1, size]


def _part(keys_RC: Tensor, shard: ShardSpec | None) -> Tensor:
    return keys_RC if shard is None else keys_RC.narrow(shard.dim, shard.start, shard.stop - shard.start)


def _check(mesh: Mesh, dim: int | None) -> None:
    shard = None if dim is None else ShardSpec.of(dim, (ROWS, COLUMNS)[dim], mesh.tp)
    for keys_RC in _matrices():
        for per_row in (False, True):
            for count in _counts(per_row):
                mine = smallest(_part(keys_RC, shard), count, per_row=per_row, shard=shard, tp=mesh.tp)
                assert torch.equal(mine, _part(_expected(keys_RC, count, per_row), shard)), (per_row, count)


def _check_cuts() -> None:
    mesh = Mesh.create(pp=1, dp=1, tp=3)
    for dim in (None, 0, 1):
        _check(mesh, dim)


@pytest.mark.parametrize("block", [1, 30, 2**22])
def test_one_process(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_BLOCK_NUMEL", block)
    _check(Mesh.single(), None)


def test_uneven_shards_of_rows_and_of_columns() -> None:
    run_distributed(3, _check_cuts)


def test_keys_are_in_the_order_of_the_scores() -> None:
    scores = torch.tensor([0.0, 1e-45, 1e-20, 0.5, 1.0, 3e38, torch.inf])
    assert (float_keys(scores).diff() > 0).all() and float_keys(scores).min() > 0
