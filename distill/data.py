"""Serve packed rows of text as micro-batches, as a pure function of the step.

Decides: which rows make up the global batch of a step, and who gets which of them. Step s of a round takes positions s*G to s*G + G - 1
of its endless stream of rows (`distill.stream`). So resuming needs the step number only, looking ahead is free, and the tokens of a step do not depend on the mesh: the batch is cut into contiguous
shares over dp, each share into micro-batches, and all pp and tp ranks of a replica read the same rows. Reading a
corpus is `distill.corpus`, parting it `distill.held_out`, cutting and packing `distill.packing`.

Letters: B rows of a micro-batch, S positions of a row, R rows of a corpus, G rows of a global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill.config import ConfigError, Data
from distill.corpus import read_documents
from distill.held_out import Part, select_part
from distill.packing import IGNORE, Cutter, Row, Rows, build_rows
from distill.row_index import RowIndex
from distill.stream import Beginning, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE",
    "Batches",
    "MicroBatch",
    "Row",
    "Rows",
    "Window",
    "load_rows",
    "num_valid_tokens",
    "spread_microbatches",
]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one pipeline micro-batch holds, the same on every rank of a replica; all [B, S] int64.

    Positions restart at 0 at each piece of text and at padding. Labels are already shifted: labels[b, s] is the token that
    position s must predict, or IGNORE (last token of a piece, padding).
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    labels_BS: Tensor

    @property
    def num_valid_tokens(self) -> int:
        """Positions that have a label."""
        return int((self.labels_BS != IGNORE).sum())

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return this micro-batch on a device."""
        return MicroBatch(
            self.input_ids_BS.to(device), self.position_ids_BS.to(device), self.labels_BS.to(device)
        )


def num_valid_tokens(microbatches: Iterable[MicroBatch]) -> int:
    """Return the number of labels in all micro-batches together."""
    return sum(microbatch.num_valid_tokens for microbatch in microbatches)


def load_rows(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: Part,
    cache_dir: Path,
    source: int | None = None,
    show_progress: bool = False,
) -> Rows:
    """Return one part of a corpus as packed rows; text is read and tokenised on first use only.

    Args:
        data: the `data` group of the configuration.
        tokenizer: of the teacher; fast, with an EOS token.
        part: "train" or "held_out"; the two share no document.
        cache_dir: where rows and Arrow files are kept; every rank may call, a run best lets one rank be first.
        source: index of the one entry of `data.path` whose documents to take; what is held out does not depend on it.
        show_progress: show bars while reading and tokenising.
    Raises:
        ConfigError: whatever is wrong with `data.*`, or the part holds no document.
    """
    cutter = Cutter.create(tokenizer, seq_len=data.seq_len, split_sentences=data.split_sentences)
    index = RowIndex(data, cutter, part=part, source=source, cache_dir=cache_dir)
    found = index.find()
    if found is not None:
        return found
    whole = read_documents(data, cache_dir=cache_dir, show_progress=show_progress)
    documents = select_part(whole, part=part, held_out_fraction=data.held_out_fraction)
    if source is not None:
        documents = documents.select([i for i, each in enumerate(documents["source"]) if each == source])
    if not len(documents):
        raise ConfigError(
            f"data.held_out_fraction={data.held_out_fraction} leaves no document of data.path={data.path} for the "
            f"{part} part; use a fraction above 0 and below 1, such as 0.1"
        )
    label = f"{part} text"
    rows = build_rows(
        documents["text"], cutter, cache_dir=cache_dir, show_progress=show_progress, label=label
    )
    index.remember(rows)
    return rows


class Batches:
    """The micro-batches of one data-parallel rank, for any step."""

    def __init__(
        self,
        stream: Stream,
        *,
        global_batch_size: int,
        microbatch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Share the rows of each step out.

        Args:
            stream: of the training rows, R of them; step 0 begins it.
            global_batch_size: G, rows in one step over the whole mesh.
            microbatch_size: B, rows in one micro-batch.
            dp_rank: which share of each global batch.
            dp_size: number of shares.
        Raises:
            ConfigError: R < G, or G is no multiple of dp * B.
        """
        if (num_rows := stream.num_rows) < global_batch_size:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is more than the {num_rows} rows of {stream.seq_len} tokens "
                f"that data.path gives; use at most {num_rows}, a smaller data.seq_len, or more text"
            )
        if global_batch_size % (dp_size * microbatch_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is not a multiple of mesh.dp={dp_size} times "
                f"train.microbatch_size={microbatch_size}; use a multiple of {dp_size * microbatch_size}"
            )
        self.stream = stream
        self.global_batch_size = global_batch_size
        self.microbatch_size = microbatch_size
        self.num_microbatches = global_batch_size // (dp_size * microbatch_size)
        self._share_start = dp_rank * (global_batch_size // dp_size)

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step (counted from 0), in order; depends on nothing but the arguments.

        Returns:
            `num_microbatches` micro-batches of [B, S].
        """
        start = step * self.global_batch_size + self._share_start
        size = self.microbatch_size
        return [
            _stack([self.stream.row(start + m * size + i) for i in range(size)])
            for m in range(self.num_microbatches)
        ]


class Window:
    """The micro-batches of a few steps on a device: from the one that runs to as far as someone looks ahead.

    Args:
        batches: the micro-batches of an optimizer step, such as `Batches.step`.
        device: where they are needed.
    """

    def __init__(self, batches: Callable[[int], Sequence[MicroBatch]], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._steps: dict[int, list[MicroBatch]] = {}

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of an optimizer step."""
        if step not in self._steps:
            self._steps[step] = [batch.to(self._device) for batch in self._batches(step)]
        return self._steps[step]

    def forget_before(self, step: int) -> None:
        """Let go of the steps that are done."""
        self._steps = {number: batches for number, batches in self._steps.items() if number >= step}


def spread_microbatches(
    rows: Rows | Beginning, *, microbatch_size: int, num_rows: int, dp_rank: int = 0, dp_size: int = 1
) -> list[MicroBatch]:
    """Return this rank's share of rows taken evenly from all of them, in their order, for evaluation and calibration.

    Evenly, because neighbouring rows come from one document and neighbouring documents from one source. Micro-batches are
    dealt out in turn: micro-batch m of rank r holds rows (m*dp + r)*B and following of those taken. Where rows run out,
    micro-batches are filled up with padding rows without labels, so that every rank has equally many of the same shape.

    Args:
        rows: R rows.
        microbatch_size: B.
        num_rows: how many rows to use; all R if there are fewer.
        dp_rank: which share.
        dp_size: number of shares.
    """
    used = min(num_rows, len(rows))
    taken = [place * len(rows) // used for place in range(used)]
    per_round = microbatch_size * dp_size
    blank = _blank_row(rows)
    starts = range(dp_rank * microbatch_size, -(-used // per_round) * per_round, per_round)
    return [
        _stack([rows[taken[i]] if i < used else blank for i in range(s, s + microbatch_size)]) for s in starts
    ]


def _blank_row(rows: Rows | Beginning) -> Row:
    positions = np.arange(rows.seq_len)
    return Row(np.full_like(positions, rows.pad_token_id), positions, np.full_like(positions, IGNORE))


def _stack(rows: list[Row]) -> MicroBatch:
    return MicroBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))
