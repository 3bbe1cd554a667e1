"""Point-to-point traffic between neighbouring stages. All messages that plans name are here; beside them: `handover`.

Decides: one process group for each directed edge and each kind of traffic (student forward, student backward, teacher),
so that a message that is late never blocks another kind; sends return at once; receives are posted ahead in the plan's
order, `window` per channel, first in first out, into buffers that are used again. On a GPU they are posted when they are due: a
receive is a kernel there that spins on multiprocessors until the message comes, and while it does, whatever waits for the whole
device (a library, the loading of a kernel) would wait for a message that depends on it. Shapes and dtypes are known beforehand,
so there is no handshake, and what arrives is checked by the plan's order alone. Groups are made and touched when the
object is built. Neighbouring stages on one rank hand tensors over without a message.

Micro-batches are numbered over the whole run, so a teacher's message may be sent in one step and received in a later one.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.activity import Doing
from parallel.collectives import all_reduce_, gather_objects
from parallel.mesh import Mesh, new_group
from parallel.pipeline.actions import RECVS, SENDS, TRAFFIC_OF, Action, Kind
from parallel.pipeline.buffers import BufferPool
from parallel.pipeline.connect import Channel, connect, disconnect
from parallel.pipeline.ends import Incoming, Outgoing

_HOP = {Kind.F: +1, Kind.B: -1, Kind.K: +1}
"""What travels -> where the stage is that needs it."""


@dataclass(frozen=True)
class Message:
    """Shape and dtype of every tensor of one kind of traffic."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Key = tuple[Kind, int, int]
"""(what travels, stage, micro-batch)"""


class Links:
    """This rank's channels to its neighbours, and the mailboxes that compute actions read and write.

    Args:
        mesh: the pp axis decides the neighbours.
        messages: kind of traffic (F, B, K) -> shape and dtype; kinds left out do not travel.
        num_stages: stages of the student, a multiple of pp; as many as ranks by default. The teacher has one a rank.
        window: receives posted ahead on each channel; None: two on a CPU, none on a GPU.
    Collectives: creates the groups of all edges, in one order on all ranks; sends one element over this rank's.
    """

    def __init__(
        self,
        mesh: Mesh,
        messages: dict[Kind, Message],
        *,
        num_stages: int | None = None,
        window: int | None = None,
    ) -> None:
        self.mesh, self.messages = mesh, messages
        self.window = (2 if mesh.device.type == "cpu" else 0) if window is None else window
        self._num_stages = {Kind.F: num_stages or mesh.pp.size, Kind.K: mesh.pp.size}
        self._num_stages[Kind.B] = self._num_stages[Kind.F]
        # Kinds may run on streams of their own, and must not pass memory to each other unseen.
        self._pools = {kind: BufferPool(mesh.device) for kind in messages}
        self._inbox: dict[Key, Tensor] = {}
        self._outbox: dict[Key, Tensor] = {}
        self._loans: dict[Key, Tensor] = {}
        self._outgoing: dict[Kind, Outgoing] = {}
        self._told: dict[Action, Counter[Kind]] = {}
        self._expected: Counter[Kind] = Counter()
        self._incoming: dict[Kind, Incoming] = {}
        self._channels = self._open()
        connect(self._channels, mesh)

    @property
    def num_buffers(self) -> int:
        """Buffers for messages that were ever made."""
        return sum(pool.num_allocated for pool in self._pools.values())

    @property
    def is_empty(self) -> bool:
        """Whether no tensor waits here to be taken, sent or given back."""
        return not (self._inbox or self._outbox or self._loans)

    def close(self) -> None:
        """Let go of the process groups; nothing may be under way. Collectives: those of `disconnect`."""
        assert self.is_empty, "tensors wait in links that are closed"
        self.finish()
        disconnect(self._channels)
        self._channels, self._outgoing, self._incoming = [], {}, {}

    def drop(self) -> None:
        """Receive and forget what was sent ahead, so that nothing is under way; what was announced has been received.

        Collectives: a gather over the world; then what was sent here, a message at a time.
        """
        here = self.mesh.world.rank
        mine = {(kind, channel.target): channel.num_sent for kind, channel in self._outgoing.items()}
        sent = gather_objects(mine, self.mesh.world)
        for kind, channel in self._incoming.items():
            message = self.messages[kind]
            buffer = self._pools[kind].take(message.shape, message.dtype)
            while channel.num_received < sent[channel.source][kind, here]:
                with self._waiting("what was sent ahead", channel):
                    channel.start(buffer).wait()
                channel.num_received += 1
            self._pools[kind].give(buffer)
        self.finish()

    def _open(self) -> list[tuple[int, Channel]]:
        """Make the channels of all edges; return this rank's in the order of all, with the ranks at their other ends."""
        mine: list[tuple[int, Channel]] = []
        here, size = self.mesh.world.rank, self.mesh.pp.size
        for ranks in self.mesh.pipelines:
            for kind in (kind for kind in _HOP if kind in self.messages):
                # With several stages a rank the last rank's stage is followed by one on the first.
                wraps = self._num_stages[kind] > size > 1
                for upper in range(size if wraps else size - 1):
                    edge = (upper, (upper + 1) % size)[:: _HOP[kind]]
                    source, target = (ranks[index] for index in edge)
                    # Made on every rank, members or not: see parallel.mesh.
                    group = new_group(sorted((source, target)), self.mesh.activity)
                    if here == source:
                        peer = dist.get_group_rank(group, target)
                        self._outgoing[kind] = Outgoing(peer, target, group)
                        mine.append((target, self._outgoing[kind]))
                    if here == target:
                        self._incoming[kind] = Incoming(dist.get_group_rank(group, source), source, group)
                        mine.append((source, self._incoming[kind]))
        return mine

    def _waiting(self, what: str, channel: Incoming) -> Doing:
        """Return the context of waiting for a channel's other end."""
        return self.mesh.activity.waiting(what, (channel.source,))

    def measure_latency(self, repeats: int = 9) -> float:
        """Return the seconds that a message takes to the next rank, where its receive is already posted.

        Half a round trip, the slowest edge's.

        Collectives: messages over all edges of F and B, one edge after the other; one all-reduce over the world.
        """
        if not {Kind.F, Kind.B} <= self.messages.keys() or self.mesh.pp.size == 1:
            return 0.0
        with self.mesh.activity.waiting("messages that are timed", self.mesh.pp.ranks):
            if not self.mesh.pp.is_first:
                self._answer(repeats)
            trips_s = [] if self.mesh.pp.is_last else self._ask(repeats)
        latency_s = statistics.median(trips_s) / 2 if trips_s else 0.0
        slowest = torch.tensor(latency_s, dtype=torch.float64, device=self.mesh.device)
        all_reduce_(slowest, self.mesh.world, op="max")
        return slowest.item()

    def _ask(self, repeats: int) -> list[float]:
        """Send a message to the next rank and wait for one from there, several times; return the seconds of each."""
        trips_s = []
        question, answer = self._pair()
        for _ in range(repeats):
            coming = self._incoming[Kind.B].start(answer)
            start_s = time.perf_counter()
            going = self._outgoing[Kind.F].start(question)
            coming.wait()
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
            trips_s.append(time.perf_counter() - start_s)
            going.wait()
        self._give_pair(question, answer)
        return trips_s

    def _answer(self, repeats: int) -> None:
        """Answer the rank before."""
        question, answer = self._pair()
        coming = self._incoming[Kind.F].start(question)
        for left in reversed(range(repeats)):
            coming.wait()
            if left:
                coming = self._incoming[Kind.F].start(question)
            self._outgoing[Kind.B].start(answer).wait()
        self._give_pair(question, answer)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return a buffer for a message forward and one for a message back."""
        there, back = self.messages[Kind.F], self.messages[Kind.B]
        return (
            self._pools[Kind.F].take(there.shape, there.dtype).zero_(),
            self._pools[Kind.B].take(back.shape, back.dtype).zero_(),
        )

    def _give_pair(self, there: Tensor, back: Tensor) -> None:
        self._pools[Kind.F].give(there)
        self._pools[Kind.B].give(back)

    def put(self, kind: Kind, stage: int, microbatch: int, tensor: Tensor) -> None:
        """Leave what an F, B or K of `stage` made: for its SEND, or for the next stage if that is on this rank."""
        size, following = self.mesh.pp.size, stage + _HOP[kind]
        if size == 1:
            self._inbox[kind, following, microbatch] = tensor
        else:
            self._outbox[kind, stage, microbatch] = tensor

    def take(self, kind: Kind, stage: int, microbatch: int) -> Tensor:
        """Return the input of an F, B or K of `stage`; on loan until `release`."""
        key = kind, stage, microbatch
        tensor = self._inbox.pop(key)
        self._loans[key] = tensor
        return tensor

    def release(self, kind: Kind, stage: int, microbatch: int) -> None:
        """Give back what was taken; nothing may look at the tensor any more."""
        tensor = self._loans.pop((kind, stage, microbatch))
        if self.mesh.pp.size > 1:
            self._pools[kind].give(tensor)

    def handlers(self) -> dict[Kind, Callable[[Action], None]]:
        """Return the executor's handlers of all communication actions."""
        return dict.fromkeys(SENDS, self._send) | dict.fromkeys(RECVS, self._receive)

    def announce(
        self,
        actions: Sequence[Action],
        told: Mapping[Action, Counter[Kind]] | None = None,
        received: Mapping[Kind, int] | None = None,
    ) -> None:
        """Announce the actions of a coming list: their receives are posted ahead in this order.

        Args:
            actions: with the run's micro-batches.
            told: what each receive tells about this rank's sends in the list (`lower.acknowledgements`).
            received: messages of this rank that its neighbours receive in the whole list, by kind.
        """
        self._told = dict(told or {})
        for kind, channel in self._outgoing.items():
            channel.before += self._expected[kind]
        self._expected = Counter(received or {})
        for action in actions:
            if action.kind in RECVS:
                self._incoming[TRAFFIC_OF[action.kind]].awaited.append(action)
        for kind in self._incoming:
            self._post(kind)

    def _post(self, kind: Kind) -> None:
        channel = self._incoming[kind]
        while channel.awaited and len(channel.posted) < self.window:
            self._post_one(kind)

    def _post_one(self, kind: Kind) -> None:
        channel, message = self._incoming[kind], self.messages[kind]
        buffer = self._pools[kind].take(message.shape, message.dtype)
        channel.posted.append((channel.awaited.popleft(), buffer, channel.start(buffer)))

    def _receive(self, action: Action) -> None:
        kind = TRAFFIC_OF[action.kind]
        channel = self._incoming[kind]
        if not channel.posted:
            self._post_one(kind)
        expected, buffer, work = channel.posted.popleft()
        assert expected == action, f"{action}: {expected} is next on the channel"
        with self._waiting(f"a message from stage {action.stage - _HOP[kind]}", channel):
            work.wait()
        channel.num_received += 1
        self._post(kind)
        self._inbox[kind, action.stage, action.microbatch] = buffer
        for sent, count in self._told.get(action, {}).items():
            self._outgoing[sent].acknowledge(count)

    def _send(self, action: Action) -> None:
        kind = TRAFFIC_OF[action.kind]
        tensor = self._outbox.pop((kind, action.stage, action.microbatch)).contiguous()
        message = self.messages[kind]
        assert tuple(tensor.shape) == message.shape and tensor.dtype == message.dtype, (
            action,
            tensor.shape,
            message,
        )
        self._outgoing[kind].send(tensor)

    @property
    def num_under_way(self) -> int:
        """Sends that are not known to have been received."""
        return sum(len(channel.under_way) for channel in self._outgoing.values())

    def finish(self) -> None:
        """Wait until all that was sent has been received; after a plan that leaves nothing under way."""
        for channel in self._outgoing.values():
            with self.mesh.activity.waiting("its messages to be taken", (channel.target,)):
                channel.finish()
