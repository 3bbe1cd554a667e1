"""Collectives over a mesh axis, plain and differentiable. All tensor-parallel traffic of the project is here.

Two halves. The plain functions work on tensors that need no gradient. The differentiable ones are the four boundaries
of a tensor-parallel region, in pairs whose backward is the other's forward:

    copy_to_tp      identity    | backward: all-reduce sum   (enter a region from a replicated tensor)
    reduce_from_tp  all-reduce  | backward: identity         (leave a region of partial sums)
    gather_from_tp  all-gather  | backward: own slice        (leave a region of shards; what follows is replicated)
    split_to_tp     own slice   | backward: all-gather       (enter a region from a replicated tensor, by shards)

They assume that what follows a replicated tensor is computed identically on every rank of the axis, so its gradient is
replicated too and is never summed twice: the trap of most published tensor-parallel losses. Sequence parallelism will
replace the copy/reduce pair by all-gather/reduce-scatter over positions, here and nowhere else.

At axis size 1 every function is the identity. Shards are balanced and unpadded (`shard_range`), so sizes may differ by
one between ranks, and may be 0; padding exists only inside `all_gather`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.activity import Doing
from parallel.mesh import Axis

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def shard_range(size: int, num_shards: int, index: int) -> tuple[int, int]:
    """Return [start, stop) of shard `index` when `size` is cut into `num_shards` balanced parts.

    The first size % num_shards shards are one longer. Teacher and student heads of one vocabulary are cut at the same ids.
    """
    base, extra = divmod(size, num_shards)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def shard_sizes(size: int, num_shards: int) -> list[int]:
    """Return the lengths of all shards of `shard_range`."""
    return [stop - start for start, stop in (shard_range(size, num_shards, i) for i in range(num_shards))]


class Pending:
    """A collective under way."""

    def __init__(self, work: dist.Work, axis: Axis) -> None:
        self._work, self._axis = work, axis

    def wait(self) -> None:
        """Wait until the result is there."""
        with waiting("an all-reduce", self._axis):
            self._work.wait()


def waiting(what: str, axis: Axis) -> Doing:
    """Return the context of waiting for the other ranks of an axis."""
    return axis.activity.waiting(_Over(what, axis.name), axis.ranks)


class _Over(NamedTuple):
    """The name of a collective, put together only for who reads it."""

    what: str
    axis: str

    def __str__(self) -> str:
        return f"{self.what} over {'all ranks' if self.axis == 'world' else self.axis}"


def all_reduce_(
    tensor: Tensor, axis: Axis, *, op: Literal["sum", "max", "min"] = "sum", async_op: bool = False
) -> Pending | None:
    """Reduce `tensor` in place over the axis; the caller waits on the returned work when `async_op`.

    Raises:
        ValueError: the tensor requires grad (an in-place reduction would falsify its gradient).
    Collectives: one all-reduce over `axis`.
    """
    if tensor.requires_grad:
        raise ValueError("all_reduce_ on a tensor that requires grad")
    if axis.size == 1:
        return None
    if async_op:
        return Pending(dist.all_reduce(tensor, op=_OPS[op], group=axis.group, async_op=True), axis)
    with waiting("an all-reduce", axis):
        dist.all_reduce(tensor, op=_OPS[op], group=axis.group)
    return None


def all_gather(tensor: Tensor, axis: Axis, *, dim: int, sizes: list[int]) -> Tensor:
    """Return the shards of all ranks of the axis, concatenated along `dim`.

    Args:
        tensor: this rank's shard; its length along `dim` is sizes[axis.rank].
        sizes: length of every rank's shard along `dim` (backends gather equal sizes only, so shorter ones are padded
            on the wire).
    Collectives: one all-gather over `axis`.
    """
    if axis.size == 1:
        return tensor
    assert tensor.shape[dim] == sizes[axis.rank], (tensor.shape, dim, sizes, axis.rank)
    longest = max(sizes)
    front = tensor.movedim(dim, 0)
    if front.shape[0] < longest:
        padding = front.new_zeros((longest - front.shape[0], *front.shape[1:]))
        front = torch.cat([front, padding])
    gathered = front.new_empty((axis.size * longest, *front.shape[1:]))
    with waiting("an all-gather", axis):
        dist.all_gather_single(gathered, front.contiguous(), group=axis.group)
    if min(sizes) < longest:
        parts = gathered.split(longest)
        gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    # Contiguous, because sums over a strided tensor run in another order than those of the unsharded model.
    return gathered.movedim(0, dim).contiguous()


def reduce_to_owners_(flat: Tensor, axis: Axis) -> None:
    """Sum `flat` over the axis for its owners: rank r of n gets part r of n equal ones, in place; the rest is undefined.

    Gloo's own reduce-scatter takes three times as long as one reduction to each owner, all under way at once.

    Collectives: a reduce-scatter over `axis`; on gloo `axis.size` reductions.
    """
    if axis.size == 1:
        return
    parts = flat.chunk(axis.size)
    with waiting("a reduction to owners", axis):
        if dist.get_backend(axis.group) != "gloo":
            dist.reduce_scatter_single(parts[axis.rank], flat, group=axis.group)
            return
        reduce = partial(dist.reduce, group=axis.group, async_op=True)
        works = [reduce(part, dst=rank) for part, rank in zip(parts, axis.ranks, strict=True)]
        for work in works:
            work.wait()


def gather_from_owners_(flats: Sequence[Tensor], axis: Axis) -> None:
    """Fill each tensor with what its owners have: rank r of n owns part r of n equal ones.

    Gloo's own all-gather takes half as long again as one broadcast from each owner, all under way at once.

    Collectives: an all-gather over `axis` for each tensor; on gloo `axis.size` broadcasts.
    """
    if axis.size == 1:
        return
    works = []
    with waiting("a gather from owners", axis):
        for flat in flats:
            parts = flat.chunk(axis.size)
            if dist.get_backend(axis.group) != "gloo":
                dist.all_gather_single(flat, parts[axis.rank], group=axis.group)
                continue
            send = partial(dist.broadcast, group=axis.group, async_op=True)
            works += [send(part, src=rank) for part, rank in zip(parts, axis.ranks, strict=True)]
        for work in works:
            work.wait()


def broadcast_(tensor: Tensor, axis: Axis, *, source: int) -> None:
    """Overwrite `tensor` with the one of index `source` on the axis. Collectives: one broadcast over `axis`."""
    if axis.size > 1:
        with waiting("a broadcast", axis):
            dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)


def broadcast_object(value: Any, axis: Axis, *, source: int = 0) -> Any:
    """Return the picklable `value` of index `source` on the axis. For configuration, never on a hot path."""
    if axis.size == 1:
        return value
    box = [value]
    with waiting("a broadcast", axis):
        dist.broadcast_object_list(box, src=axis.ranks[source], group=axis.group)
    return box[0]


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Return the picklable values of all ranks of the axis, by index. For scores and reports, never on a hot path."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    with waiting("a gather", axis):
        dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis has come here."""
    if axis.size > 1:
        with waiting("a barrier", axis):
            dist.barrier(group=axis.group)


class _CopyToTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        all_reduce_(grad, ctx.axis)
        return grad, None


class _ReduceFromTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce_(total, axis)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFromTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        return all_gather(x, axis, dim=-1, sizes=sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: ctx.axis.rank])
        return grad.narrow(-1, start, ctx.sizes[ctx.axis.rank]), None, None


class _SplitToTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        return x.narrow(-1, sum(sizes[: axis.rank]), sizes[axis.rank]).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.axis, dim=-1, sizes=ctx.sizes), None, None


def copy_to_tp(x: Tensor, axis: Axis) -> Tensor:
    """Return `x` unchanged; its gradient is summed over the axis. Collectives: backward all-reduce."""
    return x if axis.size == 1 else _CopyToTp.apply(x, axis)


def reduce_from_tp(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of `x` over the axis; its gradient passes unchanged. Collectives: forward all-reduce."""
    return x if axis.size == 1 else _ReduceFromTp.apply(x, axis)


def gather_from_tp(x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
    """Return the shards joined along the last dim; the gradient is this rank's slice. Collectives: forward all-gather."""
    return x if axis.size == 1 else _GatherFromTp.apply(x, axis, sizes)


def split_to_tp(x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
    """Return this rank's slice of the last dim; the gradient is gathered. Collectives: backward all-gather."""
    return x if axis.size == 1 else _SplitToTp.apply(x, axis, sizes)
