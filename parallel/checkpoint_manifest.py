"""The manifest of a checkpoint: what it holds, and a checksum of that.

Decides the form on disk, and what is impossible: a manifest that was cut short or changed does not fit its checksum, and
one whose checksum fits may still say nonsense (a name that leads out of the folder, a negative number, another type). Every
such thing is an error that names the file and the entry. Knows nothing of tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from parallel.hashed_files import FileRecord, size_of, write_file

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"
_MOST = 2**53
"""Counts stay below: larger ones are not exact in every reader of JSON."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class CheckpointOutOfReach(CheckpointError):
    """A checkpoint cannot be read here and now (a disk, a mount, a permission); it may be sound."""


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Give a block that reads files, `path` or below it.

    Raises:
        CheckpointOutOfReach: the system has refused it.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointOutOfReach(f"{error.filename or path} cannot be read: {reason}") from error


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps done."""
    updates: int
    """Of them, those that the moments have seen."""
    layout: dict[str, int]
    """Sizes of the mesh that wrote it, by key."""
    files: dict[str, FileRecord]
    """Files of tensors, by name."""
    companions: dict[str, FileRecord]
    """Small files that the caller gave along, by their paths in the folder (with `/`)."""
    extras: dict[str, Any]
    """JSON values of the caller."""

    @property
    def records(self) -> dict[str, FileRecord]:
        """All files, by their paths in the folder."""
        return {**self.files, **self.companions}


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest of a checkpoint whose files are there, and flush it to the disk.

    Raises:
        OSError: with the file's name.
    """
    body = asdict(manifest)
    text = json.dumps({_CHECKSUM: _checksum(body), **body}, indent=2, sort_keys=True) + "\n"
    write_file(folder / MANIFEST, [text.encode()])


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check that its files are there in full; their content is not looked at.

    Raises:
        CheckpointError: no manifest, one that is damaged or says impossible things, or a file that is missing or has
            another size.
        CheckpointOutOfReach: it, or a file, may be there and cannot be read.
    """
    path = folder / MANIFEST
    with reaching(path):
        content = None if size_of(path) is None else path.read_bytes()
    if content is None:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = _parse(json.loads(content.decode()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name, record in manifest.records.items():
        file = folder / name
        with reaching(file):
            found = size_of(file) or 0
        if found != record.size_bytes:
            raise CheckpointError(f"{file} has {found} bytes, its checkpoint says {record.size_bytes}")
    return manifest


def _checksum(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's values, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(body, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def _parse(values: Any) -> Manifest:
    """Return the manifest of what a file holds. Raises: ValueError, with the entry that is wrong."""
    names = {each.name for each in fields(Manifest)}
    if not isinstance(values, dict) or values.keys() != {_CHECKSUM, *names}:
        raise ValueError(f"it must hold {_CHECKSUM}, {', '.join(sorted(names))} and nothing else")
    body = {name: values[name] for name in names}
    if values[_CHECKSUM] != _checksum(body):
        raise ValueError(f"its {_CHECKSUM} is not that of its content, so it was changed or damaged")
    for name in names - {"step", "updates"}:
        if not isinstance(body[name], dict):
            raise CheckpointError(f"{name} is no mapping")
    for name, size in body["layout"].items():
        _count(size, f"layout.{name}", least=1)
    return Manifest(
        step=_count(body["step"], "step"),
        updates=_count(body["updates"], "updates"),
        layout=body["layout"],
        files={name: _record(name, each, flat=True) for name, each in body["files"].items()},
        companions={name: _record(name, each, flat=False) for name, each in body["companions"].items()},
        extras=body["extras"],
    )


def _count(value: Any, name: str, *, least: int = 0) -> int:
    # A bool is an int to Python.
    if type(value) is not int or not least <= value < _MOST:
        raise ValueError(f"{name} is {value!r:.40}, which is no whole number of {least} or more")
    return value


def _record(name: str, values: Any, *, flat: bool) -> FileRecord:
    """Return a file's record. Raises: ValueError, its name leads out of the folder, or a value is impossible."""
    parts = PurePosixPath(name).parts
    stays = "/".join(parts) == name and not {"..", "/"} & {*parts} and not re.search(r"[\\:\0]", name)
    if not stays or name in ("", MANIFEST) or (flat and len(parts) != 1):
        raise ValueError(f"the file name {name!r} is not one inside the folder")
    keys = {each.name for each in fields(FileRecord)}
    if not isinstance(values, dict) or values.keys() != keys:
        raise ValueError(f"{name} must have {' and '.join(sorted(keys))}")
    sha256 = values["sha256"]
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"the sha256 of {name} is {sha256!r:.80}, which is none")
    return FileRecord(_count(values["size_bytes"], f"the size_bytes of {name}"), sha256)
