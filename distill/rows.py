"""The rows of a run: to train on, to calibrate with, and to judge by.

Decides that rank 0 reads and tokenises while the others wait, who then open its rows; on a machine with a cache of its own they
are checked, or made, there. All sources of a mixture share what is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from distill.checksums import drop_if_damaged
from distill.config import Config, Data
from distill.corpus import skipped_line
from distill.data import MicroBatch, Rows, load_rows, spread_microbatches
from distill.held_out import Part
from distill.loading import first_rank_does
from distill.pretrained import load_tokenizer
from distill.stream import Beginning, Stream
from parallel.mesh import Mesh


@dataclass(frozen=True)
class HeldOut:
    """The rows to judge by."""

    rows: Rows

    def microbatches(self, config: Config, mesh: Mesh, *, most: int | None = None) -> list[MicroBatch]:
        """Return this replica's micro-batches, of `most` rows at most if it is given."""
        num_rows = config.evaluate.rows if most is None else min(config.evaluate.rows, most)
        return _share(self.rows, num_rows, config, mesh)


@dataclass(frozen=True)
class Corpus:
    """The rows to train on, calibrate with and judge by."""

    train: Stream
    held_out: HeldOut
    calibrating: Rows | Beginning
    """What scores are measured on: rows in the order of the text, or of the mixture."""

    def calibration(self, config: Config, mesh: Mesh) -> list[MicroBatch]:
        """Return this replica's calibration micro-batches."""
        return _share(self.calibrating, config.student.prune.calibration_rows, config, mesh)


def _share(rows: Rows | Beginning, num_rows: int, config: Config, mesh: Mesh) -> list[MicroBatch]:
    """Return this replica's share of `num_rows` rows, or of all."""
    batches = spread_microbatches(
        rows,
        microbatch_size=config.train.microbatch_size,
        num_rows=min(num_rows, len(rows)),
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
    )
    return [batch.to(mesh.device) for batch in batches]


def load_corpus(config: Config, mesh: Mesh, tokenizer_folder: Path) -> Corpus:
    """Tokenise the corpus on rank 0 (or find it in the cache) and open it on every rank.

    Raises:
        ConfigError: no usable text.
    Collectives: broadcasts over the world.
    """
    data = config.data
    wanted: list[tuple[Part, int | None]] = [("held_out", None)]
    if data.weights is None:
        wanted.append(("train", None))
    else:
        wanted += [("train", source) for source, weight in enumerate(data.weights) if weight]
    judging, *sources = _load(config, mesh, tokenizer_folder, wanted)
    held_out = HeldOut(judging)
    if data.weights is None:
        return Corpus(Stream(sources, None, seed=config.train.seed), held_out, sources[0])
    opened = iter(sources)
    every = [next(opened) if weight else None for weight in data.weights]
    stream = Stream(every, data.weights, seed=config.train.seed)
    return Corpus(stream, held_out, Beginning(stream, stream.num_rows))


def load_held_out(config: Config, mesh: Mesh, tokenizer_folder: Path) -> HeldOut:
    """Do the same as `load_corpus` for what is judged by alone."""
    (judging,) = _load(config, mesh, tokenizer_folder, [("held_out", None)])
    return HeldOut(judging)


def _load(
    config: Config, mesh: Mesh, tokenizer_folder: Path, wanted: Sequence[tuple[Part, int | None]]
) -> list[Rows]:
    """Return the rows of each part and source of the text. Collectives: broadcasts over the world."""
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=config.teacher.trust_remote_code)
    data = config.data

    def rows(part: Part, source: int | None, *, show_progress: bool) -> Rows:
        return load_rows(
            data,
            tokenizer,
            part=part,
            cache_dir=Path(data.cache_dir) / "corpora",
            source=source,
            show_progress=show_progress,
        )

    made = first_rank_does(mesh, lambda: [_place(rows(*each, show_progress=True)) for each in wanted])
    return [
        _opened(place, partial(rows, *each, show_progress=False))
        for each, place in zip(wanted, made, strict=True)
    ]


class _Place(NamedTuple):
    """What another rank opens rows by."""

    folder: Path
    stamp: tuple[int, int] | None
    pad_token_id: int


def _place(rows: Rows) -> _Place:
    return _Place(rows.folder, _stamp(rows.folder), rows.pad_token_id)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from one at the same place on another machine's disk; None where there is none."""
    if not folder.is_dir():
        return None
    found = folder.stat()
    return found.st_ino, found.st_mtime_ns


def _opened(place: _Place, make: Callable[[], Rows]) -> Rows:
    """Return the rows that the first rank has checked; of a cache of this machine's own, those that are sound there."""
    if _stamp(place.folder) != place.stamp:
        drop_if_damaged(place.folder, "the text is tokenised again")
        if not place.folder.is_dir():
            return make()
    return Rows(place.folder, pad_token_id=place.pad_token_id)


def tell_text(corpus: Corpus, data: Data) -> None:
    """Say which files are left out, and if what is held out is far from the share asked for.

    So it is with few documents of very different lengths. Of a mixture's share nothing is said: what is held out is of all its
    sources, and those without a weight are not counted.
    """
    if line := skipped_line(data):
        print(line, flush=True)
    if data.weights is not None:
        return
    held_out = corpus.held_out.rows.num_tokens
    whole = held_out + corpus.calibrating.num_tokens
    share, fraction = held_out / whole, data.held_out_fraction
    if not fraction / 2 <= share <= fraction * 2:
        print(
            f"warning: {held_out:,} of {whole:,} tokens are held out ({share:.2%}), data.held_out_fraction={fraction:g}: "
            "documents are held out whole; cut long ones into several",
            flush=True,
        )
