"""The tensors in a checkpoint's files, whole or in slices, whichever layout wrote them.

Decides how a shard says where it belongs: each file's header maps the names of its sharded tensors to
(dim, start, stop, length of the whole); what is not listed there is whole. Files are opened lazily and slices are read
from disk, so that a rank of another layout reads only the bytes of its own shards. Knows names and slices only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.layers import ShardSpec

_HEADER = "shards"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


def write_shards(tensors: Mapping[str, Tensor], shards: Mapping[str, ShardSpec], path: Path) -> None:
    """Write tensors and, for those that are shards, where each lies in its whole."""
    header = {name: [spec.dim, spec.start, spec.stop, spec.full] for name, spec in shards.items()}
    save_file(dict(tensors), path, metadata={_HEADER: json.dumps(header)})


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
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            shards = {name: ShardSpec(*map(int, place)) for name, place in header.items()}
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        for name in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
            self._pieces[name].append(_Piece(path, file, shards.get(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor.

        Raises:
            CheckpointError: it is not there.
        """
        shapes = {self._whole_shape(piece, name): piece.path for piece in self._of(name)}
        if len(shapes) > 1:
            raise CheckpointError(
                f"{', '.join(map(str, shapes.values()))} disagree on the shape of {name!r}: {[*shapes]}"
            )
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
