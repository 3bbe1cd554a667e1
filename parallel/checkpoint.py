"""Checkpoints of a training run: written beside the steps, complete or absent.

    checkpoints/step-00000120/
      manifest.json                 step, layout, fingerprint of the model, size of each file, the caller's extras
      stage-000-tp-00.safetensors   for each parameter of a rank's stages: master weight and both moments, local shards

A folder under its final name is complete: every rank has written and synced its file before rank 0 renames the
folder. A step waits only for the copy of its state. Data-parallel replicas are equal, so only dp rank 0 writes. The
teacher is not in it. Only JSON and safetensors are read. Restores into the same pp, tp and stages a rank; the
data-parallel size is free.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.background import Background
from parallel.collectives import barrier, broadcast_object, gather_objects
from parallel.mesh import Mesh
from parallel.optimizer import StageOptimizer
from parallel.weights import Entry

MANIFEST = "manifest.json"
_LAST_S = 60.0
"""How long a run that failed waits for its checkpoint under way."""
_OTHER = "it belongs to another student, or its layers were split over the stages in another way"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps done."""
    layout: dict[str, int]
    """The settings that decide what lies in which file, by key."""
    files: dict[str, int]
    """File name -> bytes."""
    extras: dict[str, Any]


def _file_name(mesh: Mesh) -> str:
    return f"stage-{mesh.pp.rank:03d}-tp-{mesh.tp.rank:02d}.safetensors"


def _tensor_name(kind: str, entry: Entry) -> str:
    """Name a parameter's master or moment; both ends of a tie have their own."""
    return f"{kind}/{entry.name}{'@tied' if entry.is_tied_copy else ''}"


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
        if self._mesh.dp.is_first:
            tensors = {
                _tensor_name(name, entry): view.detach().to("cpu", copy=True)
                for entry, views in self._optimizer.state()
                for name, view in views.items()
            }
        self._beside.give(partial(self._write, step, tensors, extras))

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

    def _write(self, step: int, tensors: dict[str, Tensor], extras: dict[str, Any]) -> None:
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
            save_file(tensors, path)
            _sync(path)
            written[path.name] = path.stat().st_size
        reports = gather_objects(written, mesh.background)
        if mesh.world.is_first:
            files = {name: size for report in reports for name, size in report.items()}
            layout = _layout(mesh, self._optimizer)
            manifest = {"step": step, "layout": layout, "files": files, "extras": extras}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
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
    fields = (manifest.step, manifest.layout, manifest.files, manifest.extras)
    if not all(map(isinstance, fields, (int, dict, dict, dict))):
        raise CheckpointError(f"{path} cannot be read: step, layout, files or extras has a wrong type")
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


def restore(folder: Path, optimizer: StageOptimizer, mesh: Mesh) -> Manifest:
    """Load this rank's masters and moments, bit for bit, and refresh the parameters.

    Raises:
        CheckpointError: another layout, a broken file, a tensor that is missing, left over or of another shape; a
            rank whose own file is sound raises another rank's.
    Collectives: a gather of errors over the world.
    """
    manifest, found = None, None
    try:
        manifest = _load(folder, optimizer, mesh)
    except CheckpointError as error:
        found = error
    errors = [error for error in gather_objects(found, mesh.world) if error is not None]
    if errors:
        raise found or errors[0]
    return manifest


@torch.no_grad()
def _load(folder: Path, optimizer: StageOptimizer, mesh: Mesh) -> Manifest:
    manifest = read_manifest(folder)
    layout = _layout(mesh, optimizer)
    if manifest.layout != layout:
        wanted, here = (
            ", ".join(f"{key}={value}" for key, value in each.items()) for each in (manifest.layout, layout)
        )
        raise CheckpointError(f"{folder} was written with {wanted}; this run has {here}; use the same layout")
    path = folder / _file_name(mesh)
    try:
        with safe_open(path, framework="pt") as file:
            left = set(file.keys())
            for entry, views in optimizer.state():
                for name, view in views.items():
                    key = _tensor_name(name, entry)
                    if key not in left:
                        raise CheckpointError(f"{path} has no tensor {key!r}; {_OTHER}")
                    tensor = file.get_tensor(key)
                    if tensor.shape != view.shape:
                        raise CheckpointError(
                            f"{path}: {key!r} is {list(tensor.shape)}, here {list(view.shape)}"
                        )
                    view.copy_(tensor)
                    left.discard(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if left:
        raise CheckpointError(
            f"{path} holds tensors that this rank does not have: {', '.join(sorted(left)[:4])}; {_OTHER}"
        )
    optimizer.set_step(manifest.step)
    return manifest
