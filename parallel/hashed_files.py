"""Files whose size and SHA-256 are taken while they are written, and files read back to be compared with both.

Decides that the hash is of the bytes that were meant, not of what a disk gives back, and that a file is flushed to the disk
before its record is handed out. Files are written past the system's page cache (`_PastTheCache`): copying into fresh pages
of it costs more processor time than everything else here, and pushes out what training reads. safetensors are written as a
stream here: the library's writer keeps its bytes to itself, so that every file would have to be read once more. Reading them
stays the library's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
"""Of a safetensors header's length."""
_BLOCK_BYTES = 4096
"""What a disk's block divides."""
_BUFFER_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a file is known by."""

    size_bytes: int
    sha256: str
    """64 hexadecimal digits."""


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file from its pieces, flush it to the disk, and return its record.

    Raises:
        OSError: with the file's name, also where the system tells none.
    """
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with closing(_PastTheCache(path)) as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
                size_bytes += len(piece)
            file.finish()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return FileRecord(size_bytes, digest.hexdigest())


class _PastTheCache:
    """A new file whose bytes go from memory to the disk without a copy in the system's page cache (Linux's O_DIRECT).

    That takes whole blocks from aligned memory, so bytes are gathered in a buffer first. A file system that does not offer it
    (tmpfs), or does not take a write (at a limit of the file's size), gets ordinary writes.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._direct, self._descriptor = 0, os.open(path, flags, 0o666)
        # A map's memory is aligned to pages.
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._filled = 0

    def write(self, piece: bytes | memoryview) -> None:
        """Take the next bytes."""
        rest = memoryview(piece)
        while rest:
            taken = min(_BUFFER_BYTES - self._filled, len(rest))
            self._buffer[self._filled : self._filled + taken] = rest[:taken]
            self._filled, rest = self._filled + taken, rest[taken:]
            if self._filled == _BUFFER_BYTES:
                self._pass_on(0, _BUFFER_BYTES)
                self._filled = 0

    def finish(self) -> None:
        """Write what is left, the last part of a block in the ordinary way, and flush everything to the disk."""
        whole_bytes = self._filled // _BLOCK_BYTES * _BLOCK_BYTES
        self._pass_on(0, whole_bytes)
        self._be_ordinary()
        self._pass_on(whole_bytes, self._filled)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def _pass_on(self, start: int, stop: int) -> None:
        """Write a part of the buffer."""
        with memoryview(self._buffer) as view:
            while start < stop:
                start += self._write(view[start:stop])

    def _write(self, view: memoryview) -> int:
        try:
            return os.write(self._descriptor, view)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
        self._be_ordinary()
        return os.write(self._descriptor, view)

    def _be_ordinary(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
            self._direct = 0


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]
) -> FileRecord:
    """Write tensors as a safetensors file.

    Args:
        tensors: on the CPU; of a type in `_DTYPES`.
        metadata: text of the header.
    Raises:
        OSError: with the file's name.
    """
    return write_file(path, _safetensors(tensors, metadata))


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    # As the library does it: wide types first, so that every tensor starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    stop = 0
    for name in names:
        start, stop = stop, stop + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield memoryview(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def size_of(path: Path) -> int | None:
    """Return the bytes of a file, None where there is none.

    Raises:
        OSError: the system does not say whether there is one.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def difference(path: Path, record: FileRecord) -> str | None:
    """Return why a file is not the one of a record, or None; reads all of it if its size is right.

    Raises:
        OSError: it may be there and cannot be read, which says nothing of what it holds.
    """
    found_bytes = size_of(path) or 0
    if found_bytes != record.size_bytes:
        return f"{path} has {found_bytes} bytes, its checkpoint says {record.size_bytes}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            return f"{path} is damaged: its content is not that of its SHA-256"
    return None


def sync(path: Path) -> None:
    """Flush a folder to the disk: a rename must not arrive before the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
