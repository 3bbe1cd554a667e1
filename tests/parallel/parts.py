"""What replicas hold of a parameter, put together again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.buckets import Slot
from parallel.collectives import gather_objects
from parallel.mesh import Axis
from parallel.optimizer import StageOptimizer
from parallel.weights import Entry, gather_tensor


def owned(optimizer: StageOptimizer, slot: Slot) -> Iterator[tuple[int, int]]:
    """Yield the entries of a parameter whose sums over dp this replica has."""
    yield from optimizer._engine.share(slot, optimizer.mesh.dp.rank)


_Pieces = dict[str, tuple[Entry, list[tuple[int, Tensor]]]]
"""Name -> the parameter it belongs to, and the entries of this replica: (first, 1-D values)."""


def _join(mine: _Pieces, dp: Axis) -> dict[str, Tensor]:
    """Return the whole tensors of which each replica has some entries, joined over tp as well."""
    replicas = gather_objects({name: pieces for name, (_, pieces) in mine.items()}, dp)
    found = {}
    for name, (entry, _) in mine.items():
        pieces = sorted((piece for each in replicas for piece in each[name]), key=lambda each: each[0])
        values = torch.cat([piece for _, piece in pieces])
        found[name] = gather_tensor(values.view(entry.parameter.shape), entry).clone()
    return found


def whole_state(optimizer: StageOptimizer, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Return masters and state of this rank's stages, joined over dp and tp."""
    mine: _Pieces = {}
    for (entry, parts), kind in itertools.product(optimizer.share(), kinds):
        held = [(parts[kind].start, parts[kind].read().clone())] if kind in parts else []
        mine[f"{kind}/{entry.name}"] = entry, held
    return _join(mine, optimizer.mesh.dp)


def whole_gradients(optimizer: StageOptimizer) -> dict[str, Tensor]:
    """Return the reduced gradients of this rank's stages, joined over dp and tp."""
    mine: _Pieces = {}
    for slot in optimizer.slots:
        flat = slot.view(optimizer.flat_grad).flatten()
        name = slot.entry.name + ("@tied" if slot.entry.is_tied_copy else "")
        mine[name] = slot.entry, [(start, flat[start:stop].clone()) for start, stop in owned(optimizer, slot)]
    return _join(mine, optimizer.mesh.dp)
