"""What a process is said to be doing: names, waits, threads, and the marks of progress."""

from __future__ import annotations

import threading
import time

import pytest

from parallel.activity import Activity
from parallel.background import Background


def test_what_it_is_in_is_named_from_the_outside_in() -> None:
    activity = Activity()
    assert activity.look().doing == ""
    with activity.doing("step 7"), activity.doing(("an", "object")):
        assert activity.look().doing == "step 7, ('an', 'object')"
        assert activity.look().waits_for == "" and activity.look().peers == ()
    with pytest.raises(KeyError), activity.doing("step 8"):
        raise KeyError
    assert activity.look().doing == ""


def test_a_wait_is_known_with_whom_it_waits_for_and_for_how_long() -> None:
    activity = Activity()
    with activity.doing("step 7"), activity.waiting("a message", (2,)):
        time.sleep(0.05)
        sight = activity.look()
        assert (sight.doing, sight.waits_for, sight.peers) == ("step 7", "a message", (2,))
        assert 0.05 <= sight.for_s < 5 and 0.05 <= activity.waited_s(time.monotonic()) < 5
        activity.mark()
        assert activity.waited_s(time.monotonic()) < 0.05, "another thread of it gets further"
    assert activity.waited_s(time.monotonic()) == 0
    assert "test_a_wait" not in activity.look().line, "lines of the project alone are named"


def test_entering_and_leaving_are_marks() -> None:
    activity = Activity()
    marks = [activity.last_mark_s]
    with activity.doing("a"):
        marks.append(activity.last_mark_s)
        time.sleep(0.002)
    marks.append(activity.last_mark_s)
    assert marks[0] <= marks[1] < marks[2]


def test_who_waits_for_a_thread_of_its_own_does_what_that_one_does() -> None:
    activity, release, inside = Activity(), threading.Event(), threading.Event()

    def reduce() -> None:
        with activity.doing("1REDUCE"), activity.waiting("an all-reduce over dp", (1, 3)):
            inside.set()
            release.wait(10)

    idle, beside = Background("reductions"), Background("reductions")
    # A thread of the same name that has nothing to do.
    idle.submit(lambda: activity.stack()).result()
    future = beside.submit(reduce)
    assert inside.wait(10)
    with activity.doing("step 7"), activity.waiting("its reductions", thread="reductions"):
        sight = activity.look()
    assert (sight.doing, sight.waits_for, sight.peers) == ("step 7, 1REDUCE", "an all-reduce over dp", (1, 3))
    release.set()
    future.result()
    with activity.doing("step 7"), activity.waiting("its reductions", thread="reductions"):
        assert activity.look().waits_for == "", "it waits for nobody else"
    for each in (idle, beside):
        each.close()


def test_only_what_makes_no_marks_itself_counts_its_computing() -> None:
    activity = Activity()
    assert activity.computes, "what has no name"
    with activity.doing("step 7"):
        assert not activity.computes
    with activity.doing("loading", computes=True), activity.doing("pruning"):
        assert activity.computes
        with activity.waiting("a barrier", (0, 1)):
            assert not activity.computes


def test_on_a_gpu_anything_may_hide_a_wait() -> None:
    activity = Activity(asynchronous=True)
    with activity.doing("1B3"):
        time.sleep(0.02)
        assert activity.waited_s(time.monotonic()) >= 0.02
    with activity.doing("loading", computes=True):
        time.sleep(0.02)
        assert activity.waited_s(time.monotonic()) == 0
