"""Cut documents into pieces, pack the pieces into rows, keep the rows on disk.

Decides, all of it:
- A piece is at most one row long. Text longer than that is cut at the best boundary that fits (paragraph, then sentence, then
  word; `split_sentences`) or at exact token counts. Nothing is lost: the pieces of a document join to its text.
- The space between two sentences goes with the second, as byte-level vocabularies expect it; a cut leaves no lone space behind.
- EOS ends each document, and only its last piece, so that a model learns to stop there and nowhere else. Where the
  tokenizer itself puts BOS in front of a text, every piece begins with it: a piece is seen without what came before.
- Pieces are never cut to fill a row (best fit, longest first); the rest of a row is padding.
- Positions restart at 0 at each piece and at the padding: this is what tells transformers' masks (without a cache) that
  tokens of different pieces must not see each other. The last token of a piece has no target.

Rows are cached under a hash of everything that they depend on, written to a temporary folder and renamed when whole, as
plain .npy arrays that are memory-mapped and checked by their sums. Assumes a fast (tokenizer.json) tokenizer. Holds one corpus' tokens in memory, at
4 bytes each, while it packs.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distill.atomic import build_once
from distill.checksums import drop_if_damaged, write_sums
from distill.config import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
# Counts changes of the rules above or of the files below.
_FORMAT = 2


class Row(NamedTuple):
    """One row; each array is [S] int64, labels are shifted: labels[s] is what position s must predict, or IGNORE."""

    input_ids_S: NDArray[np.int64]
    position_ids_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]


class Rows:
    """Packed rows of one corpus, read from disk as they are asked for."""

    def __init__(self, folder: Path, *, pad_token_id: int) -> None:
        self.folder = folder
        self.pad_token_id = pad_token_id
        self._input_ids_RS = np.load(folder / "input_ids.npy", mmap_mode="r")
        self._lengths_P = np.load(folder / "lengths.npy", mmap_mode="r")
        self._first_piece = np.load(folder / "first_piece.npy")
        self.seq_len = int(self._input_ids_RS.shape[1])
        self.num_tokens = int(self._lengths_P.sum())
        """Real tokens, padding not counted."""

    def __len__(self) -> int:
        return len(self._input_ids_RS)

    def piece_lengths(self, index: int) -> list[int]:
        """Return the lengths in tokens of the pieces in a row, in order."""
        return self._lengths_P[self._first_piece[index] : self._first_piece[index + 1]].tolist()

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        input_ids_S = self._input_ids_RS[index].astype(np.int64)
        position_ids_S = np.empty_like(input_ids_S)
        labels_S = np.full_like(input_ids_S, IGNORE)
        start = 0
        for length in self.piece_lengths(index):
            end = start + length
            position_ids_S[start:end] = np.arange(length)
            labels_S[start : end - 1] = input_ids_S[start + 1 : end]
            start = end
        position_ids_S[start:] = np.arange(self.seq_len - start)
        return Row(input_ids_S, position_ids_S, labels_S)


@dataclass(frozen=True)
class Cutter:
    """A tokenizer together with the rules by which documents become pieces."""

    fast: Tokenizer
    eos_token_id: int
    bos_token_id: int | None
    pad_token_id: int
    seq_len: int
    split_sentences: bool

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, split_sentences: bool) -> Cutter:
        """Read from a tokenizer what cutting needs.

        Raises:
            ConfigError: no fast tokenizer, no EOS, or rows too short to hold a piece.
        """
        from tokenizers import Tokenizer

        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            lack = "a fast form (tokenizer.json)" if not tokenizer.is_fast else "an eos_token"
            raise ConfigError(
                f"teacher.model: its tokenizer lacks {lack}, which packing documents into rows needs"
            )
        if seq_len < 8:
            raise ConfigError(f"data.seq_len={seq_len} is too short to hold a piece of text; use at least 8")
        # A copy, because a saved tokenizer may cut or pad on its own, and the caller's must stay as it is.
        fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        fast.no_truncation()
        fast.no_padding()
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(fast, tokenizer.eos_token_id, bos if adds_bos else None, pad, seq_len, split_sentences)

    def fingerprint(self) -> bytes:
        """Return what rows depend on besides the texts."""
        settings = (
            _FORMAT,
            self.seq_len,
            self.split_sentences,
            self.eos_token_id,
            self.bos_token_id,
            self.pad_token_id,
        )
        return hashlib.sha256(f"{settings}{self.fast.to_str()}".encode()).digest()

    def pieces(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of the pieces of each document, in order."""
        from semantic_text_splitter import TextSplitter

        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        room = self.seq_len - len(begin)
        # One token less for EOS, one for the space that moves to the next chunk.
        splitter = TextSplitter.from_huggingface_tokenizer(self.fast, room - 2, trim=False)
        for text in texts:
            chunks = _move_spaces(splitter.chunks(text)) if self.split_sentences else [text]
            encodings = self.fast.encode_batch(chunks, add_special_tokens=False)
            for chunk, encoding in enumerate(encodings):
                token_ids = encoding.ids + ([self.eos_token_id] if chunk == len(encodings) - 1 else [])
                for window in _windows(token_ids, room):
                    yield begin + window


def build_rows(
    texts: Sequence[str], cutter: Cutter, *, cache_dir: Path, show_progress: bool = False, label: str = "text"
) -> Rows:
    """Return the packed rows of some documents, from the cache if they were ever built.

    Args:
        texts: the documents.
        cutter: tokenizer and rules.
        cache_dir: a folder for each corpus is made in it; processes may race for the same one.
        show_progress: show a bar over the documents while they are tokenised.
        label: what the bar calls them.
    """
    from tqdm import tqdm

    key = hashlib.sha256(cutter.fingerprint())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    folder = cache_dir / "rows" / key.hexdigest()[:24]
    rows = built_rows(folder, cutter)
    if rows is None:
        shown = tqdm(texts, desc=f"tokenise {label}", unit=" documents", disable=not show_progress)
        build_once(folder, lambda temporary: _write(temporary, cutter, shown))
        rows = Rows(folder, pad_token_id=cutter.pad_token_id)
    return rows


def built_rows(folder: Path, cutter: Cutter) -> Rows | None:
    """Return the rows in a folder of the cache, if they are there and whole; what is damaged is removed."""
    drop_if_damaged(folder, "the text is tokenised again")
    return Rows(folder, pad_token_id=cutter.pad_token_id) if folder.is_dir() else None


def best_fit(lengths_P: NDArray[np.integer], seq_len: int) -> NDArray[np.int64]:
    """Assign pieces to rows: longest first, each into the row with the least space that still holds it.

    Args:
        lengths_P: [P] tokens of each piece, 1 to `seq_len`.
        seq_len: tokens of a row.
    Returns:
        [P] the row of each piece, rows counted from 0 in the order in which they were opened.
    Source: best-fit decreasing bin packing (Johnson 1973): at most 11/9 of the fewest rows.
    """
    row_of_piece = np.empty(len(lengths_P), dtype=np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(seq_len)]
    # Bit s is set while some row has s tokens of space: the best fit is the lowest set bit at or above the length.
    spaces = 0
    num_rows = 0
    for piece in np.argsort(-lengths_P.astype(np.int64), kind="stable").tolist():
        length = int(lengths_P[piece])
        assert 0 < length <= seq_len, f"a piece of {length} tokens for rows of {seq_len}"
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            row, space = num_rows, seq_len
            num_rows += 1
        row_of_piece[piece] = row
        if left := space - length:
            rows_by_space[left].append(row)
            spaces |= 1 << left
    return row_of_piece


def _write(folder: Path, cutter: Cutter, texts: Iterable[str]) -> None:
    """Tokenise and pack documents into the new folder of a corpus."""
    tokens, lengths = array("i"), array("i")
    for piece in cutter.pieces(texts):
        tokens.extend(piece)
        lengths.append(len(piece))
    folder.mkdir()
    _write_arrays(folder, np.asarray(tokens, np.int32), np.asarray(lengths, np.int32), cutter)


def _write_arrays(
    folder: Path, tokens: NDArray[np.int32], lengths_P: NDArray[np.int32], cutter: Cutter
) -> None:
    starts_P = np.cumsum(lengths_P, dtype=np.int64) - lengths_P
    row_of_piece = best_fit(lengths_P, cutter.seq_len)
    num_rows = int(row_of_piece.max(initial=-1)) + 1
    order = np.argsort(row_of_piece, kind="stable")
    first_piece = np.searchsorted(row_of_piece[order], np.arange(num_rows + 1))
    shape = (num_rows, cutter.seq_len)
    input_ids_RS = np.lib.format.open_memmap(folder / "input_ids.npy", mode="w+", dtype=np.int32, shape=shape)
    for row in range(num_rows):
        position = 0
        for piece in order[first_piece[row] : first_piece[row + 1]]:
            length = lengths_P[piece]
            input_ids_RS[row, position : position + length] = tokens[
                starts_P[piece] : starts_P[piece] + length
            ]
            position += length
        input_ids_RS[row, position:] = cutter.pad_token_id
    input_ids_RS.flush()
    np.save(folder / "lengths.npy", lengths_P[order])
    np.save(folder / "first_piece.npy", first_piece)
    write_sums(folder)


def _move_spaces(chunks: list[str]) -> list[str]:
    """Give the spaces at the end of each chunk to the next one; chunks of nothing else are merged into it."""
    moved: list[str] = []
    carried = ""
    for chunk in chunks:
        whole = carried + chunk
        body = whole.rstrip(" ")
        carried = whole[len(body) :]
        if body:
            moved.append(body)
    if moved:
        moved[-1] += carried
    return moved


def _windows(token_ids: list[int], room: int) -> Iterator[list[int]]:
    """Yield windows of at most `room` tokens; the last one has two or more, so that EOS alone is never a piece."""
    start = 0
    while len(token_ids) - start > room:
        length = room - 1 if len(token_ids) - start == room + 1 else room
        yield token_ids[start : start + length]
        start += length
    yield token_ids[start:]
