"""The mesh: which rank stands where, and the process groups between ranks.

Decides the order of the axes, slowest to fastest `pp, dp, tp`: rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank.
Tensor-parallel ranks are neighbours because they talk most. Assumes that `torch.distributed` is initialised before
`Mesh.create`; `Mesh.single()` needs nothing and runs the same code paths with groups of one. Does not hold any
state beside the groups, and nothing in the project looks a mesh up: it is always an argument.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it: its size, this rank's index on it, and the group along it."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    """None when size is 1: every collective over the axis is then the identity."""
    ranks: tuple[int, ...] = (0,)
    """World ranks along the axis, by index."""

    @property
    def is_first(self) -> bool:
        """Whether this rank has index 0."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the highest index."""
        return self.rank == self.size - 1


class Coordinates(NamedTuple):
    """Indices of a rank on the three axes."""

    pp: int
    dp: int
    tp: int


def coordinates_of(rank: int, *, dp: int, tp: int) -> Coordinates:
    """Return the mesh indices of a world rank; `dp` and `tp` are the axes' sizes."""
    return Coordinates(pp=rank // (dp * tp), dp=rank // tp % dp, tp=rank % tp)


def _axis(name: str, ranks: Sequence[int], rank: int) -> Axis:
    if len(ranks) == 1:
        return Axis(name, ranks=tuple(ranks))
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    return Axis(name, size=len(ranks), rank=list(ranks).index(rank), group=group, ranks=tuple(ranks))


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands: the three axes, and the unions of axes that some reductions run over."""

    pp: Axis
    dp: Axis
    tp: Axis
    model: Axis
    """pp x tp: the ranks that hold one copy of the model (gradient norms)."""
    batch: Axis
    """pp x dp: the ranks of one tensor-parallel index (step statistics)."""
    tie: Axis
    """First and last stage of this replica: they share a tied embedding. Size 1 on the stages between."""
    world: Axis
    device: torch.device

    @staticmethod
    def single(device: str | torch.device = "cpu") -> Mesh:
        """Return the mesh of one process; needs no `torch.distributed`."""
        names = ("pp", "dp", "tp", "model", "batch", "tie", "world")
        return Mesh(*(Axis(name) for name in names), device=torch.device(device))

    @staticmethod
    def create(*, pp: int, dp: int, tp: int, device: str | torch.device = "cpu") -> Mesh:
        """Build the mesh of all initialised ranks.

        Args:
            pp, dp, tp: sizes; their product must be the world size.
            device: where this rank computes.
        Raises:
            ValueError: the product is not the world size.
        Collectives: creates one group for each axis that is longer than 1 (local to its members).
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if pp * dp * tp != world_size:
            raise ValueError(
                f"mesh pp={pp} x dp={dp} x tp={tp} is {pp * dp * tp} ranks, the world has {world_size}"
            )
        here = coordinates_of(rank, dp=dp, tp=tp)

        def along(name: str, **same: int) -> Axis:
            ranks = [
                other
                for other in range(world_size)
                if all(
                    getattr(coordinates_of(other, dp=dp, tp=tp), axis) == index
                    for axis, index in same.items()
                )
            ]
            return _axis(name, ranks, rank)

        pipeline = along("pp", dp=here.dp, tp=here.tp)
        ends = (pipeline.ranks[0], pipeline.ranks[-1])
        on_tie = pp > 1 and rank in ends
        return Mesh(
            pp=pipeline,
            dp=along("dp", pp=here.pp, tp=here.tp),
            tp=along("tp", pp=here.pp, dp=here.dp),
            model=along("model", dp=here.dp),
            batch=along("batch", tp=here.tp),
            tie=_axis("tie", ends, rank) if on_tie else Axis("tie", ranks=(rank,)),
            world=along("world"),
            device=torch.device(device),
        )

    @staticmethod
    def from_torchrun(*, pp: int, dp: int, tp: int) -> Mesh:
        """Build the mesh of a process that `torchrun` started: one GPU for each local rank, or the CPU.

        Expects the default process group to be initialised (`launch/` does it, with the run's timeout).
        """
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return Mesh.create(pp=pp, dp=dp, tp=tp, device=device)

    def describe(self) -> str:
        """Return this rank's place as words, for messages: `rank 3 (pp 1, dp 0, tp 1)`."""
        return f"rank {self.world.rank} (pp {self.pp.rank}, dp {self.dp.rank}, tp {self.tp.rank})"
