"""The engine `torch`: gradients reduced to their owners, masters and state cut over the replicas, parameters gathered.

Decides ZeRO stage 1: of every bucket each replica owns an equal part (`parallel.buckets`), and has masters and state of the
rule for its parts only. It gets the sum of their gradients, adds their squares, updates them, and sends them to the others.
Stage 0, and one replica, are the same with one owner of everything. float32 and float64 parameters are their own
masters; bf16 parameters have a float32 one.

The norm adds squares by rows in float64, per owner's part and in one order, so that it has the same bits at both stages:
torch's float32 norm of 20 million entries is off by 1e-5 to 1e-3 on a CPU, rows of 256 give 1e-10 in the same time.

Source: Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from parallel.buckets import ALIGNED, Bucket, Ownership, Slot, runs
from parallel.collectives import all_reduce_, gather_from_owners_, reduce_to_owners_
from parallel.flat import FlatBuffers
from parallel.flat_state import Part, PlainStore
from parallel.mesh import Mesh
from parallel.update_rules import OptimizerOptions, Range, Updater, make_updater

_ROWS = 65_536
"""Rows of the norm that are added at once: few kernels, and what is allocated for them stays below a megabyte."""


class TorchEngine:
    """Reduces gradients, and updates and gathers parameters, of one rank's stages.

    Args:
        buffers: parameters and gradients.
        mesh: axes of the reductions.
        options: the rule; `zero_stage` is 0 or 1.
    Invariant: between steps parameters equal the masters in their own dtype.
    """

    reduces_early = True
    """Whether a bucket may be reduced before the others are complete."""

    def __init__(self, buffers: FlatBuffers, mesh: Mesh, options: OptimizerOptions) -> None:
        self._buffers, self._axes = buffers, mesh.gradients
        dp = self._axes.dp
        self._parts = [Ownership(buffers.chunks, index, dp.size) for index in range(dp.size)]
        self._is_sharded = options.zero_stage > 0 and dp.size > 1
        self._owned = self._parts[dp.rank] if self._is_sharded else Ownership(buffers.chunks)
        self._master: Tensor | None = None
        if buffers.main_dtype != buffers.flat.dtype:
            self._master = buffers.flat_grad.new_empty(self._owned.numel)
            for part, place in self._owned.pieces():
                self._master[place].copy_(buffers.flat[part])
        self.updater = self._make_updater(mesh, options)

    def _make_updater(self, mesh: Mesh, options: OptimizerOptions) -> Updater:
        buffers, ranges = self._buffers, []
        for run in runs(buffers.chunks, mesh.tp):
            for part, place in self._owned.inside(run.start, run.stop):
                parameter = nn.Parameter(self._flat_master(part, place))
                parameter.grad = buffers.flat_grad[part]
                ranges.append(Range(parameter, run.decays, place))
        return make_updater(options, ranges, self._owned.numel)

    def _flat_master(self, part: slice, place: slice) -> Tensor:
        return self._buffers.flat[part] if self._master is None else self._master[place]

    @torch.no_grad()
    def reduce(self, bucket: Bucket) -> None:
        """Sum a bucket's gradients over the gradients' dp, for their owners. Collectives: a reduction to owners, or all."""
        flat = self._buffers.flat_grad[bucket.start : bucket.stop]
        if self._is_sharded:
            reduce_to_owners_(flat, self._axes.dp)
        else:
            all_reduce_(flat, self._axes.dp)

    @torch.no_grad()
    def norm(self, mask: Tensor | None) -> Tensor:
        """Sum the reduced gradients of tied buckets over the tie; return the global L2 norm (0-dim float64).

        Args:
            mask: True for entries of the flat buffers whose gradients are cleared before.
        Collectives: all-reduces over the gradients' tie; one over their dp, before the one over their model if sharded, else after.
        """
        gradients, dp = self._buffers.flat_grad, self._axes.dp
        for bucket in self._buffers.buckets:
            if bucket.is_tied:
                for part, _ in self._owned.inside(bucket.start, bucket.stop):
                    all_reduce_(gradients[part], self._axes.tie)
        if mask is not None:
            for part, _ in self._owned.pieces():
                gradients[part].masked_fill_(mask[part], 0)
        squares = torch.zeros(dp.size, dtype=torch.float64, device=gradients.device)
        for index in [dp.rank] if self._is_sharded else range(dp.size):
            for bucket in self._buffers.buckets:
                for part, _ in self._parts[index].inside(bucket.start, bucket.counted_stop):
                    squares[index] += square_sum(gradients[part])
        if self._is_sharded:
            all_reduce_(squares, dp)
        all_reduce_(squares, self._axes.model)
        if not self._is_sharded:
            # Replicas may add up in orders of their own, and must clip alike.
            all_reduce_(squares, dp, op="max")
        return squares.sum().sqrt()

    @torch.no_grad()
    def update(self, rate: float, clip_factor: float) -> None:
        """Update the owned masters by their gradients times `clip_factor`."""
        if clip_factor != 1:
            for part, _ in self._owned.pieces():
                self._buffers.flat_grad[part].mul_(clip_factor)
        self.updater.set_rate(rate)
        self.updater.optimizer.step()
        self.updater.num_updates += 1

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the masters back into the parameters, on all replicas. Collectives: gathers from owners over dp."""
        flat = self._buffers.flat
        if self._master is not None:
            for part, place in self._owned.pieces():
                flat[part].copy_(self._master[place])
        if self._is_sharded:
            buckets = self._buffers.buckets
            gather_from_owners_([flat[bucket.start : bucket.stop] for bucket in buckets], self._axes.dp)

    refresh = gather
    """After masters were restored."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the masters, where they are not the parameters, and of the state."""
        masters = 0 if self._master is None else self._master.nbytes
        return masters + sum(store.nbytes for store in self.updater.stores.values())

    def parts(self, slot: Slot) -> dict[str, Part]:
        """Return what this rank has of a parameter's master (`weight`) and state, by kind; nothing if it owns none of it."""
        found: dict[str, Part] = {}
        for part, place in self._owned.inside(slot.start, slot.stop):
            ends = part.start - slot.start, part.stop - slot.start
            own = self._master is not None
            flat, at = (self._master, place) if own else (self._buffers.flat, part)
            found["weight"] = Part(*ends, PlainStore(flat), at.start)
            for kind, store in self.updater.stores.items():
                found[kind] = Part(*ends, store, place.start)
        return found

    def share(self, slot: Slot, index: int) -> Iterator[tuple[int, int]]:
        """Yield the entries [start, stop) of a parameter that a replica saves: none or one range."""
        for part, _ in self._parts[index].inside(slot.start, slot.stop):
            yield part.start - slot.start, part.stop - slot.start


def square_sum(flat: Tensor) -> Tensor:
    """Return the sum of the squares of a flat buffer of whole rows, 0-dim float64, added row by row in order."""
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for rows in flat.view(-1, ALIGNED).split(_ROWS):
        total += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
    return total
