"""Ranks that meet, once or again after a restart, and those that do not come."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.meeting import Absent, meet
from tests.launch.shared_store import SharedStore
from tests.pace import slowness

PLACES = ["rank 0", "rank 1", "rank 2"]
TIMEOUT_S = 10.0 * slowness()


def _meet(store: SharedStore, ranks: list[int], *, timeout_s: float = TIMEOUT_S, late: int = -1) -> list[str]:
    def come(rank: int) -> str:
        time.sleep(0.2 if rank == late else 0)
        return meet(store, PLACES, rank=rank, timeout_s=timeout_s)

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(come, ranks))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_agree_on_a_new_name_at_every_start(late: int) -> None:
    store = SharedStore()
    names = [_meet(store, [0, 1, 2], late=late) for _ in range(3)]
    assert all(len(set(each)) == 1 for each in names) and len({each[0] for each in names}) == 3


def test_a_start_that_came_to_nothing_is_not_taken_for_this_one() -> None:
    """Ranks 0 and 1 are ended before rank 2 comes, and start again."""
    store = SharedStore()
    stopped = threading.Event()

    def give_up(rank: int) -> None:
        with pytest.raises(SystemExit) as ended:
            meet(store, PLACES, rank=rank, timeout_s=TIMEOUT_S, stopped=stopped.is_set)
        assert ended.value.code == 0

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(give_up, rank) for rank in (0, 1)]
        time.sleep(0.2)
        stopped.set()
        for each in waiting:
            each.result()
    assert len(set(_meet(store, [0, 1, 2], late=0))) == 1


def test_who_does_not_come_is_told_by_the_first_rank_alone() -> None:
    store = SharedStore()
    words = []
    for ranks in ([0, 1], [0]):
        with ThreadPoolExecutor(2) as pool:
            met = [pool.submit(_meet, store, [rank], timeout_s=0.5) for rank in ranks]
        words += [str(each.exception()) for each in met]
        assert all(isinstance(each.exception(), Absent) for each in met)
    assert words[0].startswith("rank 2 has not come within train.timeout_s=0.5 s") and words[1] == ""
    assert words[2].startswith("rank 1, rank 2 have not come within")
    # All are started again, the others a little before the first: what they find was not said to them.
    assert len(set(_meet(store, [0, 1, 2], late=0))) == 1


def test_who_comes_while_the_absent_are_told_says_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store, at_last = SharedStore(), threading.Event()
    original = store.set

    def wait_for_a_greeting(key: str, value: str) -> None:
        name, _, what = key.partition("/")
        if what == "absent":
            at_last.set()
            while not store.check([f"{name}/1"]):
                time.sleep(0.01)
        original(key, value)

    monkeypatch.setattr(store, "set", wait_for_a_greeting)

    def come_late() -> str:
        at_last.wait(TIMEOUT_S)
        return meet(store, PLACES[:2], rank=1, timeout_s=0.5)

    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(come_late)
        first = pool.submit(meet, store, PLACES[:2], rank=0, timeout_s=0.2)
    assert str(first.exception()).startswith("rank 1 has not come within")
    assert isinstance(late.exception(), Absent) and str(late.exception()) == ""


def test_a_first_rank_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.meeting._LATER_S", 0.1)
    with pytest.raises(Absent, match="rank 0 has not come"):
        meet(SharedStore(), PLACES, rank=1, timeout_s=0.2)
