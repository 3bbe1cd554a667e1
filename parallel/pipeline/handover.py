"""Tensors that stages hand to each other beside the plan: from where they are made to where they are used, on any two ranks.

Decides: a tensor has a route (a name, the rank that makes it, the rank that uses it) and a micro-batch. One process group
for each directed pair of ranks; messages leave in the order of the micro-batches, within one in that of the routes.
Receives are posted ahead, `window` a channel, no further than what `expect` has announced. Sends return at once and keep
what they send until it has been received: a thread waits for that, so memory is bounded by how far the makers run ahead.
A run that stops while makers are ahead must `drop` what nobody will take: a thread that waits in gloo when its process
leaves aborts it. On one rank tensors are handed over as they are. Groups are made and touched when the object is built.

Assumes that the plan's own dependencies put the making before the using: who takes a tensor waits for it, and nobody else
does. Micro-batches are numbered over the whole run. Knows no teacher and no loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.background import Background
from parallel.collectives import gather_objects
from parallel.mesh import Mesh, new_group
from parallel.pipeline.buffers import BufferPool
from parallel.pipeline.connect import Channel, connect, disconnect
from parallel.pipeline.p2p import Message


class Route(NamedTuple):
    """Which tensor of each micro-batch goes from where to where."""

    name: int
    source: int
    target: int
    """Pipeline ranks."""


class _Place(NamedTuple):
    """A message's place on its channel."""

    microbatch: int
    index: int
    """Of its route among those of the channel."""

    def following(self, num_routes: int) -> _Place:
        last = self.index + 1 == num_routes
        return _Place(self.microbatch + 1, 0) if last else _Place(self.microbatch, self.index + 1)


@dataclass
class _Outgoing:
    """The sending end of a channel; `peer` is the other rank's number in the group."""

    group: dist.ProcessGroup
    peer: int
    names: tuple[int, ...]
    waiter: Background
    under_way: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)
    following: _Place | None = None
    """What is to be sent next; None before the first."""
    num_sent: int = 0

    def start(self, tensor: Tensor) -> dist.Work:
        """Start sending a contiguous tensor, which the caller keeps."""
        return self.group.send([tensor], self.peer, 0)

    def send(self, name: int, microbatch: int, tensor: Tensor) -> None:
        """Start sending a contiguous tensor, and keep it until it has been received."""
        place = _Place(microbatch, self.names.index(name))
        assert place == (self.following or _Place(microbatch, 0)), f"{place}: {self.following} is next"
        self.following = place.following(len(self.names))
        self.num_sent += 1
        self.under_way.append((self.start(tensor), tensor))
        if tensor.is_cuda:
            while self.under_way and self.under_way[0][0].is_completed():
                self._settle_one()
        else:
            # A gloo send says that it is complete only to who waits for it.
            self.waiter.give(self._settle_one)

    def finish(self) -> None:
        """Wait until all that was sent has been received, and let the thread end."""
        self.waiter.wait()
        while self.under_way:
            self._settle_one()
        self.waiter.close()

    def _settle_one(self) -> None:
        # Raises what went wrong. Its receiver may be judging a model before the step that takes it.
        self.under_way[0][0].wait()
        self.under_way.popleft()


@dataclass
class _Incoming:
    """The receiving end of a channel; `peer` is the other rank's number in the group."""

    group: dist.ProcessGroup
    peer: int
    source: int
    """World rank of the peer."""
    names: tuple[int, ...]
    awaited: deque[tuple[int, int]] = field(default_factory=deque)
    posted: deque[tuple[tuple[int, int], Tensor, dist.Work]] = field(default_factory=deque)
    num_received: int = 0

    def start(self, buffer: Tensor) -> dist.Work:
        """Start receiving into a contiguous tensor."""
        return self.group.recv([buffer], self.peer, 0)


class Handover:
    """This rank's ends of all routes.

    Args:
        mesh: the pp axis says where the ranks of a route are; each pipeline has channels of its own.
        routes: equal on all ranks, in the order in which each rank makes the tensors of a micro-batch; names are unique.
        message: shape and dtype of every tensor.
        window: receives posted ahead on each channel.
    Collectives: creates the groups of all channels, in one order on all ranks; sends one element over this rank's.
    """

    def __init__(self, mesh: Mesh, routes: Sequence[Route], message: Message, *, window: int = 2) -> None:
        self.mesh, self.message, self.window = mesh, message, window
        self._routes = {route.name: route for route in routes}
        assert len(self._routes) == len(routes), f"routes of one name: {routes}"
        self._pool = BufferPool(mesh.device)
        self._here: dict[tuple[int, int], Tensor] = {}
        self._loans: dict[tuple[int, int], Tensor] = {}
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        self.most_waiting = 0
        """Tensors made here that have waited for their use at once, at most."""
        self._channels = self._open(routes)
        connect(self._channels, mesh)

    @property
    def num_waiting(self) -> int:
        """Tensors that were made here and are not known to have reached where they are used."""
        own = sum(self._routes[name].source == self.mesh.pp.rank for name, _ in self._here)
        return own + sum(len(channel.under_way) for channel in self._outgoing.values())

    def put(self, name: int, microbatch: int, tensor: Tensor) -> None:
        """Hand over what was made for a micro-batch; nobody may change it any more."""
        target = self._routes[name].target
        assert tuple(tensor.shape) == self.message.shape and tensor.dtype == self.message.dtype, (
            tensor.shape,
            tensor.dtype,
            self.message,
        )
        if target == self.mesh.pp.rank:
            self._here[name, microbatch] = tensor
        else:
            self._outgoing[target].send(name, microbatch, tensor.contiguous())
        self.most_waiting = max(self.most_waiting, self.num_waiting)

    def expect(self, microbatches: Iterable[int]) -> None:
        """Announce the micro-batches whose tensors will be taken here next, all of them: receives are posted ahead."""
        for microbatch in microbatches:
            for channel in self._incoming.values():
                channel.awaited += [(name, microbatch) for name in channel.names]
        for channel in self._incoming.values():
            self._post(channel)

    def take(self, name: int, microbatch: int) -> Tensor:
        """Return a tensor, when it has come; on loan until `release`."""
        key = name, microbatch
        source = self._routes[name].source
        while key not in self._here:
            assert source != self.mesh.pp.rank, f"nothing was made for {name} of micro-batch {microbatch}"
            channel = self._incoming[source]
            arrived, buffer, work = channel.posted.popleft()
            self._receive(channel, work)
            self._here[arrived] = buffer
            self._post(channel)
        tensor = self._here.pop(key)
        if tensor.is_cuda and source == self.mesh.pp.rank:
            # Made on another stream; its memory must not go back there before this one has read it.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self._loans[key] = tensor
        return tensor

    def release(self, name: int, microbatch: int) -> None:
        """Give back what was taken; nothing may look at the tensor any more."""
        tensor = self._loans.pop((name, microbatch))
        if self._routes[name].source != self.mesh.pp.rank:
            self._pool.give(tensor)

    @property
    def is_settled(self) -> bool:
        """Whether all that was announced has been taken and given back."""
        left = [channel for channel in self._incoming.values() if channel.awaited or channel.posted]
        return not (left or self._loans)

    def drop(self) -> None:
        """Receive and forget what was made ahead; all that was announced has been taken and given back.

        Collectives: a gather over the world; then what was sent here, a message at a time.
        """
        assert self.is_settled, "what was announced has not been taken"
        self._here.clear()
        mine = {target: channel.num_sent for target, channel in self._outgoing.items()}
        sent = gather_objects(mine, self.mesh.world)
        buffer = self._pool.take(self.message.shape, self.message.dtype)
        for channel in self._incoming.values():
            while channel.num_received < sent[channel.source][self.mesh.pp.rank]:
                self._receive(channel, channel.group.recv([buffer], channel.peer, 0))
        self._pool.give(buffer)

    def close(self) -> None:
        """Let go of the process groups; nothing may wait here. Collectives: those of `disconnect`."""
        assert self.is_settled and not self._here, "tensors wait in a handover that is closed"
        for target, channel in self._outgoing.items():
            with self.mesh.activity.waiting(f"stage {target} to take its hidden states"):
                channel.finish()
        disconnect(self._channels)
        self._channels, self._outgoing, self._incoming = [], {}, {}

    def _open(self, routes: Sequence[Route]) -> list[tuple[int, Channel]]:
        """Make the channels of all routes; return this rank's in the order of all, with the ranks at their other ends."""
        mine: list[tuple[int, Channel]] = []
        here = self.mesh.world.rank
        pairs = sorted({(route.source, route.target) for route in routes if route.source != route.target})
        for ranks in self.mesh.pipelines:
            for pair in pairs:
                source, target = (ranks[index] for index in pair)
                # Made on every rank, members or not: see parallel.mesh.
                group = new_group(sorted((source, target)), self.mesh.activity)
                names = tuple(route.name for route in routes if (route.source, route.target) == pair)
                if here == source:
                    peer = dist.get_group_rank(group, target)
                    waiter = Background(f"handover to {target}")
                    self._outgoing[pair[1]] = _Outgoing(group, peer, names, waiter)
                    mine.append((target, self._outgoing[pair[1]]))
                if here == target:
                    self._incoming[pair[0]] = _Incoming(
                        group, dist.get_group_rank(group, source), source, names
                    )
                    mine.append((source, self._incoming[pair[0]]))
        return mine

    def _receive(self, channel: _Incoming, work: dist.Work) -> None:
        source = self.mesh.pp.ranks.index(channel.source)
        with self.mesh.activity.waiting(f"hidden states from stage {source}", (channel.source,)):
            work.wait()
        channel.num_received += 1

    def _post(self, channel: _Incoming) -> None:
        while channel.awaited and len(channel.posted) < self.window:
            buffer = self._pool.take(self.message.shape, self.message.dtype)
            work = channel.start(buffer)
            channel.posted.append((channel.awaited.popleft(), buffer, work))
