"""Point-to-point traffic between neighbouring stages. All pipeline traffic of the project is here.

Decides: one process group for each directed edge and each kind of traffic (student forward, student backward, teacher),
so that a message that is late never blocks another kind; sends return at once; receives are posted ahead in the plan's
order, `window` per channel, first in first out. Shapes and dtypes are known beforehand, so there is no handshake, and
what arrives is checked by the plan's order alone. Groups are made and touched when the object is built (`warm_up`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.pipeline.actions import Action, Kind

_TRAFFIC = {
    Kind.SEND_F: (Kind.F, +1),
    Kind.SEND_B: (Kind.B, -1),
    Kind.SEND_K: (Kind.K, +1),
    Kind.RECV_F: (Kind.F, -1),
    Kind.RECV_B: (Kind.B, +1),
    Kind.RECV_K: (Kind.K, -1),
}
"""Communication action -> (what travels, where the other stage is)."""


@dataclass(frozen=True)
class Message:
    """Shape and dtype of every tensor of one kind of traffic."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Channel:
    """One directed edge for one kind of traffic, as its receiver or sender sees it."""

    peer: int
    group: dist.ProcessGroup
    awaited: deque[int] = field(default_factory=deque)
    posted: deque[tuple[int, Tensor, dist.Work]] = field(default_factory=deque)


class Links:
    """This rank's channels to its neighbour stages, and the mailboxes that compute actions read and write.

    Args:
        mesh: the pp axis decides the neighbours.
        messages: kind of traffic (F, B, K) -> shape and dtype; kinds left out do not travel.
        window: receives posted ahead on each channel.
    Collectives: creates the groups of all edges, in one order on all ranks; sends one element over this rank's.
    """

    def __init__(self, mesh: Mesh, messages: dict[Kind, Message], *, window: int = 2) -> None:
        self.mesh, self.messages, self.window = mesh, messages, window
        self.inbox: dict[tuple[Kind, int], Tensor] = {}
        self.outbox: dict[tuple[Kind, int], Tensor] = {}
        self._channels = self._open()
        self._sends: list[tuple[dist.Work, Tensor]] = []
        self._warm_up()

    def _open(self) -> dict[Kind, _Channel]:
        channels: dict[Kind, _Channel] = {}
        if self.mesh.pp.size == 1:
            return channels
        here = self.mesh.world.rank
        for ranks in self.mesh.pipelines:
            for upper, lower in itertools.pairwise(ranks):
                for kind in (kind for kind in (Kind.F, Kind.B, Kind.K) if kind in self.messages):
                    # Made on every rank, members or not: see parallel.mesh.
                    group = dist.new_group([upper, lower])
                    if here in (upper, lower):
                        sends = (here == upper) == (kind != Kind.B)
                        action = Kind(f"{'SEND' if sends else 'RECV'}_{kind}")
                        channels[action] = _Channel(lower if here == upper else upper, group)
        return channels

    def _warm_up(self) -> None:
        """Send one element over every channel, so that no connection is made inside a step."""
        works = []
        for action, channel in self._channels.items():
            element = torch.zeros(1, device=self.mesh.device)
            call = dist.isend if action.startswith("SEND") else dist.irecv
            works.append((call(element, channel.peer, group=channel.group), element))
        for work, _ in works:
            work.wait()

    def handlers(self) -> dict[Kind, Callable[[Action], None]]:
        """Return the executor's handlers of all communication actions."""
        return {kind: self._send if kind.startswith("SEND") else self._receive for kind in _TRAFFIC}

    def begin(self, actions: Sequence[Action]) -> None:
        """Announce the actions of a step: their receives are posted ahead in this order."""
        assert not self.inbox and not self.outbox, (self.inbox.keys(), self.outbox.keys())
        for action in actions:
            channel = self._channels.get(action.kind)
            if channel is not None and action.kind.startswith("RECV"):
                channel.awaited.append(action.microbatch)
        for kind, channel in self._channels.items():
            if kind.startswith("RECV"):
                self._post(kind, channel)

    def _post(self, kind: Kind, channel: _Channel) -> None:
        message = self.messages[_TRAFFIC[kind][0]]
        while channel.awaited and len(channel.posted) < self.window:
            buffer = torch.empty(message.shape, dtype=message.dtype, device=self.mesh.device)
            work = dist.irecv(buffer, channel.peer, group=channel.group)
            channel.posted.append((channel.awaited.popleft(), buffer, work))

    def _receive(self, action: Action) -> None:
        channel = self._channels[action.kind]
        microbatch, buffer, work = channel.posted.popleft()
        assert microbatch == action.microbatch, f"{action}: micro-batch {microbatch} is next on the channel"
        work.wait()
        self._post(action.kind, channel)
        self.inbox[_TRAFFIC[action.kind][0], microbatch] = buffer

    def _send(self, action: Action) -> None:
        kind = _TRAFFIC[action.kind][0]
        tensor = self.outbox.pop((kind, action.microbatch))
        message = self.messages[kind]
        assert tuple(tensor.shape) == message.shape and tensor.dtype == message.dtype, (
            action,
            tensor.shape,
            message,
        )
        channel = self._channels[action.kind]
        tensor = tensor.contiguous()
        self._sends.append((dist.isend(tensor, channel.peer, group=channel.group), tensor))
        # Completed sends give their tensors back; nothing waits here.
        self._sends = [pair for pair in self._sends if not pair[0].is_completed()]

    def finish(self) -> None:
        """Wait for this step's sends; call after its last action."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
