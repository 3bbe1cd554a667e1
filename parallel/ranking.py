"""The smallest entries of a matrix that is cut over tp, or of each of its rows, exactly and in any layout the same.

Decides how a rank is found without anybody holding the whole matrix: digit by digit from the highest, from histograms
that are added over the ranks (radix selection). Four histograms of 256 counts a set settle 32 bits, so ties are
ties bit for bit, and of equal keys those that come first in the whole matrix, row by row, are taken. Knows nothing of what the
keys mean; floats of one sign may be compared by their bits (`float_keys`).

Legend: R rows, C columns of this rank's part; S sets that are ranked apart (1, or R); V values of a digit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_reduce_
from parallel.layers import ShardSpec
from parallel.mesh import Axis

_BITS, _VALUES = 8, 256
_BLOCK_NUMEL = 2**22
"""Entries that are looked at in one piece: bounds what is allocated beside the keys."""


def float_keys(scores: Tensor) -> Tensor:
    """Return int32 keys above 0 in the order of finite scores of 0 and more (float32: closer ones are ties)."""
    return scores.float().contiguous().view(torch.int32) + 1


def smallest(
    keys_RC: Tensor, count: int, *, per_row: bool, shard: ShardSpec | None = None, tp: Axis
) -> Tensor:
    """Mark the `count` smallest entries of the whole matrix, or of each of its whole rows.

    Args:
        keys_RC: this rank's part [R, C], int32 of 0 and more.
        count: how many, of each set.
        per_row: whether each row is a set of its own.
        shard: which part of the matrix this is; None: all of it, the same on every rank of tp.
        tp: the axis that the matrix is cut over.
    Returns:
        bool [R, C].
    Collectives: over tp, where a set is cut: four all-reduces [S, 256] and one or two all-gathers of counts.
    """
    cut = shard is not None and tp.size > 1
    sets_cut = cut and (not per_row or shard.dim == 1)
    threshold_S, missing_S = _threshold(keys_RC, count, per_row, tp if sets_cut else None)
    chosen_RC = torch.zeros_like(keys_RC, dtype=torch.bool)
    if count == 0:
        return chosen_RC
    before_R = _equal_before(keys_RC == threshold_S[:, None], per_row, shard if cut else None, tp)
    for rows in _blocks(keys_RC):
        of_set = rows if per_row else slice(None)
        threshold, missing = threshold_S[of_set, None], missing_S[of_set, None]
        equal_RC = keys_RC[rows] == threshold
        first_RC = before_R[rows, None] + equal_RC.cumsum(dim=1) <= missing
        chosen_RC[rows] = (keys_RC[rows] < threshold) | (equal_RC & first_RC)
    return chosen_RC


def _threshold(keys_RC: Tensor, count: int, per_row: bool, axis: Axis | None) -> tuple[Tensor, Tensor]:
    """Return [S] the `count`-th smallest key of each set, and [S] how many that equal it belong to the smallest."""
    num_sets = keys_RC.shape[0] if per_row else 1
    threshold_S = torch.zeros(num_sets, dtype=torch.int64, device=keys_RC.device)
    missing_S = torch.full_like(threshold_S, count)
    for shift in range(32 - _BITS, -1, -_BITS):
        counts_SV = _count_digits(keys_RC, threshold_S, shift, per_row)
        if axis is not None:
            all_reduce_(counts_SV, axis)
        upto_SV = counts_SV.cumsum(dim=1)
        digit_S = (upto_SV < missing_S[:, None]).sum(dim=1)
        assert (digit_S < _VALUES).all(), f"a set has fewer than {count} entries"
        missing_S = missing_S - (upto_SV - counts_SV).gather(1, digit_S[:, None])[:, 0]
        threshold_S = threshold_S * _VALUES + digit_S
    return threshold_S, missing_S


def _count_digits(keys_RC: Tensor, prefix_S: Tensor, shift: int, per_row: bool) -> Tensor:
    """Return [S, V] how many keys that begin like the set's prefix have each value of the digit at `shift`."""
    counts_SV = prefix_S.new_zeros(len(prefix_S), _VALUES)
    for rows in _blocks(keys_RC):
        block = keys_RC[rows].long()
        prefix = prefix_S[rows, None] if per_row else prefix_S[:, None]
        places = block >> shift & _VALUES - 1
        num_sets = len(block) if per_row else 1
        if per_row:
            places += torch.arange(0, num_sets * _VALUES, _VALUES, device=block.device)[:, None]
        found = torch.bincount(places[block >> shift + _BITS == prefix], minlength=num_sets * _VALUES)
        counts_SV[rows if per_row else slice(None)] += found.view(num_sets, _VALUES)
    return counts_SV


def _equal_before(equal_RC: Tensor, per_row: bool, shard: ShardSpec | None, tp: Axis) -> Tensor:
    """Return [R] how many marked entries of the set come before this rank's part of each row."""
    counts_R = equal_RC.sum(dim=1)
    before_R = torch.zeros_like(counts_R)
    if shard is not None and shard.dim == 1:
        counts_PR = all_gather(counts_R[None], tp, dim=0, sizes=[1] * tp.size)
        before_R, counts_R = counts_PR[: tp.rank].sum(dim=0), counts_PR.sum(dim=0)
    if per_row:
        return before_R
    before_R = before_R + counts_R.cumsum(dim=0) - counts_R
    if shard is not None and shard.dim == 0:
        counts_P = all_gather(counts_R.sum()[None], tp, dim=0, sizes=[1] * tp.size)
        before_R = before_R + counts_P[: tp.rank].sum()
    return before_R


def _blocks(keys_RC: Tensor) -> Iterator[slice]:
    """Yield ranges of rows that are worked on in one piece."""
    height = max(1, _BLOCK_NUMEL // max(1, keys_RC.shape[1]))
    return (slice(start, start + height) for start in range(0, keys_RC.shape[0], height))
