"""Work beside the main thread: in order, its errors told, and never in the way."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch

from parallel.background import Background


@pytest.fixture
def beside() -> Background:
    return Background("test")


def _fail() -> None:
    raise OSError("no space left on device")


def test_work_is_done_in_order_beside_the_caller(beside: Background) -> None:
    done: list[int] = []
    go = threading.Event()
    beside.give(lambda: done.append(go.wait(60)))
    for number in range(3):
        beside.give(lambda number=number: done.append(number))
    last = beside.submit(lambda: [*done, threading.current_thread().name])
    assert done == []
    go.set()
    assert last.result(60) == [True, 0, 1, 2, "test"]


def test_an_error_is_for_whoever_asks(beside: Background) -> None:
    future = beside.submit(_fail)
    with pytest.raises(OSError, match="no space"):
        future.result(60)
    beside.check()


def test_of_work_that_nobody_asks_about_the_error_comes_once_with_the_next_call(beside: Background) -> None:
    for call in (beside.check, beside.wait, lambda: beside.give(lambda: None)):
        beside.give(_fail)
        beside.submit(lambda: None).result(60)
        with pytest.raises(OSError, match="no space"):
            call()
        beside.check()


def test_waiting_ends_with_the_work_or_with_the_time(beside: Background) -> None:
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait(60)
        done.set()

    beside.give(work)
    start_s = time.monotonic()
    beside.wait(0.05)
    assert time.monotonic() - start_s < 30 and not done.is_set()
    go.set()
    beside.wait()
    assert done.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a thread has a priority of its own")
def test_a_thread_that_yields_leaves_the_others_their_priority() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = niceness()
    assert Background("test", yields=True).submit(niceness).result(60) == 19
    assert Background("test").submit(niceness).result(60) == niceness() == mine


def test_the_thread_computes_with_as_many_threads_as_its_maker() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert Background("test").submit(torch.get_num_threads).result(60) == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_closed_one_has_done_its_work_and_ended() -> None:
    beside = Background("ends")
    go = threading.Event()
    done = beside.submit(lambda: (go.wait(60), threading.current_thread())[1])
    threading.Timer(0.2, go.set).start()
    beside.close()
    assert done.done() and not done.result().is_alive()


def test_closing_waits_for_no_thread_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.background._CLOSE_S", 0.1)
    beside, go = Background("stuck"), threading.Event()
    done = beside.submit(lambda: go.wait(60))
    beside.close()
    assert not done.done()
    go.set()
