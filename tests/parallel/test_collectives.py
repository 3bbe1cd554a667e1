"""Collectives and the mesh: shapes, uneven shards, and backward against one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import (
    all_gather,
    all_reduce_,
    barrier,
    broadcast_,
    broadcast_object,
    copy_to_tp,
    gather_from_owners_,
    gather_from_tp,
    gather_objects,
    reduce_from_tp,
    reduce_to_owners_,
    shard_range,
    shard_sizes,
    split_to_tp,
)
from parallel.mesh import Axis, Mesh
from tests.workers import run_distributed


def test_shards_cover_every_size_once() -> None:
    for size in range(12):
        for count in range(1, 6):
            covered = [i for index in range(count) for i in range(*shard_range(size, count, index))]
            assert covered == list(range(size))
            assert max(shard_sizes(size, count)) - min(shard_sizes(size, count)) <= 1


def _to_owners_and_back(axis: Axis) -> None:
    """Reduce to owners and gather from them, on gloo and as on any other backend."""
    own, backend = slice(2 * axis.rank, 2 * axis.rank + 2), dist.get_backend
    total = torch.arange(6.0) * 6
    for name in ("gloo", "another"):
        dist.get_backend = lambda group, name=name: name
        try:
            flats = [torch.arange(6.0) * (axis.rank + 1) + shift for shift in (0, 1)]
            for flat in flats:
                reduce_to_owners_(flat, axis)
            assert torch.equal(flats[0][own], total[own]) and torch.equal(flats[1][own], total[own] + 3)
            gather_from_owners_(flats, axis)
            assert torch.equal(flats[0], total) and torch.equal(flats[1], total + 3)
        finally:
            dist.get_backend = backend
    alone = torch.ones(3)
    reduce_to_owners_(alone, Axis("dp"))
    gather_from_owners_([alone], Axis("dp"))
    assert torch.equal(alone, torch.ones(3))


def _waits() -> None:
    """Come late to each collective on the last rank; the first says meanwhile what it waits for, and for whom."""
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    axis, number = mesh.dp, torch.ones(2)
    collectives: dict[str, Callable[[], object]] = {
        "an all-reduce over dp": lambda: all_reduce_(number, axis),
        "an all-gather over dp": lambda: all_gather(number, axis, dim=0, sizes=[2, 2]),
        "a reduction to owners over dp": lambda: reduce_to_owners_(number, axis),
        "a gather from owners over dp": lambda: gather_from_owners_([number], axis),
        "a broadcast over dp": lambda: broadcast_(number, axis, source=1),
        "a gather over dp": lambda: gather_objects(1, axis),
        "a barrier over dp": lambda: barrier(axis),
    }
    for name, collective in collectives.items():
        seen: set[tuple[str, tuple[int, ...]]] = set()
        if mesh.world.is_first:
            done = threading.Event()

            def look(seen: set[Any] = seen, done: threading.Event = done) -> None:
                while not done.wait(0.02):
                    sight = mesh.activity.look()
                    seen.add((sight.waits_for, tuple(sight.peers)))

            watcher = threading.Thread(target=look)
            watcher.start()
            collective()
            done.set()
            watcher.join()
            assert (name, (0, 1)) in seen, (name, seen)
        else:
            time.sleep(0.3)
            collective()
        barrier(axis)


def test_who_waits_in_a_collective_says_so() -> None:
    run_distributed(2, _waits)


def _boundaries() -> None:
    mesh = Mesh.create(pp=1, dp=1, tp=3)
    tp, rank = mesh.tp, mesh.tp.rank
    sizes = shard_sizes(7, 3)
    full = torch.arange(14.0).view(2, 7)
    mine = full.split(sizes, dim=-1)[rank].clone().requires_grad_()
    gathered = gather_from_tp(mine, tp, sizes)
    assert torch.equal(gathered, full) and gathered.is_contiguous()
    (gathered * full).sum().backward()
    assert torch.equal(mine.grad, full.split(sizes, dim=-1)[rank])

    whole = full.clone().requires_grad_()
    (split_to_tp(whole, tp, sizes) * (rank + 1)).sum().backward()
    factors = torch.cat([torch.full((2, size), index + 1.0) for index, size in enumerate(sizes)], dim=-1)
    assert torch.equal(whole.grad, factors)

    x = torch.ones(3, requires_grad=True)
    copied = copy_to_tp(x, tp)
    assert torch.equal(copied, x)
    (copied * (rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 6.0))

    y = torch.full((3,), rank + 1.0, requires_grad=True)
    total = reduce_from_tp(y, tp)
    assert torch.equal(total, torch.full((3,), 6.0))
    total.sum().backward()
    assert torch.equal(y.grad, torch.ones(3)), "the gradient of a replicated sum must not be summed again"
    assert torch.equal(y.detach(), torch.full((3,), rank + 1.0)), "the input must not be reduced in place"
    _to_owners_and_back(tp)

    rows = torch.full((sizes[rank], 2), float(rank))
    assert all_gather(rows, tp, dim=0, sizes=sizes).shape == (7, 2)
    assert gather_objects(rank, tp) == [0, 1, 2]
    assert broadcast_object("x" if rank == 1 else None, tp, source=1) == "x"
    with pytest.raises(ValueError, match="requires grad"):
        all_reduce_(torch.ones(1, requires_grad=True), tp)


def test_boundaries_of_a_tensor_parallel_region() -> None:
    run_distributed(3, _boundaries)


def _too_small() -> None:
    with pytest.raises(ValueError, match="the world has 2"):
        Mesh.create(pp=2, dp=2, tp=1)


def test_a_mesh_must_fill_the_world() -> None:
    run_distributed(2, _too_small)
    assert Mesh.single().tp == Axis("tp")
