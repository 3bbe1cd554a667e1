from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.divergences import FORWARD_KL
from distill.head import Head
from distill.vocab_chunks import VocabChunk
from parallel.collectives import shard_range
from parallel.mesh import Axis
from tests.distill.loss_cases import Case, sharded_loss


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_with_the_number_of_tokens(dtype: torch.dtype) -> None:
    sizes = []
    for tokens in (67, 670):
        case = Case(vocab=2003, tokens=tokens, student_width=3, teacher_width=3)
        with _LargestTensor() as largest:
            sharded_loss(case, case.tensors(dtype), Axis("tp"), 64, chunk_tokens=16)
        sizes.append(largest.numel)
    # Three scratch blocks in one tensor; 64 and 667 valid tokens make chunks of 16 both.
    assert sizes[0] == sizes[1] == 3 * 16 * 2003


def chunk_of(vocab_size: int, tp: Axis, width: int, num_tokens: int = 1000) -> VocabChunk:
    return VocabChunk(
        Head(torch.zeros(width, 2)),
        Head(torch.zeros(width, 2)),
        tp=tp,
        vocab_size=vocab_size,
        temperature=1.0,
        divergence=FORWARD_KL,
        dtype=torch.float32,
        num_tokens=num_tokens,
        chunk_tokens=None,
    )


def test_ranks_with_uneven_shards_cut_the_tokens_alike() -> None:
    """37 ids on 2 ranks are 19 and 18: 64 or 68 tokens by each rank's own bytes, which would deadlock."""
    sizes = []
    with (
        mock.patch("distill.vocab_chunks._CHUNK_BYTES", 9792),
        mock.patch("distill.vocab_chunks._MIN_CHUNK_TOKENS", 1),
    ):
        for rank in range(2):
            start, stop = shard_range(37, 2, rank)
            sizes.append(chunk_of(37, Axis("tp", 2, rank), stop - start).chunk_tokens)
    assert sizes[0] == sizes[1] == 63


def test_chunks_are_balanced() -> None:
    with mock.patch("distill.vocab_chunks._CHUNK_BYTES", 0):
        assert chunk_of(5, Axis("tp"), 5, num_tokens=65).chunk_tokens == 33
        assert chunk_of(5, Axis("tp"), 5, num_tokens=64).chunk_tokens == 64
        assert chunk_of(5, Axis("tp"), 5, num_tokens=3).chunk_tokens == 3


def test_a_head_that_is_not_this_ranks_shard_is_refused() -> None:
    with pytest.raises(ValueError, match="19..36"):
        chunk_of(37, Axis("tp", 2, 1), 19)
