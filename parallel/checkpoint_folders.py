"""The checkpoints of a run on the disk: which there are, which are sound, and which go.

Decides that a folder `step-N` with a manifest is complete, and one whose every file has the SHA-256 of its manifest is sound.
The files are shared out over the ranks, so that each is read once. Assumes that all ranks see one file system.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from parallel.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointOutOfReach,
    Manifest,
    reaching,
    read_manifest,
)
from parallel.collectives import broadcast_object, gather_objects
from parallel.hashed_files import FileRecord, difference, size_of
from parallel.mesh import Mesh

T = TypeVar("T")

PARTIAL = ".partial"
"""Suffix of a folder that is being written."""
DAMAGED = ".damaged"
"""Suffix of a folder that was passed over."""
_NAME = re.compile(r"step-(\d+)")


class Sound(NamedTuple):
    """A checkpoint whose files all have the content that was written."""

    folder: Path
    manifest: Manifest


class PassedOver(NamedTuple):
    """A checkpoint that is not sound."""

    folder: Path
    reason: str
    was_complete: bool
    """Whether it has a manifest: it is then no rest of a save that was cut off."""


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step that a folder's name says, None if it is no checkpoint's name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first.

    Raises:
        OSError: what there is cannot be read.
    """
    return [folder for folder in _folders(root) if _is_complete(folder)]


def _folders(root: Path) -> list[Path]:
    try:
        # A pattern takes a folder that cannot be read for an empty one, and the run would begin anew.
        paths = list(root.iterdir())
    except FileNotFoundError:
        return []
    found = {path: step for path in paths if (step := step_of(path)) is not None}
    return sorted(found, key=lambda path: found[path])


def _is_complete(folder: Path) -> bool:
    return size_of(folder / MANIFEST) is not None


def _first_rank_reads(mesh: Mesh, read: Callable[[], T]) -> T:
    """Return what the first rank reads.

    Raises:
        CheckpointError: of `read`; the same on every rank.
    Collectives: a broadcast over the world.
    """
    found: T | None = None
    failure: CheckpointError | None = None
    if mesh.world.is_first:
        try:
            found = read()
        except CheckpointError as error:
            failure = error
    found, failure = broadcast_object((found, failure), mesh.world)
    if failure is not None:
        raise failure
    return found


def verify(folder: Path, mesh: Mesh) -> Manifest:
    """Check that a checkpoint is sound, and return its manifest.

    Raises:
        CheckpointError: it is not; the same on every rank.
        CheckpointOutOfReach: a rank cannot read a file; the same on every rank.
    Collectives: two broadcasts and a gather of one object over the world.
    """
    manifest = _first_rank_reads(mesh, lambda: read_manifest(folder))
    # The largest first, dealt out like cards.
    records = sorted(manifest.records.items(), key=lambda item: (-item[1].size_bytes, item[0]))
    found = gather_objects(_look_at(folder, records[mesh.world.rank :: mesh.world.size]), mesh.world)
    name, failure = next(filter(None, found), (None, None))
    if failure is None:
        return manifest
    # What only another machine does not see whole is a matter of its disk.
    is_seen = mesh.world.is_first and _look_at(folder, [(name, manifest.records[name])]) is None
    raise CheckpointOutOfReach(str(failure)) if broadcast_object(is_seen, mesh.world) else failure


def _look_at(folder: Path, records: Sequence[tuple[str, FileRecord]]) -> tuple[str, CheckpointError] | None:
    """Return the first file that is not as recorded and what is wrong with it, None if all are."""
    for name, record in records:
        try:
            with reaching(folder / name):
                problem = difference(folder / name, record)
        except CheckpointOutOfReach as error:
            return name, error
        if problem is not None:
            return name, CheckpointError(problem)
    return None


def newest_sound(root: Path, mesh: Mesh) -> tuple[Sound | None, list[PassedOver]]:
    """Return the newest sound checkpoint, or None, and the newer ones with what is wrong with them; equal on every rank.

    Raises:
        CheckpointOutOfReach: a rank cannot read one, which is not passed over for that, or the first rank not the folder
            that they are in; the same on every rank.
    Collectives: a broadcast, and those of `verify` for each checkpoint that is looked at.
    """

    def look() -> list[tuple[Path, bool]]:
        with reaching(root):
            return [(folder, _is_complete(folder)) for folder in _folders(root)]

    passed: list[PassedOver] = []
    for folder, complete in reversed(_first_rank_reads(mesh, look)):
        try:
            return Sound(folder, verify(folder, mesh)), passed
        except CheckpointOutOfReach:
            raise
        except CheckpointError as error:
            passed.append(PassedOver(folder, str(error), complete))
    return None, passed


def drop_after(root: Path, step: int, *, damaged: Sequence[PassedOver]) -> list[Path]:
    """Remove the checkpoints of a run after `step`, which it goes on from on another way; set damaged ones aside.

    On one rank.

    Returns:
        The complete ones that are gone.
    Raises:
        OSError: one cannot be moved or removed.
    """
    dropped = []
    for folder in (each.folder for each in damaged if each.was_complete):
        target = folder.with_name(folder.name + DAMAGED)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    for folder in _folders(root):
        if (step_of(folder) or 0) > step:
            dropped += [folder] if _is_complete(folder) else []
            remove(folder)
    return dropped


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is removed in part only is not complete any more."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
