"""The two ends of a directed edge for one kind of the traffic that plans name: what is under way on it, and what is awaited."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.actions import Action


@dataclass
class Outgoing:
    """The sending end of a directed edge for one kind of traffic; keeps what is sent until it has been received.

    A gloo send says that it is complete only to who waits for it, and waiting must not hold up compute. So a send is
    waited for when it is known to have been received (`acknowledge`). A GPU's may be asked.

    Args:
        peer: the other rank's number in the group.
        target: its world rank.
    """

    peer: int
    target: int
    group: dist.ProcessGroup
    under_way: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)
    num_sent: int = 0
    num_settled: int = 0
    """Sends of all lists so far that are done with."""
    before: int = 0
    """Messages that the peer has received in the lists before this one."""

    def start(self, tensor: Tensor) -> dist.Work:
        """Start sending a contiguous tensor, which the caller keeps."""
        # The group's own call: `dist.isend` looks ranks up at every message.
        return self.group.send([tensor], self.peer, 0)

    def send(self, tensor: Tensor) -> None:
        """Start sending a contiguous tensor, and keep it."""
        self.num_sent += 1
        self.under_way.append((self.start(tensor), tensor))
        while self.under_way and tensor.is_cuda and self.under_way[0][0].is_completed():
            self._settle_one()

    def acknowledge(self, count: int) -> None:
        """Let go of what the peer has received: `count` messages of this list and all of those before."""
        if self.under_way and self.under_way[0][1].is_cuda:
            # Waiting would make the lane wait for the other's, however idle that one is; `send` asks instead.
            return
        while self.under_way and self.num_settled < self.before + count:
            self._settle_one()

    def finish(self) -> None:
        """Wait until all that was sent has been received."""
        while self.under_way:
            self._settle_one()

    def _settle_one(self) -> None:
        work, _ = self.under_way.popleft()
        self.num_settled += 1
        # Raises what went wrong.
        work.wait()


@dataclass
class Incoming:
    """The receiving end of a directed edge for one kind of traffic; `peer` is the other rank's number in the group."""

    peer: int
    source: int
    """World rank of the peer."""
    group: dist.ProcessGroup
    awaited: deque[Action] = field(default_factory=deque)
    posted: deque[tuple[Action, Tensor, dist.Work]] = field(default_factory=deque)
    num_received: int = 0

    def start(self, buffer: Tensor) -> dist.Work:
        """Start receiving into a contiguous tensor."""
        return self.group.recv([buffer], self.peer, 0)
