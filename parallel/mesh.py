"""The mesh: which rank stands where, and the process groups between ranks.

Decides the order of the axes, slowest to fastest `pp, dp, tp`: rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank.
Tensor-parallel ranks are neighbours because they talk most. Gradients are reduced on a thread beside the one that computes,
and two threads must not use one group (their calls could meet in another order on another rank), so what is reduced at
the end of a step has groups of its own, even where the ranks are the same. Assumes that `torch.distributed` is
initialised before `Mesh.create`; `Mesh.single()` needs nothing and runs the same code paths with groups of one. Does not
hold any state beside the groups, and nothing in the project looks a mesh up: it is always an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.activity import Activity

PATIENCE = timedelta(days=30)
"""The process groups' own limit of waiting, out of the way: whether a rank waits too long depends on what the others do, which
a group does not see (`parallel.activity`)."""


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
    activity: Activity = field(default_factory=Activity, repr=False, compare=False)
    """Where waiting over the axis is noted."""

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


def pipelines_of(*, pp: int, dp: int, tp: int) -> list[tuple[int, ...]]:
    """Return the world ranks of every pipeline of a mesh, each in stage order."""
    return [
        tuple((stage * dp + replica) * tp + shard for stage in range(pp))
        for replica in range(dp)
        for shard in range(tp)
    ]


def new_group(
    ranks: Sequence[int], activity: Activity, *, backend: str | None = None
) -> dist.ProcessGroup | None:
    """Make a process group; every rank makes every group, in one order.

    Collectives: the members connect.
    """
    with activity.waiting(f"connections between ranks {', '.join(map(str, ranks))}", ranks):
        return dist.new_group(list(ranks), timeout=PATIENCE, backend=backend)


class _Groups:
    """Makes process groups, one for each set of ranks: axes that coincide share theirs.

    Every rank makes every group, in one order: torch numbers groups by how many a process has made, so a group that
    only its members make gets different names on ranks that have made different numbers of them, and hangs.

    Args:
        rank: this process.
        made: groups that are there already, by their ranks.
        activity: of this process.
        backend: of the groups to make; None takes the default group's.
    """

    def __init__(
        self,
        rank: int,
        made: dict[tuple[int, ...], dist.ProcessGroup],
        activity: Activity,
        *,
        backend: str | None = None,
    ) -> None:
        self._rank, self._made, self._activity, self._backend = rank, made, activity, backend

    def axis(self, name: str, sets: Sequence[tuple[int, ...]]) -> Axis:
        """Return the axis over the one of `sets` that this rank is in; alone if it is in none."""
        for members in sets:
            if len(members) > 1 and members not in self._made:
                self._made[members] = new_group(members, self._activity, backend=self._backend)
        mine = next((members for members in sets if self._rank in members), (self._rank,))
        if len(mine) == 1:
            return Axis(name, ranks=mine, activity=self._activity)
        return Axis(name, len(mine), mine.index(self._rank), self._made[mine], mine, self._activity)


@dataclass(frozen=True)
class GradientAxes:
    """The axes that the end of a step reduces over; they share no group with the axes that compute."""

    dp: Axis
    tp: Axis
    tie: Axis
    """First and last rank of this pipeline: they share a tied embedding. Size 1 on the ranks between."""
    model: Axis
    """pp x tp: the ranks that hold one copy of the model (gradient norms)."""


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands: the three axes, and the unions of axes that some reductions run over."""

    pp: Axis
    dp: Axis
    tp: Axis
    model: Axis
    """pp x tp: the ranks that hold one copy of the model."""
    world: Axis
    background: Axis
    """The world, for files written beside the steps: a gloo group that nothing else uses."""
    gradients: GradientAxes
    device: torch.device
    activity: Activity = field(default_factory=Activity, repr=False, compare=False)
    """What this process is doing; the axes' own."""

    @staticmethod
    def single(device: str | torch.device = "cpu") -> Mesh:
        """Return the mesh of one process; needs no `torch.distributed`."""
        names = ("pp", "dp", "tp", "model", "world", "background")
        activity = Activity()
        gradients = GradientAxes(*(Axis(name, activity=activity) for name in ("dp", "tp", "tie", "model")))
        axes = (Axis(name, activity=activity) for name in names)
        return Mesh(*axes, gradients=gradients, device=torch.device(device), activity=activity)

    @staticmethod
    def create(
        *,
        pp: int,
        dp: int,
        tp: int,
        device: str | torch.device = "cpu",
        activity: Activity | None = None,
    ) -> Mesh:
        """Build the mesh of all initialised ranks.

        Args:
            pp, dp, tp: sizes; their product must be the world size.
            device: where this rank computes.
            activity: where what this process does is noted; None makes one that nobody looks at.
        Raises:
            ValueError: the product is not the world size.
        Collectives: creates one group for each set of ranks that is no axis of one, a second one for the axes of
            gradients and one for the background (all made on all ranks); one all-reduce of one element over each of the
            gradients'.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if pp * dp * tp != world_size:
            raise ValueError(
                f"mesh pp={pp} x dp={dp} x tp={tp} is {pp * dp * tp} ranks, the world has {world_size}"
            )

        def sets(*same: str) -> list[tuple[int, ...]]:
            """Return the sets of ranks that agree in the axes `same`."""
            found: dict[tuple[int, ...], list[int]] = {}
            for other in range(world_size):
                place = coordinates_of(other, dp=dp, tp=tp)
                found.setdefault(tuple(getattr(place, axis) for axis in same), []).append(other)
            return [tuple(ranks) for ranks in found.values()]

        activity = activity or Activity()
        groups = _Groups(rank, {tuple(range(world_size)): dist.group.WORLD}, activity)
        apart = _Groups(rank, {}, activity)
        ends = [(ranks[0], ranks[-1]) for ranks in pipelines_of(pp=pp, dp=dp, tp=tp)] if pp > 1 else []
        mesh = Mesh(
            pp=groups.axis("pp", sets("dp", "tp")),
            dp=groups.axis("dp", sets("pp", "tp")),
            tp=groups.axis("tp", sets("pp", "dp")),
            model=groups.axis("model", sets("dp")),
            world=groups.axis("world", sets()),
            background=_Groups(rank, {}, activity, backend="gloo").axis("background", sets()),
            gradients=GradientAxes(
                dp=apart.axis("dp", sets("pp", "tp")),
                tp=apart.axis("tp", sets("pp", "dp")),
                tie=apart.axis("tie", ends),
                model=apart.axis("model", sets("dp")),
            ),
            device=torch.device(device),
            activity=activity,
        )
        mesh._connect()
        return mesh

    def _connect(self) -> None:
        """Use the groups of gradients once: a connection made inside a step could wait for the other thread's work."""
        axes = self.gradients
        for axis in (axes.dp, axes.tp, axes.tie, axes.model):
            if axis.size > 1:
                with self.activity.waiting(f"connections over {axis.name}", axis.ranks):
                    dist.all_reduce(torch.zeros(1, device=self.device), group=axis.group)

    @property
    def pipelines(self) -> list[tuple[int, ...]]:
        """World ranks of every pipeline, in one order on all ranks."""
        return pipelines_of(pp=self.pp.size, dp=self.dp.size, tp=self.tp.size)

    def describe(self) -> str:
        """Return this rank's place as words, for messages: `rank 3 (pp 1, dp 0, tp 1)`."""
        return f"rank {self.world.rank} (pp {self.pp.rank}, dp {self.dp.rank}, tp {self.tp.rank})"
