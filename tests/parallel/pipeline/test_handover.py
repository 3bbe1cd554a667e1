"""Tensors handed over beside the plan: order, windows, who keeps what for how long, and what is refused."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.pipeline.handover import Handover, Route
from parallel.pipeline.p2p import Message
from tests.workers import run_distributed

MESSAGE = Message((2, 3), torch.float64)
ROUTES = [Route(7, 0, 1), Route(5, 0, 0), Route(4, 1, 0), Route(2, 0, 1)]
COUNT = 6


def _value(name: int, microbatch: int, rank: int) -> torch.Tensor:
    return torch.full(MESSAGE.shape, 1000.0 * rank + 10 * microbatch + name, dtype=MESSAGE.dtype)


def _make(handover: Handover, microbatch: int) -> None:
    rank = handover.mesh.pp.rank
    for route in ROUTES:
        if route.source == rank:
            handover.put(route.name, microbatch, _value(route.name, microbatch, handover.mesh.world.rank))


def _source(handover: Handover, route: Route) -> int:
    """Return the world rank that makes a route's tensors in this pipeline."""
    return handover.mesh.pp.ranks[route.source]


def _both_ways() -> tuple[int, int, int, list[bool]]:
    """Make everything before anything is taken; take it in another order, in two steps."""
    mesh = Mesh.create(pp=2, dp=1, tp=dist.get_world_size() // 2)
    handover = Handover(mesh, ROUTES, MESSAGE, window=2)
    mine = [route for route in ROUTES if route.target == mesh.pp.rank]
    for microbatch in range(COUNT):
        _make(handover, microbatch)
    ahead, most = handover.num_waiting, handover.most_waiting
    dist.barrier()
    same = []
    for microbatches in (range(3), range(3, COUNT)):
        handover.expect(microbatches)
        posted = [len(channel.posted) for channel in handover._incoming.values()]
        assert posted == [2], "a window of receives, and no more"
        for microbatch in reversed(microbatches):
            for route in mine:
                tensor = handover.take(route.name, microbatch)
                same.append(torch.equal(tensor, _value(route.name, microbatch, _source(handover, route))))
                handover.release(route.name, microbatch)
        assert handover.is_settled
    deadline = time.monotonic() + 20
    while handover.num_waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    left = handover.num_waiting
    handover.close()
    return ahead, most, left, same


@pytest.mark.parametrize("world_size", [2, 4], ids=["pp2", "pp2-tp2"])
def test_everything_arrives_and_is_let_go_of(world_size: int) -> None:
    for rank, (ahead, most, left, same) in enumerate(run_distributed(world_size, _both_ways)):
        made = 3 if rank < world_size // 2 else 1
        assert ahead == most == made * COUNT, "nothing has been announced, so nothing has gone"
        assert left == 0, "what was received is kept no longer, without anybody asking"
        assert all(same) and len(same) == 2 * COUNT


def _reuses_buffers() -> int:
    handover = Handover(Mesh.create(pp=2, dp=1, tp=1), ROUTES, MESSAGE)
    mine = [route for route in ROUTES if route.target == handover.mesh.pp.rank]
    for step in range(10):
        handover.expect(range(3 * step, 3 * step + 3))
        for microbatch in range(3 * step, 3 * step + 3):
            _make(handover, microbatch)
            for route in mine:
                handover.take(route.name, microbatch)
                handover.release(route.name, microbatch)
    handover.close()
    return handover._pool.num_allocated


def test_buffers_are_used_again() -> None:
    assert all(count <= 4 for count in run_distributed(2, _reuses_buffers))


def _stops_ahead() -> tuple[int, int, list[str]]:
    """Take the first two micro-batches of five, and leave."""
    before = set(threading.enumerate())
    mesh = Mesh.create(pp=2, dp=dist.get_world_size() // 2, tp=1)
    handover = Handover(mesh, ROUTES, MESSAGE)
    for microbatch in range(5):
        _make(handover, microbatch)
    handover.expect(range(2))
    for microbatch in range(2):
        for route in ROUTES:
            if route.target == mesh.pp.rank:
                handover.take(route.name, microbatch)
                handover.release(route.name, microbatch)
    handover.drop()
    received = sum(channel.num_received for channel in handover._incoming.values())
    handover.close()
    left = [thread.name for thread in set(threading.enumerate()) - before]
    return received, handover.num_waiting, left


@pytest.mark.parametrize("world_size", [2, 4], ids=["pp2", "pp2-dp2"])
def test_what_was_made_ahead_is_dropped(world_size: int) -> None:
    """A thread that waits for a send nobody takes aborts the process when it leaves."""
    for rank, (received, waiting, left) in enumerate(run_distributed(world_size, _stops_ahead)):
        assert received == (5 if rank < world_size // 2 else 10), "all of one or of two routes"
        assert waiting == 0 and not left


def test_one_process_hands_over_without_a_message() -> None:
    handover = Handover(Mesh.single(), [Route(0, 0, 0)], MESSAGE)
    tensor = _value(0, 3, 0)
    handover.put(0, 3, tensor)
    handover.expect(range(3, 4))
    assert handover.num_waiting == 1
    with pytest.raises(AssertionError, match="tensors wait"):
        handover.close()
    assert handover.take(0, 3) is tensor
    with pytest.raises(AssertionError, match="tensors wait"):
        handover.close()
    handover.release(0, 3)
    with pytest.raises(AssertionError, match="nothing was made for 0 of micro-batch 4"):
        handover.take(0, 4)
    with pytest.raises(AssertionError, match="float32"):
        handover.put(0, 5, tensor.float())
    with pytest.raises(AssertionError, match="routes of one name"):
        Handover(Mesh.single(), [Route(0, 0, 0), Route(0, 0, 0)], MESSAGE)
    handover.close()


def _out_of_order() -> str:
    handover = Handover(Mesh.create(pp=2, dp=1, tp=1), ROUTES, MESSAGE)
    found = ""
    if handover.mesh.pp.is_first:
        # A run that goes on begins anywhere, and then leaves nothing out.
        handover.put(7, 4, _value(7, 4, 0))
        try:
            handover.put(7, 5, _value(7, 5, 0))
        except AssertionError as error:
            found = str(error)
        handover.put(2, 4, _value(2, 4, 0))
    else:
        handover.expect([4])
        assert handover._incoming[0].names == (7, 2)
        for name in (2, 7):
            assert torch.equal(handover.take(name, 4), _value(name, 4, 0))
    dist.barrier()
    return found


def test_what_is_left_out_is_refused() -> None:
    assert "is next" in run_distributed(2, _out_of_order)[0]
