"""Messages between stages: who talks to whom, in which order, how far ahead, and what is refused."""

from __future__ import annotations

import time

import pytest
import torch

from parallel.mesh import Mesh
from parallel.pipeline.actions import Kind, parse
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


def _put(links: Links, kind: Kind, microbatch: int) -> None:
    links.outbox[kind, microbatch] = _value(kind, microbatch, links.mesh.world.rank)


def _took(links: Links, kind: Kind, microbatch: int, source: int) -> bool:
    return torch.equal(links.inbox.pop((kind, microbatch)), _value(kind, microbatch, source))


def _posted(links: Links, kind: Kind) -> list[int]:
    return [microbatch for microbatch, _, _ in links._channels[kind].posted]


def _window_and_order() -> None:
    """Rank 0 sends five micro-batches; rank 1 has two receives open, and takes them first in, first out."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES, window=2)
    if mesh.pp.is_first:
        actions = [parse(f"0SEND_F{index}") for index in range(COUNT)]
        links.begin(actions)
        for index in range(COUNT):
            _put(links, Kind.F, index)
            _run(links, f"0SEND_F{index}")
            assert not links.outbox
        links.finish()
        assert not links._sends
    else:
        actions = [parse(f"1RECV_F{index}") for index in range(COUNT)]
        links.begin(actions)
        for index in range(COUNT):
            assert _posted(links, Kind.RECV_F) == list(range(index, min(index + 2, COUNT)))
            _run(links, f"1RECV_F{index}")
            assert _took(links, Kind.F, index, source=0)
        links.finish()
        assert not _posted(links, Kind.RECV_F) and not links._channels[Kind.RECV_F].awaited


def _late_kinds_do_not_block_others() -> None:
    """The receive of F1 is open before that of K0, but F1 is sent last: nothing may wait for it or take its place."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, MESSAGES)
    if mesh.pp.is_first:
        plan = "0SEND_F0 0SEND_K0 0RECV_B0 0SEND_F1"
        links.begin([parse(text) for text in plan.split()])
        # The other rank has all its receives open by now.
        time.sleep(0.1)
        _put(links, Kind.F, 0)
        _put(links, Kind.K, 0)
        _run(links, "0SEND_F0 0SEND_K0 0RECV_B0")
        assert _took(links, Kind.B, 0, source=1)
        _put(links, Kind.F, 1)
        _run(links, "0SEND_F1")
    else:
        plan = "1RECV_F0 1RECV_K0 1SEND_B0 1RECV_F1"
        links.begin([parse(text) for text in plan.split()])
        assert _posted(links, Kind.RECV_F) == [0, 1] and _posted(links, Kind.RECV_K) == [0]
        _run(links, "1RECV_K0 1RECV_F0")
        assert _took(links, Kind.K, 0, source=0) and _took(links, Kind.F, 0, source=0)
        # A view with strides of its own must arrive like any other.
        links.outbox[Kind.B, 0] = _value(Kind.B, 0, 1).t().contiguous().t()
        _run(links, "1SEND_B0 1RECV_F1")
        assert _took(links, Kind.F, 1, source=0)
    links.finish()


def _finish_waits_for_the_receiver() -> None:
    """Rank 1 asks late for a message larger than any socket's buffer: a send returns at once, `finish` waits."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    large = torch.arange(1 << 22, dtype=torch.float64)
    links = Links(mesh, {Kind.F: Message(tuple(large.shape), large.dtype)})
    if mesh.pp.is_first:
        links.begin([parse("0SEND_F0")])
        links.outbox[Kind.F, 0] = large
        _run(links, "0SEND_F0")
        ((work, kept),) = links._sends
        assert kept is large and not work.is_completed()
        torch.distributed.barrier()
        links.finish()
        assert work.is_completed() and not links._sends
    else:
        torch.distributed.barrier()
        links.begin([parse("1RECV_F0")])
        _run(links, "1RECV_F0")
        assert torch.equal(links.inbox.pop((Kind.F, 0)), large)
        links.finish()


def _mistakes() -> None:
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    links = Links(mesh, {kind: MESSAGES[kind] for kind in (Kind.F, Kind.B)})
    own = "SEND_F RECV_B" if mesh.pp.is_first else "RECV_F SEND_B"
    assert links._channels.keys() == set(own.split()), "kinds left out have no channel"
    for box in (links.inbox, links.outbox):
        box[Kind.F, 3] = torch.zeros(1)
        with pytest.raises(AssertionError, match="'F'.*3"):
            links.begin([])
        box.clear()
    if mesh.pp.is_first:
        links.begin([])
        for wrong in (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 3)):
            links.outbox[Kind.F, 0] = wrong
            with pytest.raises(AssertionError, match=r"0SEND_F0.*\(2, 3\).*float64"):
                _run(links, "0SEND_F0")
        for index in (0, 1):
            _put(links, Kind.F, index)
            _run(links, f"0SEND_F{index}")
    else:
        links.begin([parse("1RECV_F0"), parse("1RECV_F1")])
        _run(links, "1RECV_F0")
        with pytest.raises(AssertionError, match="1RECV_F0: micro-batch 1 is next"):
            _run(links, "1RECV_F0")
    links.finish()


def _two_ranks() -> None:
    for check in (
        _window_and_order,
        _late_kinds_do_not_block_others,
        _finish_waits_for_the_receiver,
        _mistakes,
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
            actions += [parse(f"{stage}{kind}0") for kind in ("RECV_F", "RECV_K", "SEND_B")]
        if not mesh.pp.is_last:
            actions += [parse(f"{stage}{kind}0") for kind in ("SEND_F", "SEND_K", "RECV_B")]
        links.begin(actions)
        for kind in (Kind.F, Kind.K) if not mesh.pp.is_last else ():
            _put(links, kind, 0)
        if not mesh.pp.is_first:
            _put(links, Kind.B, 0)
        # Sends first: a receive waits for a neighbour that may be waiting here.
        for action in sorted(actions, key=lambda action: action.kind.startswith("RECV")):
            _run(links, str(action))
        received = {(kind, 0) for kind in (Kind.F, Kind.K)} if not mesh.pp.is_first else set()
        received |= {(Kind.B, 0)} if not mesh.pp.is_last else set()
        assert links.inbox.keys() == received
        for kind, microbatch in received:
            source = here + (stride if kind == Kind.B else -stride)
            assert _took(links, kind, microbatch, source), (pp, dp, tp, here, kind)
        links.finish()


def test_every_rank_talks_to_its_own_pipeline() -> None:
    run_distributed(4, _neighbours, [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)], timeout_s=60)


def test_one_stage_has_handlers_and_no_channel() -> None:
    links = Links(Mesh.single(), MESSAGES)
    assert not links._channels
    kinds = {Kind(f"{way}_{kind}") for way in ("SEND", "RECV") for kind in "FBK"}
    assert links.handlers().keys() == kinds
    links.begin([parse("0F0"), parse("0B0")])
    links.finish()
