"""The rows of a run: to train on, to calibrate with, and to judge by.

Decides that rank 0 reads and tokenises while the others wait, who then open its rows, and that all sources of a mixture share
what is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import Config
from distill.corpus import skipped_line
from distill.data import MicroBatch, Rows, load_rows, spread_microbatches
from distill.loading import first_rank_does
from distill.pretrained import load_tokenizer
from distill.stream import Beginning, Stream
from parallel.mesh import Mesh


@dataclass(frozen=True)
class Corpus:
    """The rows to train on, calibrate with and judge by."""

    train: Stream
    held_out: Rows
    calibrating: Rows | Beginning
    """What scores are measured on: rows in the order of the text, or of the mixture."""

    def calibration(self, config: Config, mesh: Mesh) -> list[MicroBatch]:
        """Return this replica's calibration micro-batches."""
        return self._sequence(self.calibrating, config.student.prune.calibration_rows, config, mesh)

    def judging(self, config: Config, mesh: Mesh, *, most: int | None = None) -> list[MicroBatch]:
        """Return this replica's held-out micro-batches, of `most` rows at most if it is given."""
        rows = config.evaluate.rows if most is None else min(config.evaluate.rows, most)
        return self._sequence(self.held_out, rows, config, mesh)

    @staticmethod
    def _sequence(rows: Rows | Beginning, num_rows: int, config: Config, mesh: Mesh) -> list[MicroBatch]:
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
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=config.teacher.trust_remote_code)
    data = config.data

    def rows(part: str, source: int | None, *, show_progress: bool) -> Rows:
        return load_rows(
            data,
            tokenizer,
            part=part,
            cache_dir=Path(data.cache_dir) / "corpora",
            source=source,
            show_progress=show_progress,
        )

    wanted: list[tuple[str, int | None]] = [("held_out", None)]
    if data.weights is None:
        wanted.append(("train", None))
    else:
        wanted += [("train", source) for source, weight in enumerate(data.weights) if weight]
    made = first_rank_does(mesh, lambda: [_place(rows(*each, show_progress=True)) for each in wanted])
    # Opened where they are; a machine with a cache of its own makes its own.
    held_out, *sources = (
        Rows(folder, pad_token_id=pad) if folder.is_dir() else rows(*each, show_progress=False)
        for each, (folder, pad) in zip(wanted, made, strict=True)
    )
    if mesh.world.is_first:
        if line := skipped_line(data):
            print(line, flush=True)
        _tell_share(held_out, sources, data.held_out_fraction)
    if data.weights is None:
        return Corpus(Stream(sources, None, seed=config.train.seed), held_out, sources[0])
    stream = Stream(sources, [weight for weight in data.weights if weight], seed=config.train.seed)
    return Corpus(stream, held_out, Beginning(stream, stream.num_rows))


def _place(rows: Rows) -> tuple[Path, int]:
    """Return what another rank opens rows by."""
    return rows.folder, rows.pad_token_id


def _tell_share(held_out: Rows, sources: Sequence[Rows], fraction: float) -> None:
    """Say so if what is held out is far from the share asked for, as with few documents of very different lengths."""
    whole = held_out.num_tokens + sum(rows.num_tokens for rows in sources)
    share = held_out.num_tokens / whole
    if not fraction / 2 <= share <= fraction * 2:
        print(
            f"warning: {held_out.num_tokens:,} of {whole:,} tokens are held out ({share:.2%}), data.held_out_fraction="
            f"{fraction:g}: documents are held out whole; cut long ones into several",
            flush=True,
        )
