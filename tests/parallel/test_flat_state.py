"""What a rank holds of a parameter's state: read, written, and cut to what a replica saves."""

from __future__ import annotations

import torch

from parallel.flat_state import Part, PlainStore


def test_a_part_reads_writes_and_is_cut() -> None:
    store = PlainStore(torch.arange(10.0))
    part = Part(20, 26, store, 2)
    assert torch.equal(part.read(), torch.arange(2.0, 8.0))
    inside = part.inside(22, 40)
    assert inside == Part(22, 26, store, 4) and torch.equal(inside.read(), torch.arange(4.0, 8.0))
    assert part.inside(0, 20) is None and part.inside(26, 30) is None and part.inside(0, 99) == part
    inside.write(torch.zeros(2, 2, dtype=torch.float64))
    assert store.flat.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 8, 9] and store.nbytes == 40
    store.zero_()
    assert not store.flat.any()
