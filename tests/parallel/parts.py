"""What replicas hold of a parameter, put together again."""

from __future__ import annotations

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


def join(mine: list[tuple[int, Tensor]], entry: Entry, dp: Axis) -> Tensor:
    """Return the whole tensor of which each replica has some entries (first, 1-D values)."""
    pieces = sorted((piece for each in gather_objects(mine, dp) for piece in each), key=lambda each: each[0])
    values = torch.cat([piece for _, piece in pieces])
    return gather_tensor(values.view(entry.parameter.shape), entry).clone()


def whole_state(optimizer: StageOptimizer, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Return masters and state of this rank's stages, joined over dp and tp."""
    found = {}
    for entry, parts in optimizer.share():
        for kind in kinds:
            mine = [(parts[kind].start, parts[kind].read())] if kind in parts else []
            found[f"{kind}/{entry.name}"] = join(mine, entry, optimizer.mesh.dp)
    return found


def whole_gradients(optimizer: StageOptimizer) -> dict[str, Tensor]:
    """Return the reduced gradients of this rank's stages, joined over dp and tp."""
    found = {}
    for slot in optimizer.slots:
        flat = slot.view(optimizer.flat_grad).flatten()
        mine = [(start, flat[start:stop]) for start, stop in owned(optimizer, slot)]
        name = slot.entry.name + ("@tied" if slot.entry.is_tied_copy else "")
        found[name] = join(mine, slot.entry, optimizer.mesh.dp)
    return found
