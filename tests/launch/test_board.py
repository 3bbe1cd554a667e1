"""What ranks tell each other through the store."""

from __future__ import annotations

from launch.board import Board
from parallel.activity import Sight
from tests.launch.shared_store import SharedStore

SIGHT = Sight("step 7, 1B3", "a message", (2, 3), 1.5, "distill.step:200 _backward")


def test_signs_of_life_and_what_was_seen() -> None:
    store = SharedStore()
    boards = [Board(store, ["rank 0", "rank 1", "rank 2"], rank=rank) for rank in range(3)]
    assert [boards[0].beat(SIGHT, moved=True), boards[1].beat(SIGHT, moved=False)] == [1, 1]
    assert boards[0].beat(SIGHT, moved=True) == 2
    reports = boards[0].reports(SIGHT, watch_s=0)
    assert [each.place for each in reports.values()] == ["rank 0", "rank 1", "rank 2"]
    assert [each.sight for each in reports.values()] == [SIGHT, SIGHT, None]
    assert [each.alive for each in reports.values()] == [True, False, False]


def test_a_rank_that_beats_meanwhile_is_alive() -> None:
    store = SharedStore()
    boards = [Board(store, ["rank 0", "rank 1"], rank=rank) for rank in range(2)]
    boards[1].beat(SIGHT, moved=True)
    store.before_check(3, lambda: boards[1].beat(SIGHT, moved=False))
    assert boards[0].reports(SIGHT, watch_s=0)[1].alive


def test_one_rank_has_the_word_and_its_code_is_for_all() -> None:
    store = SharedStore()
    boards = [Board(store, ["rank 0", "rank 1"], rank=rank) for rank in range(2)]
    assert [board.has_the_word() for board in boards] == [True, False]
    assert boards[1].end_code() is None
    boards[0].end(2)
    assert boards[1].end_code() == 2
