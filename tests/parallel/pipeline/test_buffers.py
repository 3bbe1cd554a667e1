"""Buffers of messages: aligned, and used again."""

from __future__ import annotations

import pytest
import torch

from parallel.pipeline.buffers import ALIGNMENT_BYTES, BufferPool, aligned_empty

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 31)])
def test_buffers_are_aligned_and_contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Odd allocations between them move the heap's next address.
    keep = []
    for size in range(1, 40, 7):
        keep.append(torch.empty(size, dtype=torch.uint8))
        buffer = aligned_empty(shape, dtype, CPU)
        assert buffer.shape == shape and buffer.dtype == dtype and buffer.is_contiguous()
        assert buffer.data_ptr() % ALIGNMENT_BYTES == 0


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    pool = BufferPool(CPU)
    first, second = (pool.take((2, 3), torch.float32) for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and pool.num_allocated == 2
    pool.give(first)
    assert pool.take((3, 2), torch.float32).data_ptr() != first.data_ptr(), "another shape"
    assert pool.take((2, 3), torch.float64).data_ptr() != first.data_ptr(), "another dtype"
    assert pool.take((2, 3), torch.float32).data_ptr() == first.data_ptr()
    assert pool.num_allocated == 4
