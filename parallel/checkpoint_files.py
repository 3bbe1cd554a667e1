"""The tensors in a checkpoint's files, whole or in slices, whichever layout wrote them.

Decides how a piece says where it belongs. Each file's header maps the names of its sharded tensors to (dim, start, stop,
length of the whole); what is not listed there is whole. A second one maps the names of those of which it has only some
entries (a replica's part) to (first entry, shape of the shard): the entries are 1-D, in the order of the flattened shard.
Files are opened lazily and slices are read from disk, so that a rank of another layout reads what it needs, and at most
the rows of a shard beside it. Knows names and slices only.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.checkpoint_manifest import CheckpointError, CheckpointOutOfReach
from parallel.hashed_files import FileRecord, write_safetensors
from parallel.layers import ShardSpec

_HEADER, _SPANS = "shards", "spans"
_FLOATS = ("F64", "F32", "BF16", "F16")


class Span(NamedTuple):
    """Some entries of a shard: so many as the tensor has, from `start` on, of the flattened `shape`."""

    start: int
    shape: tuple[int, ...]


def write_shards(
    tensors: Mapping[str, Tensor], shards: Mapping[str, ShardSpec], path: Path, spans: Mapping[str, Span] = {}
) -> FileRecord:
    """Write tensors and, for those that are shards or some entries of one, where each lies in its whole.

    Raises:
        OSError: with the file's name.
    """
    header = {name: [spec.dim, spec.start, spec.stop, spec.full] for name, spec in shards.items()}
    held = {name: [span.start, *span.shape] for name, span in spans.items()}
    return write_safetensors(tensors, path, metadata={_HEADER: json.dumps(header), _SPANS: json.dumps(held)})


class _Piece(NamedTuple):
    """A tensor in one file."""

    path: Path
    file: Any
    shard: ShardSpec | None
    span: Span | None

    @property
    def begin(self) -> int:
        """First entry of the shard that it has."""
        return self.span.start if self.span else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the shard."""
        found = tuple(self.file.get_slice(name).get_shape())
        if self.span is None:
            return found
        if len(found) != 1 or self.span.start < 0 or self.begin + found[0] > math.prod(self.span.shape):
            raise CheckpointError(f"{self.path}: {name!r} is {list(found)}, its header says {self.span}")
        return self.span.shape


class CheckpointFiles:
    """The files of a checkpoint; use it as a context manager.

    Args:
        paths: of the files; all of them, or a tensor may lack a part.
    Raises:
        CheckpointError: a file is none, or says impossible things.
        CheckpointOutOfReach: the system does not let it be read, here or later.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stack = ExitStack()
        self._pieces: defaultdict[str, list[_Piece]] = defaultdict(list)
        for path in paths:
            self._open(path)

    @property
    def names(self) -> frozenset[str]:
        """All tensors, once each."""
        return frozenset(self._pieces)

    def __enter__(self) -> Self:
        """Return the files."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close them."""
        self._stack.close()

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            metadata = file.metadata() or {}
            shards = _read_header(metadata.get(_HEADER, "{}"))
            spans = _read_spans(metadata.get(_SPANS, "{}"))
            names = set(file.keys())
            if placed := (shards.keys() | spans.keys()) - names:
                raise ValueError(f"its header places {min(placed)!r}, which is not in it")
            for name in names:
                _check_type(name, file.get_slice(name).get_dtype())
                self._pieces[name].append(_Piece(path, file, shards.get(name), spans.get(name)))
        except OSError as error:
            raise CheckpointOutOfReach(f"{path} cannot be read: {error}") from error
        except (SafetensorError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor.

        Raises:
            CheckpointError: it is not there.
        """
        pieces = self._of(name)
        shapes = {self._whole_shape(piece, name): piece.path for piece in pieces}
        if len(shapes) > 1:
            raise CheckpointError(
                f"{', '.join(map(str, shapes.values()))} disagree on the shape of {name!r}: {[*shapes]}"
            )
        _check_overlap(name, pieces)
        return next(iter(shapes))

    @staticmethod
    def _whole_shape(piece: _Piece, name: str) -> tuple[int, ...]:
        shape, shard = list(piece.shape(name)), piece.shard
        if shard is not None:
            if not shard.dim < len(shape) or shape[shard.dim] != shard.stop - shard.start:
                raise CheckpointError(f"{piece.path}: {name!r} is {shape}, its header says {shard}")
            shape[shard.dim] = shard.full
        return tuple(shape)

    def read(self, name: str, shard: ShardSpec | None = None) -> Tensor:
        """Return a whole tensor, or the part of it that `shard` names, in the files' dtype.

        Raises:
            CheckpointError: it is not there, or the files do not hold all of it.
        """
        return self._read_box(name, self._box(name, shard))

    def read_entries(self, name: str, shard: ShardSpec | None, start: int, stop: int) -> Tensor:
        """Return the entries [start, stop) of a flattened tensor, or of the part of it that `shard` names; 1-D.

        Raises: as `read`.
        """
        box = self._box(name, shard)
        row = math.prod(each.stop - each.start for each in box[1:])
        first, last = start // row, -(-stop // row)
        box[0] = slice(box[0].start + first, box[0].start + last)
        return self._read_box(name, box).flatten()[start - first * row : stop - first * row]

    def _box(self, name: str, shard: ShardSpec | None) -> list[slice]:
        """Return the range along each dim of a whole tensor, or of a shard."""
        shape = self.shape(name)
        box = [slice(0, size) for size in shape]
        if shard is not None:
            if shard.stop > shape[shard.dim]:
                raise CheckpointError(
                    f"{self._of(name)[0].path}: {name!r} is {list(shape)}, needed up to {shard.stop} of dim {shard.dim}"
                )
            box[shard.dim] = slice(shard.start, shard.stop)
        return box

    def _read_box(self, name: str, box: list[slice]) -> Tensor:
        """Return the values in a box, from as many shards as hold them."""
        shards: defaultdict[ShardSpec | None, list[_Piece]] = defaultdict(list)
        for piece in self._of(name):
            shards[piece.shard].append(piece)
        dims = sorted({shard.dim for shard in shards if shard is not None}) or [0]
        path = self._of(name)[0].path
        if len(dims) > 1:
            raise CheckpointError(f"{path}: {name!r} is cut along dims {dims}")
        dim, at = dims[0], box[dims[0]].start
        found: list[Tensor] = []
        # In ascending order; key/value heads that several ranks held are taken from the first of them.
        for shard, pieces in sorted(shards.items(), key=lambda each: each[0].start if each[0] else 0):
            begin, end = (shard.start, shard.stop) if shard else (0, box[dim].stop)
            if begin <= at < min(end, box[dim].stop):
                stop = min(end, box[dim].stop)
                its_own = [*box[:dim], slice(at - begin, stop - begin), *box[dim + 1 :]]
                found.append(_read_local(name, pieces, its_own))
                at = stop
        if at < box[dim].stop:
            raise CheckpointError(f"{path}: no file holds {name!r} from {at} to {box[dim].stop} of dim {dim}")
        return found[0] if len(found) == 1 else torch.cat(found, dim=dim)

    def _of(self, name: str) -> list[_Piece]:
        if name not in self._pieces:
            raise CheckpointError(f"no file of the checkpoint has the tensor {name!r}")
        return self._pieces[name]


def _read_header(text: str) -> dict[str, ShardSpec]:
    """Return where the shards of a file lie. Raises: ValueError, with the name whose place is impossible."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise CheckpointError("its header of shards is no mapping")
    shards = {}
    for name, place in header.items():
        # A bool is an int to Python.
        fits = isinstance(place, list) and len(place) == 4 and all(type(each) is int for each in place)
        if not fits or place[0] < 0 or not 0 <= place[1] <= place[2] <= place[3]:
            raise ValueError(
                f"its header places {name!r} at {place!r:.80}, which is no [dim, start, stop, full]"
            )
        shards[name] = ShardSpec(*place)
    return shards


def _read_spans(text: str) -> dict[str, Span]:
    """Return which entries of their shards a file has. Raises: ValueError, with the name whose place is impossible."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise CheckpointError("its header of spans is no mapping")
    for name, place in header.items():
        fits = isinstance(place, list) and len(place) > 1 and all(type(each) is int for each in place)
        if not fits or min(place) < 0:
            raise ValueError(f"its header has {name!r} from {place!r:.80}, which is no [start, *shape]")
    return {name: Span(start, tuple(shape)) for name, (start, *shape) in header.items()}


def _check_type(name: str, dtype: str) -> None:
    """Raise ValueError unless a tensor is a mask of bools, or anything else of floats."""
    if (dtype != "BOOL") if name.startswith("mask/") else (dtype not in _FLOATS):
        raise ValueError(f"{name!r} is of the type {dtype}")


def _check_overlap(name: str, pieces: Sequence[_Piece]) -> None:
    """Raise CheckpointError if two pieces of a tensor share a part of it, and are not the same part."""
    places = {(each.shard.start, each.shard.stop): each.path for each in pieces if each.shard is not None}
    for one, other in pairwise(sorted(place for place in places if place[0] < place[1])):
        if other[0] < one[1]:
            raise CheckpointError(
                f"{places[one]} holds {name!r} from {one[0]} to {one[1]}, {places[other]} from {other[0]} to {other[1]}: "
                "they overlap"
            )


def _read_local(name: str, pieces: list[_Piece], box: list[slice]) -> Tensor:
    """Return the values in a box of one shard, from pieces that hold some entries each, or all."""
    whole = next((piece for piece in pieces if piece.span is None), None)
    try:
        if whole is not None:
            return whole.file.get_slice(name)[tuple(box)]
        shape = pieces[0].shape(name)
        row = math.prod(shape[1:])
        rows = _read_span(name, pieces, box[0].start * row, box[0].stop * row).view(-1, *shape[1:])
        return rows[(slice(None), *box[1:])]
    except OSError as error:
        raise CheckpointOutOfReach(f"{pieces[0].path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{pieces[0].path} cannot be read: {error}") from error


def _read_span(name: str, pieces: list[_Piece], start: int, stop: int) -> Tensor:
    """Return the entries [start, stop) of a flattened shard; what several pieces hold is taken from the first of them."""
    at, found = start, []
    for piece in sorted(pieces, key=lambda each: each.begin):
        values = piece.file.get_slice(name)
        end = min(stop, piece.begin + values.get_shape()[0])
        if piece.begin <= at < end:
            found.append(values[at - piece.begin : end - piece.begin])
            at = end
    if at < stop:
        raise CheckpointError(f"{pieces[0].path}: no file holds entries {at} to {stop} of {name!r}")
    return found[0] if len(found) == 1 else torch.cat(found)
