"""Where the parameters of a rank's stages lie in its flat buffers, and which part of them each replica owns.

Decides the order, which is that in which things happen: stage by stage ("chunks"), within a chunk bucket by bucket. A bucket
is some whole decoder layers, the last ones first, as backward completes them, so that it can be reduced in one piece
while earlier layers are still computed. Each chunk's last bucket holds what only the whole backward completes, and the
gradients that are partial sums over tp, which are then summed in one piece too. An end of a tie has a bucket of its own,
equal on both ranks that hold it. Within a bucket those parameters come first that the gradient norm counts on this
rank: shards on all ranks, replicated and tied parameters on one. A shard takes the space of the largest of its tp ranks', so that what
follows lies at one place on all of them.

A bucket is cut into as many equal parts as there are replicas; replica r owns part r of every bucket, in one piece, and its
own buffers hold these pieces one after the other. Parameters and parts start on multiples of `ALIGNED` elements. The
gaps hold zeros and stay zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

from torch import Tensor

from parallel.mesh import Axis
from parallel.weights import Entry

ALIGNED = 256
"""Elements: a row of the gradient norm and a block of an 8-bit state, so that neither depends on where buckets are cut."""


@dataclass(frozen=True)
class Bucket:
    """A contiguous part of a chunk's flat gradients, summed over dp in one piece."""

    start: int
    stop: int
    layers: frozenset[int]
    """Global decoder layers: once the last of them has its gradients, the bucket is complete. Empty: not before the end
    of the chunk's backward."""
    counted_stop: int
    """Up to here it enters the gradient norm on this rank."""
    is_tied: bool = False
    """Whether it is an end of a tie, and nothing else."""

    def part(self, index: int, count: int) -> slice:
        """Return part `index` of `count` equal ones, as a range of the flat buffers."""
        size = (self.stop - self.start) // count
        return slice(self.start + index * size, self.start + (index + 1) * size)


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies."""

    entry: Entry
    start: int

    @property
    def stop(self) -> int:
        """End of the parameter."""
        return self.start + self.entry.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        """Return the parameter's part of a flat buffer, in its shape."""
        return flat[self.start : self.stop].view(self.entry.parameter.shape)


@dataclass(frozen=True)
class Chunk:
    """What one stage of the rank has in the flat buffers."""

    slots: tuple[Slot, ...]
    buckets: tuple[Bucket, ...]
    """In the order in which a backward completes them."""
    partial: slice
    """The gradients that are partial sums over tp; may be empty."""


class Run(NamedTuple):
    """Neighbouring parameters that are updated alike, with the gaps between them."""

    start: int
    stop: int
    decays: bool
    """Whether weight decay applies: to matrices only."""
    is_counted: bool
    """Whether the gradient norm counts them on this rank."""


def is_counted(entry: Entry, tp: Axis) -> bool:
    """Return whether this rank's gradient of the parameter enters the global norm."""
    if entry.is_tied_copy:
        return False
    return entry.shard is not None or tp.is_first


def lay_out(tables: Sequence[list[Entry]], tp: Axis, bucket_numel: int, *, num_parts: int = 1) -> list[Chunk]:
    """Give the parameters of a rank their places.

    Args:
        tables: each chunk's trainable parameters.
        tp: the axis, for what the norm counts here.
        bucket_numel: elements from which on a bucket takes no further layer.
        num_parts: equal parts that every bucket can be cut into.
    """

    def order(entry: Entry) -> tuple[bool, bool, bool, bool]:
        # Without a look at the rank: what all of tp have whole lies at one place, so that its replicas are added in one order.
        whole = entry.shard is None
        return (entry.is_tied_copy, whole, entry.tp_partial_grad, entry.parameter.ndim < 2)

    chunks, at = [], 0
    for table in tables:
        slots: list[Slot] = []
        buckets = []
        for layers, entries in _cut(table, bucket_numel):
            start = counted_stop = at
            for entry in sorted(entries, key=order):
                slots.append(Slot(entry, at))
                at += _round_up(_space(entry), ALIGNED)
                counted_stop = at if is_counted(entry, tp) else counted_stop
            at = start + _round_up(at - start, ALIGNED * num_parts)
            buckets.append(Bucket(start, at, layers, counted_stop, is_tied=_is_tied(entries[0])))
        partial = [slot for slot in slots if slot.entry.tp_partial_grad]
        where = slice(partial[0].start, partial[-1].stop) if partial else slice(0, 0)
        chunks.append(Chunk(tuple(slots), tuple(buckets), where))
    return chunks


def runs(chunks: Sequence[Chunk], tp: Axis) -> Iterator[Run]:
    """Yield the runs of neighbours that decay alike and count alike, over all of the flat buffers."""
    slots = [slot for chunk in chunks for slot in chunk.slots]
    end = chunks[-1].buckets[-1].stop

    def kind(slot: Slot) -> tuple[bool, bool]:
        return slot.entry.parameter.ndim > 1, is_counted(slot.entry, tp)

    begins = [(next(members).start, *its) for its, members in groupby(slots, key=kind)]
    for (start, decays, counted), (stop, *_) in pairwise([*begins, (end, False, False)]):
        yield Run(start, stop, decays, counted)


class Ownership:
    """The pieces of the flat buffers that one of several replicas owns, and where they lie in its own buffers.

    Args:
        chunks: the layout, made for `count` parts or a multiple.
        index, count: which replica, of how many; 0 of 1 owns everything, where it lies.
    """

    def __init__(self, chunks: Sequence[Chunk], index: int = 0, count: int = 1) -> None:
        self._buckets = [bucket for chunk in chunks for bucket in chunk.buckets]
        self._index, self._count = index, count
        self.numel = self._buckets[-1].stop // count
        """Length of a replica's own buffers."""

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Yield each piece as a range of the flat buffers, and as one of the replica's own buffers."""
        for bucket in self._buckets:
            part = bucket.part(self._index, self._count)
            yield part, self._place(bucket, part)

    def inside(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Yield what is owned of a range of the flat buffers; of a parameter that is one piece at most."""
        for part, place in self.pieces():
            begin, end = max(start, part.start), min(stop, part.stop)
            if begin < end:
                shift = place.start - part.start
                yield slice(begin, end), slice(begin + shift, end + shift)

    def _place(self, bucket: Bucket, part: slice) -> slice:
        # The buckets before this one are cut into as many parts.
        start = bucket.start // self._count
        return slice(start, start + part.stop - part.start)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _space(entry: Entry) -> int:
    """Return the elements that a parameter has, or the largest of its shards."""
    if entry.shard is None:
        return entry.parameter.numel()
    length = entry.full_shape[entry.shard.dim]
    return math.prod(entry.full_shape) // length * -(-length // entry.tp.size)


def _is_tied(entry: Entry) -> bool:
    return entry.is_tied_copy or entry.is_tied_source


def _cut(table: list[Entry], bucket_numel: int) -> Iterator[tuple[frozenset[int], list[Entry]]]:
    """Yield the layers and the parameters of each bucket, as backward completes them; late ones last."""

    def is_late(entry: Entry) -> bool:
        return entry.layer is None or entry.tp_partial_grad

    tied = [entry for entry in table if _is_tied(entry)]
    table = [entry for entry in table if not _is_tied(entry)]
    yield from ((frozenset([entry.layer]), [entry]) for entry in tied if not is_late(entry))
    early = sorted((entry for entry in table if not is_late(entry)), key=lambda entry: -entry.layer)
    members: list[Entry] = []
    for _, layer in groupby(early, key=lambda entry: entry.layer):
        members += layer
        if sum(entry.parameter.numel() for entry in members) >= bucket_numel:
            yield frozenset(entry.layer for entry in members), members
            members = []
    if members:
        yield frozenset(entry.layer for entry in members), members
    yield from ((frozenset(), [entry]) for entry in tied if is_late(entry))
    late = [entry for entry in table if is_late(entry)]
    if late:
        yield frozenset(), late
