"""Where the parameters of a rank's stages lie in its flat buffers.

Decides the order, which is that in which things happen: stage by stage ("chunks"), within a chunk bucket by bucket. A bucket
is some whole decoder layers, the last ones first, as backward completes them, so that it can be reduced in one piece
while earlier layers are still computed. Each chunk's last bucket holds what only the whole backward completes, and the
gradients that are partial sums over tp, which are then summed in one piece too. Within a bucket those parameters come
first that the gradient norm counts on this rank: shards on all ranks, replicated and tied parameters on one.

Every parameter starts on 64 bytes, every bucket as well. The gaps hold zeros and stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from parallel.mesh import Axis
from parallel.weights import Entry

_ALIGNED = 32
"""Elements: 64 bytes in bf16, the narrowest dtype."""


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


def is_counted(entry: Entry, tp: Axis) -> bool:
    """Return whether this rank's gradient of the parameter enters the global norm."""
    if entry.is_tied_copy:
        return False
    return entry.shard is not None or tp.is_first


def lay_out(tables: Sequence[list[Entry]], tp: Axis, bucket_numel: int) -> list[Chunk]:
    """Give the parameters of a rank their places.

    Args:
        tables: each chunk's trainable parameters.
        tp: the axis, for what the norm counts here.
        bucket_numel: elements from which on a bucket takes no further layer.
    """

    def order(entry: Entry) -> tuple[bool, bool, bool]:
        return (not is_counted(entry, tp), entry.tp_partial_grad, entry.parameter.ndim < 2)

    chunks, at = [], 0
    for table in tables:
        slots: list[Slot] = []
        buckets = []
        for layers, entries in _cut(table, bucket_numel):
            start = counted_stop = at
            for entry in sorted(entries, key=order):
                slots.append(Slot(entry, at))
                at = -(-slots[-1].stop // _ALIGNED) * _ALIGNED
                counted_stop = slots[-1].stop if is_counted(entry, tp) else counted_stop
            buckets.append(Bucket(start, at, layers, counted_stop))
        partial = [slot for slot in slots if slot.entry.tp_partial_grad]
        where = slice(partial[0].start, partial[-1].stop) if partial else slice(0, 0)
        chunks.append(Chunk(tuple(slots), tuple(buckets), where))
    return chunks


def _cut(table: list[Entry], bucket_numel: int) -> Iterator[tuple[frozenset[int], list[Entry]]]:
    """Yield the layers and the parameters of each bucket, as backward completes them; late ones last."""

    def is_late(entry: Entry) -> bool:
        return entry.layer is None or entry.tp_partial_grad

    early = sorted((entry for entry in table if not is_late(entry)), key=lambda entry: -entry.layer)
    members: list[Entry] = []
    for _, layer in groupby(early, key=lambda entry: entry.layer):
        members += layer
        if sum(entry.parameter.numel() for entry in members) >= bucket_numel:
            yield frozenset(entry.layer for entry in members), members
            members = []
    if members:
        yield frozenset(entry.layer for entry in members), members
    late = [entry for entry in table if is_late(entry)]
    if late:
        yield frozenset(), late
