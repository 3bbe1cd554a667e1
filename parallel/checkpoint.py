"""Checkpoints of a training run: written beside the steps, complete or absent.

    checkpoints/step-00000120/
      manifest.json                 step, layout, size of each file, the caller's extras
      stage-000-tp-00.safetensors   for each parameter of a rank's stages: master weight and both moments, local shards

A folder under its final name is complete: every rank has written and synced its file before rank 0 renames the
folder. A step waits only for the copy of its state. Data-parallel replicas and both ends of a tie are equal, so only one
writes. The teacher is not in it. Only JSON and safetensors are read. Any layout restores from any other
(`parallel.checkpoint_files`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from parallel.background import Background
from parallel.checkpoint_files import CheckpointError, CheckpointFiles, write_shards
from parallel.collectives import barrier, broadcast_object, gather_objects
from parallel.layers import ShardSpec
from parallel.mesh import Mesh
from parallel.optimizer import StageOptimizer
from parallel.weights import Entry

MANIFEST = "manifest.json"
_LAST_S = 60.0
"""How long a run that failed waits for its checkpoint under way."""
_OTHER = "it belongs to another student"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps done."""
    updates: int
    """Of them, those that the moments have seen."""
    layout: dict[str, int]
    """Sizes of the mesh that wrote it, by key."""
    files: dict[str, int]
    """File name -> bytes."""
    extras: dict[str, Any]


def _file_name(mesh: Mesh) -> str:
    return f"stage-{mesh.pp.rank:03d}-tp-{mesh.tp.rank:02d}.safetensors"


def tensor_name(kind: str, entry: Entry) -> str:
    """Return the name of a parameter's master (`weight`) or moment (`exp_avg`, `exp_avg_sq`)."""
    return f"{kind}/{entry.name}"


def _layout(mesh: Mesh, optimizer: StageOptimizer) -> dict[str, int]:
    return {
        "mesh.pp": mesh.pp.size,
        "mesh.tp": mesh.tp.size,
        "pipeline.virtual_stages": optimizer.num_chunks,
    }


class Saver:
    """Writes a run's checkpoints while its training goes on, one after the other, on a thread that yields to all else.

    Use it as a context manager: an error inside still lets the checkpoint under way come to its end, if it can.

    Args:
        root: the run's `checkpoints` folder.
        keep: how many of the newest complete ones stay.
    """

    def __init__(self, root: Path, optimizer: StageOptimizer, mesh: Mesh, *, keep: int) -> None:
        self._root, self._optimizer, self._mesh, self._keep = root, optimizer, mesh, keep
        self._beside = Background("checkpoints", yields=True)

    def save(self, step: int, extras: dict[str, Any]) -> None:
        """Copy this rank's state, and write it from then on; waits for the checkpoint before to be complete.

        Args:
            step: optimizer steps done.
            extras: JSON values of the caller (round, fingerprints).
        Raises:
            OSError: what writing raised before.
        Collectives: on the thread, over `mesh.background`: a barrier, a gather of file sizes, a barrier.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        shards: dict[str, ShardSpec] = {}
        for entry, views in self._optimizer.state() if self._mesh.dp.is_first else ():
            if entry.is_tied_copy:
                continue
            for kind, view in views.items():
                name = tensor_name(kind, entry)
                tensors[name] = view.detach().to("cpu", copy=True)
                if entry.shard is not None:
                    shards[name] = entry.shard
        self._beside.give(partial(self._write, step, self._optimizer.num_updates, tensors, shards, extras))

    def check(self) -> None:
        """Raise what writing has raised so far."""
        self._beside.check()

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete on all ranks, and raise what writing it raised."""
        self._beside.wait()

    def __enter__(self) -> Self:
        """Return the saver."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for the checkpoint under way; after an error not for ever, and without an error of its own."""
        try:
            if kind is None:
                self.wait()
            else:
                with suppress(BaseException):
                    self._beside.wait(_LAST_S)
        finally:
            self._beside.close()

    def _write(
        self,
        step: int,
        updates: int,
        tensors: dict[str, Tensor],
        shards: dict[str, ShardSpec],
        extras: dict[str, Any],
    ) -> None:
        root, mesh = self._root, self._mesh
        final = root / f"step-{step:08d}"
        temporary = root / f"{final.name}.partial"
        if mesh.world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier(mesh.background)
        written: dict[str, int] = {}
        if mesh.dp.is_first:
            path = temporary / _file_name(mesh)
            write_shards(tensors, shards, path)
            _sync(path)
            written[path.name] = path.stat().st_size
        reports = gather_objects(written, mesh.background)
        if mesh.world.is_first:
            files = {name: size for report in reports for name, size in report.items()}
            layout = _layout(mesh, self._optimizer)
            manifest = Manifest(step, updates, layout, files, extras)
            (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")
            _sync(temporary / MANIFEST)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(root)
            for old in complete_checkpoints(root)[: -self._keep]:
                shutil.rmtree(old)
        barrier(mesh.background)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk: a rename must not arrive before the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return sorted(
        path for path in root.glob("step-*") if path.suffix != ".partial" and (path / MANIFEST).exists()
    )


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check that its files are there in full.

    Raises:
        CheckpointError: no manifest, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    counts, groups = (manifest.step, manifest.updates), (manifest.layout, manifest.files, manifest.extras)
    if not all(type(count) is int for count in counts) or not all(isinstance(each, dict) for each in groups):
        raise CheckpointError(
            f"{path} cannot be read: step, updates, layout, files or extras has a wrong type"
        )
    for name, size in manifest.files.items():
        file = folder / Path(name).name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise CheckpointError(f"{file} has {found} bytes, its checkpoint says {size}")
    return manifest


def drop_after(root: Path, step: int, mesh: Mesh) -> None:
    """Remove the checkpoints of a run after `step`: it goes on from there on another way.

    Collectives: a barrier over the world.
    """
    if mesh.world.is_first:
        for folder in complete_checkpoints(root):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)
    barrier(mesh.world)


def latest(root: Path, mesh: Mesh) -> Path | None:
    """Return the newest complete checkpoint, the same on every rank, or None. Collectives: one broadcast."""
    found = complete_checkpoints(root) if mesh.world.is_first else []
    return broadcast_object(found[-1] if found else None, mesh.world)


def open_files(folder: Path, manifest: Manifest) -> CheckpointFiles:
    """Open the tensors of a checkpoint. Raises: CheckpointError, a file that cannot be read."""
    return CheckpointFiles(folder / Path(name).name for name in sorted(manifest.files))


def restore(
    folder: Path,
    optimizer: StageOptimizer,
    mesh: Mesh,
    *,
    optional: Callable[[str], bool] = lambda name: False,
) -> Manifest:
    """Load this rank's masters, moments and mask, bit for bit, and refresh the parameters.

    Args:
        optional: tensor's name (`mask/...`, `weight/...`) -> whether it is loaded only where the checkpoint and the
            optimizer both have it, in one shape; elsewhere it is left as it is.
    Raises:
        CheckpointError: a broken file, a tensor that is missing, left over or of another shape; a rank whose own part is
            sound raises another rank's.
    Collectives: gathers of names and of errors over the world.
    """
    manifest, found = None, None
    names: set[str] = set()
    left: frozenset[str] = frozenset()
    try:
        manifest = read_manifest(folder)
        with open_files(folder, manifest) as files:
            left = frozenset(name for name in files.names if not optional(name))
            names = _load(files, optimizer, optional)
    except CheckpointError as error:
        found = CheckpointError(f"{folder}: {error}")
    reports = gather_objects((names, found), mesh.world)
    errors = [error for _, error in reports if error is not None]
    if errors:
        raise found or errors[0]
    if left := left.difference(*(names for names, _ in reports)):
        raise CheckpointError(
            f"{folder} holds tensors that the student does not have: {', '.join(sorted(left)[:4])}; {_OTHER}"
        )
    optimizer.set_updates(manifest.updates)
    return manifest


@torch.no_grad()
def _load(files: CheckpointFiles, optimizer: StageOptimizer, optional: Callable[[str], bool]) -> set[str]:
    """Fill the optimizer's state; return the names that were read."""
    names = set()
    for entry, views in optimizer.state():
        for kind, view in views.items():
            name = tensor_name(kind, entry)
            fits = name in files.names and files.shape(name) == entry.full_shape
            if not fits and optional(name):
                continue
            if name not in files.names:
                raise CheckpointError(f"there is no tensor {name!r}; {_OTHER}")
            if files.shape(name) != entry.full_shape:
                raise CheckpointError(f"{name!r} is {list(files.shape(name))}, here {list(entry.full_shape)}")
            view.copy_(files.read(name, entry.shard))
            names.add(name)
    return names
