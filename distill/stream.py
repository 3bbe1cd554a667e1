"""The endless stream of training rows: which row stands at which position, for ever and in any order of asking.

Decides: every epoch of a source has an order of its own, drawn from the seed, and no state is kept, so that a position is
all that a run must remember within a round. Sources with weights are mixed in blocks of BLOCK positions, each with the same
number of rows of every source, in an order of its own; a source runs through its rows at its own pace. A round with other
weights goes on in each source where the rounds before have stopped. Another row length packs the text anew and in another
order: the same share of an epoch counts as read, so some of its text comes twice and some later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distill.config import ConfigError
from distill.packing import Row, Rows

BLOCK = 1000
"""Positions in which the shares of the sources are kept: to a thousandth."""
WHOLE = "whole"
"""Name of the one source without weights; others are named by their place in `data.path`."""
_MIXING = 0xFFFF
"""What the order of a block is drawn for; below it stand the orders of the sources."""


class Stream:
    """Rows by position.

    Args:
        sources: rows of each source; None for one of weight 0.
        weights: shares of the sources, any positive sum; None: there is one source.
        seed: of every order.
        read: tokens of rows read before, by source (`read`); none where a source is not named.
    Raises:
        ConfigError: a weight that is too small for a row of a block.
    """

    def __init__(
        self,
        sources: Sequence[Rows | None],
        weights: Sequence[float] | None,
        *,
        seed: int,
        read: Mapping[str, int] | None = None,
    ) -> None:
        assert weights is not None or len(sources) == 1, "several sources need weights"
        self._sources, self._weights, self._seed = sources, weights, seed
        self._names = [WHOLE] if weights is None else [str(index) for index in range(len(sources))]
        self._quotas = None if weights is None else quotas(weights, BLOCK)
        for weight, quota in zip(weights or (), self._quotas or (), strict=True):
            if weight and not quota:
                raise ConfigError(
                    f"data.weights: a source of {weight:g} in {sum(weights):g} would get none of {BLOCK} rows; give it a thousandth at "
                    "least, or 0"
                )
        # A step may straddle two epochs or blocks, and the teacher may already be in the next one.
        self._order = lru_cache(maxsize=3 * len(sources))(self._permutation)
        self._begins = [(read or {}).get(name, 0) // self.seq_len for name in self._names]
        self._mixed = lru_cache(maxsize=3)(self._mix)

    @property
    def num_rows(self) -> int:
        """Rows of the sources that are read, each once."""
        return sum(len(rows) for rows in self._read_from())

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self._read_from()[0].seq_len

    @property
    def pad_token_id(self) -> int:
        """What fills rows up."""
        return self._read_from()[0].pad_token_id

    def after(self, read: Mapping[str, int]) -> Stream:
        """Return the same stream where so many tokens of rows have been read before, by source."""
        return Stream(self._sources, self._weights, seed=self._seed, read=read)

    def read(self, num_rows: int) -> dict[str, int]:
        """Return how many tokens of rows have been read of each source after the first `num_rows`, those before included."""
        if self._quotas is None:
            counts = np.array([num_rows])
        else:
            block, place = divmod(num_rows, BLOCK)
            kinds, _ = self._mixed(block)
            counts = block * np.array(self._quotas) + np.bincount(kinds[:place], minlength=len(self._names))
        return {
            name: (begin + int(count)) * self.seq_len
            for name, begin, count in zip(self._names, self._begins, counts, strict=True)
        }

    def row(self, position: int) -> Row:
        """Return the row at a position, counted from 0."""
        source, index = 0, position
        if self._quotas is not None:
            block, place = divmod(position, BLOCK)
            kinds, ranks = self._mixed(block)
            source = int(kinds[place])
            index = block * self._quotas[source] + int(ranks[place])
        rows = self._sources[source]
        epoch, offset = divmod(self._begins[source] + index, len(rows))
        return rows[int(self._order(source, epoch)[offset])]

    def _read_from(self) -> list[Rows]:
        """Return the sources that rows are read from."""
        quotas = self._quotas or [BLOCK]
        return [rows for rows, quota in zip(self._sources, quotas, strict=True) if quota]

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        return self._generator(epoch, source).permutation(len(self._sources[source]))

    def _mix(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each position of a block, and which of the block's rows of that source it is."""
        kinds = np.repeat(np.arange(len(self._sources)), self._quotas)
        kinds = self._generator(block, _MIXING).permutation(kinds)
        ranks = np.zeros(BLOCK, dtype=np.int64)
        for source in range(len(self._sources)):
            ranks[kinds == source] = np.arange(self._quotas[source])
        return kinds, ranks

    def _generator(self, number: int, purpose: int) -> np.random.Generator:
        # Philox is keyed: the numbers are independent streams, and no generator state has to be saved.
        key = np.array([self._seed, number + (purpose << 48)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers that add up to `total` and stand to each other as the weights, as nearly as can be."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(each) for each in exact]
    # The largest remainders get what is left, of equal ones the first.
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class Beginning(Sequence[Row]):
    """The first rows of a stream, as `distill.data.spread_microbatches` takes them."""

    def __init__(self, stream: Stream, num_rows: int) -> None:
        self._stream, self._num_rows = stream, num_rows
        self.seq_len, self.pad_token_id = stream.seq_len, stream.pad_token_id

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Row:
        return self._stream.row(index)
