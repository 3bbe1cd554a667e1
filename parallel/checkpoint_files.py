"""The tensors in a checkpoint's files, whole or in slices, whichever layout wrote them.

Decides how a shard says where it belongs: each file's header maps the names of its sharded tensors to
(dim, start, stop, length of the whole); what is not listed there is whole. Files are opened lazily and slices are read
from disk, so that a rank of another layout reads only the bytes of its own shards. Knows names and slices only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.checkpoint_manifest import CheckpointError
from parallel.hashed_files import FileRecord, write_safetensors
from parallel.layers import ShardSpec

_HEADER = "shards"
_FLOATS = ("F64", "F32", "BF16", "F16")


def write_shards(tensors: Mapping[str, Tensor], shards: Mapping[str, ShardSpec], path: Path) -> FileRecord:
    """Write tensors and, for those that are shards, where each lies in its whole.

    Raises:
        OSError: with the file's name.
    """
    header = {name: [spec.dim, spec.start, spec.stop, spec.full] for name, spec in shards.items()}
    return write_safetensors(tensors, path, metadata={_HEADER: json.dumps(header)})


class _Piece(NamedTuple):
    """A tensor in one file."""

    path: Path
    file: Any
    shard: ShardSpec | None


class CheckpointFiles:
    """The files of a checkpoint; use it as a context manager.

    Args:
        paths: of the files; all of them, or a tensor may lack a part.
    Raises:
        CheckpointError: a file cannot be read, or says impossible things.
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
            shards = _read_header((file.metadata() or {}).get(_HEADER, "{}"))
            names = set(file.keys())
            if shards.keys() - names:
                raise ValueError(f"its header places {min(shards.keys() - names)!r}, which is not in it")
            for name in names:
                _check_type(name, file.get_slice(name).get_dtype())
                self._pieces[name].append(_Piece(path, file, shards.get(name)))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
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
        shape, shard = list(piece.file.get_slice(name).get_shape()), piece.shard
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
        pieces = self._of(name)
        shape = self.shape(name)
        dim = shard.dim if shard is not None else next((each.shard.dim for each in pieces if each.shard), 0)
        start, stop = (0, shape[dim]) if shard is None else (shard.start, shard.stop)
        if stop > shape[dim]:
            raise CheckpointError(
                f"{pieces[0].path}: {name!r} is {list(shape)}, needed up to {stop} of dim {dim}"
            )
        found: list[Tensor] = []
        at = start
        try:
            # In ascending order; key/value heads that several ranks held are taken from the first of them.
            for piece in sorted(pieces, key=lambda each: each.shard.start if each.shard else 0):
                begin, end = (piece.shard.start, piece.shard.stop) if piece.shard else (0, shape[dim])
                if piece.shard is not None and piece.shard.dim != dim:
                    raise CheckpointError(
                        f"{piece.path}: {name!r} is cut along dim {piece.shard.dim}, not {dim}"
                    )
                if begin <= at < min(end, stop):
                    where = [slice(None)] * len(shape)
                    where[dim] = slice(at - begin, min(end, stop) - begin)
                    found.append(piece.file.get_slice(name)[tuple(where)])
                    at = min(end, stop)
        except SafetensorError as error:
            raise CheckpointError(f"{pieces[0].path} cannot be read: {error}") from error
        if at < stop:
            raise CheckpointError(
                f"{pieces[0].path}: no file holds {name!r} from {at} to {stop} of dim {dim}"
            )
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
