"""Messages between stages: who talks to whom, in which order, how far ahead, and what is refused."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from parallel.mesh import Mesh
from parallel.pipeline.actions import Kind, parse
from parallel.pipeline.buffers import ALIGNMENT_BYTES
from parallel.pipeline.ends import Outgoing
from parallel.pipeline.p2p import Links, Message
from tests.workers import run_distributed

MESSAGES = {
    Kind.F: Message((2, 3), torch.float64),
    Kind.B: Message((2, 3), torch.float64),
    Kind.K: Message((5,), torch.bfloat16),
}
COUNT = 5


def _value(kind: Kind, microbatch: int, source: int) -> torch.Tensor:
    message = MESSAGES[kind]
    start = 100 * source + 10 * microbatch + (0.5 if kind == Kind.B else 0.0)
    return torch.full(message.shape, start, dtype=message.dtype)


def _run(links: Links, text: str) -> None:
    handlers = links.handlers()
    for action in map(parse, text.split()):
        handlers[action.kind](action)


def _announce(links: Links, texts: Sequence[str]) -> None:
    links.announce([parse(text) for text in texts])


def _put(links: Links, kind: Kind, microbatch: int) -> None:
    links.put(kind, links.mesh.pp.rank, microbatch, _value(kind, microbatch, links.mesh.world.rank))


def _took(links: Links, kind: Kind, microbatch: int, source: int) -> bool:
    """Take a message, compare it, give it back."""
    stage = links.mesh.pp.rank
    tensor = links.take(kind, stage, microbatch)
    assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
    same = torch.equal(tensor, _value(kind, microbatch, source))
    links.release(kind, stage, microbatch)
    return same


def _posted(links: Links, kind: Kind) -> list[int]:
    return [action.microbatch for action, _, _ in links._incoming[kind].posted]


def _connect_where_a_send_waits(num_ranks: int) -> list[bool]:
    """As NCCL does at its first call on a channel: a send comes back when the other end receives."""

    def start(channel: Outgoing, tensor: torch.Tensor) -> torch.distributed.Work:
        work = channel.group.send([tensor], channel.peer, 0)
        work.wait()
        return SimpleNamespace(wait=lambda: None)

    mesh = Mesh.create(pp=num_ranks, dp=1, tp=1)
    with mock.patch.object(Outgoing, "start", start):
        found = [Links(mesh, MESSAGES), Links(mesh, MESSAGES, num_stages=2 * num_ranks)]
    return [links.is_empty for links in found]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_connections_are_made_one_after_the_other(num_ranks: int) -> None:
    assert run_distributed(num_ranks, _connect_where_a_send_waits, num_ranks) == [[True, True]] * num_ranks


def _close_where_destroying_waits(num_ranks: int) -> bool:
    """As NCCL does: a group is destroyed when its other rank destroys it too."""

    def destroy(group: torch.distributed.ProcessGroup) -> None:
        group.allreduce([torch.ones(1)]).wait()

    mesh = Mesh.create(pp=num_ranks, dp=1, tp=1)
    for links in (Links(mesh, MESSAGES), Links(mesh, MESSAGES, num_stages=2 * num_ranks)):
        with mock.patch("torch.distributed.destroy_process_group", destroy):
            links.close()
    return True


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_groups_are_let_go_of_one_after_the_other(num_ranks: int) -> None:
    assert run_distributed(num_ranks, _close_where_destroying_waits, num_ranks) == [True] * num_ranks


def _posted_when_due() -> None:
    """As on a GPU: a receive is posted where it is waited for, and what was sent ahead is dropped in the end."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES, window=0)
    if mesh.pp.is_first:
        _announce(links, ["0SEND_F0", "0SEND_K0", "0SEND_K1", "0SEND_F1"])
        for kind, index in ((Kind.F, 0), (Kind.K, 0), (Kind.K, 1), (Kind.F, 1)):
            _put(links, kind, index)
            _run(links, f"0SEND_{kind}{index}")
    else:
        _announce(links, ["1RECV_F0", "1RECV_K0", "1RECV_F1"])
        for kind, index in ((Kind.F, 0), (Kind.K, 0), (Kind.F, 1)):
            assert not _posted(links, kind)
            _run(links, f"1RECV_{kind}{index}")
            assert _took(links, kind, index, source=0)
    links.drop()
    assert not links.num_under_way
    links.close()


def _window_and_order() -> None:
    """Rank 0 sends five micro-batches; rank 1 has two receives open, and takes them first in, first out."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES, window=2)
    if mesh.pp.is_first:
        _announce(links, [f"0SEND_F{index}" for index in range(COUNT)])
        for index in range(COUNT):
            _put(links, Kind.F, index)
            _run(links, f"0SEND_F{index}")
            assert links.is_empty
        links.finish()
        assert not links.num_under_way
    else:
        _announce(links, [f"1RECV_F{index}" for index in range(COUNT)])
        for index in range(COUNT):
            assert _posted(links, Kind.F) == list(range(index, min(index + 2, COUNT)))
            _run(links, f"1RECV_F{index}")
            assert _took(links, Kind.F, index, source=0)
        assert not _posted(links, Kind.F) and not links._incoming[Kind.F].awaited
        # One that was just taken, and two that were open.
        assert links.num_buffers == 3


def _late_kinds_do_not_block_others() -> None:
    """The receive of F1 is open before that of K0, but F1 is sent last: nothing may wait for it or take its place."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES)
    if mesh.pp.is_first:
        _announce(links, ["0SEND_F0", "0SEND_K0", "0RECV_B0", "0SEND_F1"])
        # The other rank has all its receives open by now.
        time.sleep(0.1)
        _put(links, Kind.F, 0)
        _put(links, Kind.K, 0)
        _run(links, "0SEND_F0 0SEND_K0 0RECV_B0")
        assert _took(links, Kind.B, 0, source=1)
        _put(links, Kind.F, 1)
        _run(links, "0SEND_F1")
    else:
        _announce(links, ["1RECV_F0", "1RECV_K0", "1SEND_B0", "1RECV_F1"])
        assert _posted(links, Kind.F) == [0, 1] and _posted(links, Kind.K) == [0]
        _run(links, "1RECV_K0 1RECV_F0")
        assert _took(links, Kind.K, 0, source=0) and _took(links, Kind.F, 0, source=0)
        # A view with strides of its own must arrive like any other.
        links.put(Kind.B, 1, 0, _value(Kind.B, 0, 1).t().contiguous().t())
        _run(links, "1SEND_B0 1RECV_F1")
        assert _took(links, Kind.F, 1, source=0)
    links.finish()


def _sent_in_one_list_received_in_the_next() -> None:
    """A teacher's message crosses the end of a step: the sender does not wait, and other kinds are not held up."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES)
    if mesh.pp.is_first:
        _announce(links, ["0SEND_K0", "0SEND_K1", "0SEND_F0"])
        for kind, index in ((Kind.K, 0), (Kind.K, 1), (Kind.F, 0)):
            _put(links, kind, index)
            _run(links, f"0SEND_{kind}{index}")
        torch.distributed.barrier()
    else:
        _announce(links, ["1RECV_F0", "1RECV_K0"])
        _run(links, "1RECV_F0 1RECV_K0")
        assert _took(links, Kind.F, 0, source=0) and _took(links, Kind.K, 0, source=0)
        torch.distributed.barrier()
        _announce(links, ["1RECV_K1"])
        _run(links, "1RECV_K1")
        assert _took(links, Kind.K, 1, source=0)
    links.finish()


def _finish_waits_for_the_receiver() -> None:
    """Rank 1 asks late for a message larger than any socket's buffer: a send returns at once, `finish` waits."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    large = torch.arange(1 << 22, dtype=torch.float64)
    links = Links(mesh, {Kind.F: Message(tuple(large.shape), large.dtype)})
    if mesh.pp.is_first:
        links.put(Kind.F, 0, 0, large)
        _run(links, "0SEND_F0")
        watched = weakref.ref(large)
        del large
        assert links.num_under_way == 1 and watched() is not None, "kept until it has left"
        torch.distributed.barrier()
        links.finish()
        assert not links.num_under_way
    else:
        torch.distributed.barrier()
        _announce(links, ["1RECV_F0"])
        _run(links, "1RECV_F0")
        assert torch.equal(links.take(Kind.F, 1, 0), large)


def _mistakes() -> None:
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, {kind: MESSAGES[kind] for kind in (Kind.F, Kind.B)})
    sends, receives = ({Kind.F}, {Kind.B}) if mesh.pp.is_first else ({Kind.B}, {Kind.F})
    assert (links._outgoing.keys(), links._incoming.keys()) == (sends, receives)
    if mesh.pp.is_first:
        for wrong in (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 3)):
            links.put(Kind.F, 0, 0, wrong)
            with pytest.raises(AssertionError, match=r"0SEND_F0.*\(2, 3\).*float64"):
                _run(links, "0SEND_F0")
        for index in (0, 1):
            _put(links, Kind.F, index)
            _run(links, f"0SEND_F{index}")
    else:
        _announce(links, ["1RECV_F0", "1RECV_F1"])
        _run(links, "1RECV_F0")
        with pytest.raises(AssertionError, match="1RECV_F0: 1RECV_F1 is next"):
            _run(links, "1RECV_F0")
        with pytest.raises(KeyError):
            links.release(Kind.F, 1, 0)
    links.finish()


def _latency() -> None:
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES)
    seconds = links.measure_latency()
    assert 0 < seconds < 0.5 and links.is_empty
    agreed = torch.tensor([seconds, -seconds], dtype=torch.float64)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    assert agreed.tolist() == [seconds, -seconds], "equal on all ranks"


def _two_ranks() -> None:
    for check in (
        _posted_when_due,
        _window_and_order,
        _late_kinds_do_not_block_others,
        _sent_in_one_list_received_in_the_next,
        _finish_waits_for_the_receiver,
        _mistakes,
        _latency,
    ):
        check()


def test_order_window_late_messages_and_mistakes() -> None:
    run_distributed(2, _two_ranks, timeout_s=60)


def _neighbours(shapes: list[tuple[int, int, int]]) -> None:
    """In every mesh each rank exchanges F, K and B with the stages before and after it, and with nobody else."""
    for pp, dp, tp in shapes:
        mesh = Mesh.create(pp=pp, dp=dp, tp=tp)
        links = Links(mesh, MESSAGES)
        here, stage = mesh.world.rank, mesh.pp.rank
        stride = dp * tp
        actions = []
        if not mesh.pp.is_first:
            actions += [f"{stage}{kind}0" for kind in ("RECV_F", "RECV_K", "SEND_B")]
        if not mesh.pp.is_last:
            actions += [f"{stage}{kind}0" for kind in ("SEND_F", "SEND_K", "RECV_B")]
        _announce(links, actions)
        for kind in (Kind.F, Kind.K) if not mesh.pp.is_last else ():
            _put(links, kind, 0)
        if not mesh.pp.is_first:
            _put(links, Kind.B, 0)
        # Sends first: a receive waits for a neighbour that may be waiting here.
        for action in sorted(actions, key=lambda action: "RECV" in action):
            _run(links, action)
        received = {Kind.F, Kind.K} if not mesh.pp.is_first else set()
        received |= {Kind.B} if not mesh.pp.is_last else set()
        for kind in received:
            source = here + (stride if kind == Kind.B else -stride)
            assert _took(links, kind, 0, source), (pp, dp, tp, here, kind)
        assert links.is_empty
        links.finish()


def test_every_rank_talks_to_its_own_pipeline() -> None:
    run_distributed(4, _neighbours, [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)], timeout_s=60)


def _around(pp: int) -> None:
    """With two stages a rank a forward passes every rank twice, and the last rank's neighbour is the first."""
    mesh = Mesh.create(pp=pp, dp=1, tp=1)
    links = Links(mesh, MESSAGES, num_stages=2 * pp)
    here, last = mesh.pp.rank, 2 * pp - 1
    for kind, stages in ((Kind.F, range(2 * pp)), (Kind.B, range(last, -1, -1))):
        mine = [stage for stage in stages if stage % pp == here]
        ends = (0, last) if kind is Kind.F else (last, 0)
        _announce(links, [f"{stage}RECV_{kind}0" for stage in mine if stage != ends[0]])
        for stage in mine:
            tensor = torch.full(MESSAGES[kind].shape, 1.0, dtype=torch.float64)
            if stage != ends[0]:
                _run(links, f"{stage}RECV_{kind}0")
                tensor = links.take(kind, stage, 0) + 1
                links.release(kind, stage, 0)
            if stage == ends[1]:
                assert (tensor == 2 * pp).all()
            else:
                links.put(kind, stage, 0, tensor)
                _run(links, f"{stage}SEND_{kind}0")
    links.finish()


@pytest.mark.parametrize("pp", [2, 3])
def test_several_stages_a_rank(pp: int) -> None:
    run_distributed(pp, _around, pp, timeout_s=60)


def test_one_rank_has_handlers_and_no_channel() -> None:
    links = Links(Mesh.single(), MESSAGES)
    assert not links._incoming and not links._outgoing and links.measure_latency() == 0.0
    kinds = {Kind(f"{way}_{kind}") for way in ("SEND", "RECV") for kind in "FBK"}
    assert links.handlers().keys() == kinds
    _announce(links, ["0F0", "0B0"])
    links.finish()
