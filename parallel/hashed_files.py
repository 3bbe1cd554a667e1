"""Files whose size and SHA-256 are taken while they are written, and files read back to be compared with both.

Decides that the hash is of the bytes that were meant, not of what a disk gives back, and that a file is flushed to the disk
before its record is handed out. safetensors are written as a stream here: the library's writer keeps its bytes to itself, so
that every file would have to be read once more. Reading them stays the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
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
        with path.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
                size_bytes += len(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return FileRecord(size_bytes, digest.hexdigest())


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


def difference(path: Path, record: FileRecord) -> str | None:
    """Return why a file is not the one of a record, or None; reads all of it if its size is right."""
    try:
        found_bytes = path.stat().st_size if path.is_file() else 0
        if found_bytes != record.size_bytes:
            return f"{path} has {found_bytes} bytes, its checkpoint says {record.size_bytes}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return f"{path} is damaged: its content is not that of its SHA-256"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


def sync(path: Path) -> None:
    """Flush a folder to the disk: a rename must not arrive before the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
