"""Rows by position: every source in epochs of its own, mixed in exact shares, and nothing to remember."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from distill.config import ConfigError
from distill.stream import BLOCK, Beginning, Stream, quotas


class Numbered(list):
    """Rows as a stream takes them: each says which source it is of and which of its rows."""

    seq_len, pad_token_id = 8, 0


def source(name: str, count: int) -> Any:
    return Numbered((name, index) for index in range(count))


def rows(stream: Stream, positions: range) -> list[Any]:
    return [stream.row(position) for position in positions]


def test_one_source_runs_through_epochs() -> None:
    seen = rows(Stream([source("a", 7)], None, seed=3), range(21))
    epochs = [seen[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("weights", [[3, 1], [0.25, 0.5, 0.25], [1, 1, 1]])
def test_shares_are_exact_in_every_block_and_each_source_keeps_its_epochs(weights: list[float]) -> None:
    sources = [source(name, count) for name, count in zip("abc", (97, 10, 1500), strict=False)][
        : len(weights)
    ]
    stream = Stream(sources, weights, seed=5)
    seen = rows(stream, range(3 * BLOCK))
    wanted = {"abc"[index]: count for index, count in enumerate(quotas(weights, BLOCK))}
    blocks = [seen[start : start + BLOCK] for start in range(0, 3 * BLOCK, BLOCK)]
    for block in blocks:
        assert Counter(name for name, _ in block) == wanted
    assert [name for name, _ in blocks[0]] != [name for name, _ in blocks[1]]
    for name, rows_of in zip("abc", sources, strict=False):
        own = [index for each, index in seen if each == name]
        for start in range(0, len(own) - len(rows_of) + 1, len(rows_of)):
            assert sorted(own[start : start + len(rows_of)]) == list(range(len(rows_of)))


def test_a_position_is_all_there_is_to_know() -> None:
    sources = [source("a", 5), source("b", 9)]
    positions = [2500, 3, 999_999, 0, 1000, 3]
    stream = Stream(sources, [2, 1], seed=1)
    assert [stream.row(each) for each in positions] == [
        Stream(sources, [2, 1], seed=1).row(each) for each in positions
    ]
    assert rows(Stream(sources, [2, 1], seed=2), range(50)) != rows(stream, range(50))


@pytest.mark.parametrize("weights", [None, [2, 1, 1]])
def test_a_later_round_goes_on_in_each_source(weights: list[float] | None) -> None:
    sources = [source("a", 400), source("b", 300), source("c", 900)][: len(weights or "1")]
    stream = Stream(sources, weights, seed=4)
    first, read = rows(stream, range(150)), stream.read(150)
    assert read == {
        name: 8 * sum(letter == each for each, _ in first)
        for name, letter in zip(["whole"] if weights is None else "012", "abc", strict=False)
    }
    later = stream.after(read)
    second = rows(later, range(150))
    assert not {*first} & {*second}, "no row comes twice before all have come"
    assert Counter(name for name, _ in second) == Counter(name for name, _ in first)
    both = later.read(150)
    assert both == {name: 2 * tokens for name, tokens in read.items()}
    assert rows(stream.after(both), range(9)) == rows(later.after(both), range(9))


def test_shares_that_change_lose_and_repeat_no_row() -> None:
    sources = [source("a", 400), source("b", 700), source("c", 400)]
    shares = [[1, 1, 0], [0, 1, 1], [1, 2, 1]]
    read: dict[str, int] = {}
    seen: Counter[Any] = Counter()
    for weights in shares:
        held = [each if weight else None for each, weight in zip(sources, weights, strict=True)]
        stream = Stream(held, weights, seed=2).after(read)
        seen.update(rows(stream, range(300)))
        read = {**read, **stream.read(300)}
    assert sum(seen.values()) == 900 and set(seen.values()) == {1}
    assert [8 * sum(name == each for name, _ in seen) for each in "abc"] == [read[each] for each in "012"]
    whole = Stream([source("a", 3)], None, seed=2)
    assert whole.after(read).read(0) == {"whole": 0}, "the sources together are packed otherwise"


def test_rows_of_another_length_go_on_at_the_same_share() -> None:
    longer = source("a", 50)
    longer.seq_len = 16
    assert Stream([longer], None, seed=1).after({"whole": 8 * 21}).read(3) == {"whole": 16 * (10 + 3)}


def test_what_others_ask_of_a_stream() -> None:
    stream = Stream([source("a", 5), source("b", 9)], [1, 1], seed=1)
    beginning = Beginning(stream, 4)
    assert (stream.num_rows, stream.seq_len, stream.pad_token_id) == (14, 8, 0)
    assert [beginning[index] for index in range(len(beginning))] == rows(stream, range(4))
    assert (beginning.seq_len, beginning.pad_token_id) == (8, 0)


def test_a_source_that_would_never_be_read_is_refused() -> None:
    sources = [source("a", 5), source("b", 9)]
    with pytest.raises(
        ConfigError, match=r"data\.weights: a source of 1 in 2001 would get none of 1000 rows"
    ):
        Stream(sources, [1, 2000], seed=1)
    Stream(sources, [1, 999], seed=1)
    Stream(sources, [0, 1], seed=1)


def test_quotas_add_up() -> None:
    assert (
        quotas([1, 1, 1], 10) == [4, 3, 3] and quotas([0.2, 0.8], 5) == [1, 4] and quotas([5, 0], 3) == [3, 0]
    )
