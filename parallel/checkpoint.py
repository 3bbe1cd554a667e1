"""Checkpoints of a training run: written beside the steps, complete or absent.

    checkpoints/step-00000120/
      manifest.json                 step, layout, size and SHA-256 of each file, the caller's extras, a checksum of itself
      stage-000-tp-00.safetensors   for each parameter of a rank's stages: master weight and the rule's state, as much of
                                    its local shard as the replica owns; further replicas' files end with -dp-01 ...
      ...                           small files that the caller gives along

A folder under its final name is complete: every rank has written and synced its file before rank 0 renames the
folder. A step waits only for the copy of its state, whose memory is kept for the next one. A disk that is full or broken on any rank costs this checkpoint and
nothing else: all ranks learn of it, the half-written folder goes, those before stay. Each replica writes its own part, also of
what all hold; of the two ends of a tie one writes. The teacher is not in it. Only JSON and safetensors are read. Any layout restores from
any other (`parallel.checkpoint_files`); what is sound, `parallel.checkpoint_folders` says.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from parallel.background import Background
from parallel.checkpoint_files import CheckpointFiles, Span, write_shards
from parallel.checkpoint_folders import PARTIAL, complete_checkpoints, folder_of, remove
from parallel.checkpoint_manifest import CheckpointError, Manifest, read_manifest, write_manifest
from parallel.collectives import broadcast_object, gather_objects
from parallel.hashed_files import FileRecord, sync, write_file
from parallel.layers import ShardSpec
from parallel.mesh import Mesh
from parallel.optimizer import StageOptimizer
from parallel.weights import Entry

T = TypeVar("T")

THREAD = "checkpoints"
"""Name of the thread that writes."""
_LAST_S = 60.0
"""How long a run that failed waits for its checkpoint under way."""
_OTHER = "it belongs to another student"


def _file_name(mesh: Mesh) -> str:
    replica = "" if mesh.dp.is_first else f"-dp-{mesh.dp.rank:02d}"
    return f"stage-{mesh.pp.rank:03d}-tp-{mesh.tp.rank:02d}{replica}.safetensors"


def tensor_name(kind: str, entry: Entry) -> str:
    """Return the name of a parameter's master (`weight`), mask, or state of a kind (`exp_avg`, `exp_avg_sq`)."""
    return f"{kind}/{entry.name}"


def _layout(mesh: Mesh, optimizer: StageOptimizer) -> dict[str, int]:
    return {
        "mesh.pp": mesh.pp.size,
        "mesh.tp": mesh.tp.size,
        "pipeline.virtual_stages": optimizer.num_chunks,
    }


@dataclass(frozen=True)
class _State:
    """What is written of this rank's state, copied."""

    step: int
    updates: int
    tensors: dict[str, Tensor]
    shards: dict[str, ShardSpec]
    spans: dict[str, Span]
    extras: dict[str, Any]


def _copy(
    optimizer: StageOptimizer,
    step: int,
    extras: dict[str, Any],
    memory: dict[str, Tensor],
    mark: Callable[[], None],
) -> _State:
    """Copy what this rank writes into memory that is kept from one time to the next, by name; mark each as progress."""
    state = _State(step, optimizer.num_updates, {}, {}, {}, extras)
    for entry, parts in optimizer.share():
        for kind, part in parts.items() if not entry.is_tied_copy else ():
            name, shape = tensor_name(kind, entry), tuple(entry.parameter.shape)
            values = _kept_copy(part.read(), memory, name)
            mark()
            if part.stop - part.start == entry.parameter.numel():
                values = values.view(shape)
            else:
                state.spans[name] = Span(part.start, shape)
            state.tensors[name] = values
            if entry.shard is not None:
                state.shards[name] = entry.shard
    return state


def _kept_copy(values: Tensor, memory: dict[str, Tensor], name: str) -> Tensor:
    """Return a copy on the CPU, in the memory of that name if it is there and fits."""
    copy = memory.get(name)
    if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
        # Fresh memory costs more than the copy: a page fault for each 4 KB, and a GPU's copies want it pinned.
        copy = memory[name] = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
    return copy.copy_(values)


class Saver:
    """Writes a run's checkpoints while its training goes on, one after the other, on a thread that yields to all else.

    Use it as a context manager: an error inside still lets the checkpoint under way come to its end, if it can.

    Args:
        root: the run's `checkpoints` folder.
        keep: how many of the newest complete ones stay.
        companions: small files to put into each checkpoint, by their paths in it; those of rank 0 count.
    """

    def __init__(
        self,
        root: Path,
        optimizer: StageOptimizer,
        mesh: Mesh,
        *,
        keep: int,
        companions: Mapping[str, bytes] | None = None,
    ) -> None:
        self._root, self._optimizer, self._mesh, self._keep = root, optimizer, mesh, keep
        self._companions = dict(companions or {})
        self._memory: dict[str, Tensor] = {}
        self._beside = Background(THREAD, yields=True)
        self._untold: list[str] = []
        self.newest: Path | None = None
        """The newest checkpoint that this saver has completed; equal on all ranks after `wait`."""
        self.failure: str | None = None
        """A sentence that says why the checkpoint asked for last could not be written, or None. Equal on all ranks after
        `wait`."""

    def save(self, step: int, extras: dict[str, Any]) -> None:
        """Copy this rank's state, and write it from then on; waits for the checkpoint before to come to its end.

        Args:
            step: optimizer steps done.
            extras: JSON values of the caller (round, fingerprints).
        Raises:
            Exception: what writing raised before, other than a file system's errors (see `failure`).
        Collectives: on the thread, over `mesh.background`: a broadcast, a gather of file records, a broadcast.
        """
        self.wait()
        state = _copy(self._optimizer, step, extras, self._memory, self._mesh.activity.mark)
        self._beside.give(partial(self._write, state))

    def check(self) -> list[str]:
        """Return the failures since the last call, one sentence each; raise what writing has raised so far."""
        self._beside.check()
        told = len(self._untold)
        untold, self._untold[:told] = self._untold[:told], []
        return untold

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete on all ranks or has failed on all; raise what writing it raised."""
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

    def _write(self, state: _State) -> None:
        """Write a checkpoint; every rank learns whether all could."""
        mesh, final = self._mesh, folder_of(self._root, state.step)
        folder = final.with_name(final.name + PARTIAL)
        failure = broadcast_object(self._try(lambda: self._make(folder))[1], mesh.background)
        if failure is None:
            reports = gather_objects(self._try(lambda: self._write_files(folder, state)), mesh.background)
            failure = next((each for _, each in reports if each is not None), None)
        if failure is None:
            records = {name: record for mine, _ in reports for name, record in mine.items()}
            ended = self._try(lambda: self._complete(folder, final, state, records))[1]
            failure = broadcast_object(ended, mesh.background)
        if failure is None:
            self.newest, self.failure = final, None
            return
        if mesh.world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        self.failure = f"the checkpoint of step {state.step} could not be written: {failure}"
        self._untold.append(self.failure)

    def _try(self, work: Callable[[], dict[str, FileRecord]]) -> tuple[dict[str, FileRecord], str | None]:
        """Return what a rank has written, or why it could not: no other rank may wait for it."""
        try:
            return work(), None
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            file = getattr(error, "filename", None)
            return {}, f"{self._mesh.describe()}: {f'{file}: ' if file else ''}{reason}"

    def _make(self, folder: Path) -> dict[str, FileRecord]:
        """Make the folder, and remove what is left of saves that were cut off."""
        if self._mesh.world.is_first:
            for rest in self._root.glob(f"*{PARTIAL}"):
                shutil.rmtree(rest)
            folder.mkdir(parents=True)
        return {}

    def _write_files(self, folder: Path, state: _State) -> dict[str, FileRecord]:
        """Write this rank's files; return their records by name."""
        path = folder / _file_name(self._mesh)
        records = {path.name: write_shards(state.tensors, state.shards, path, state.spans)}
        if self._mesh.world.is_first:
            for name, content in self._companions.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                records[name] = write_file(folder / name, [content])
            for place in {(folder / name).parent for name in self._companions}:
                while place != folder:
                    sync(place)
                    place = place.parent
        return records

    def _complete(
        self, folder: Path, final: Path, state: _State, records: Mapping[str, FileRecord]
    ) -> dict[str, FileRecord]:
        """Write the manifest, give the folder its name, and let the oldest go."""
        if self._mesh.world.is_first:
            sides: dict[bool, dict[str, FileRecord]] = {True: {}, False: {}}
            for name, record in records.items():
                sides[name in self._companions][name] = record
            layout = _layout(self._mesh, self._optimizer)
            write_manifest(
                Manifest(state.step, state.updates, layout, sides[False], sides[True], state.extras), folder
            )
            sync(folder)
            shutil.rmtree(final, ignore_errors=True)
            folder.rename(final)
            sync(self._root)
            for old in complete_checkpoints(self._root)[: -self._keep]:
                remove(old)
        return {}


def open_files(folder: Path, manifest: Manifest) -> CheckpointFiles:
    """Open the tensors of a checkpoint. Raises: CheckpointError, a file that cannot be read."""
    return CheckpointFiles(folder / name for name in sorted(manifest.files))


def read_together(folder: Path, mesh: Mesh, read: Callable[[CheckpointFiles], T]) -> tuple[Manifest, list[T]]:
    """Let every rank read what it needs of a checkpoint; return its manifest, and what `read` returned on each rank.

    Args:
        read: has no collectives: what it cannot read is told when all have come to their end.
    Raises:
        CheckpointError: what is wrong with it on the first rank that sees something; the same on every rank.
        CheckpointOutOfReach: that rank cannot read a file here and now; the same on every rank.
    Collectives: a gather of one object over the world.
    """
    manifest, found, failure = None, None, None
    try:
        manifest = read_manifest(folder)
        with open_files(folder, manifest) as files:
            found = read(files)
    except CheckpointError as error:
        failure = type(error)(f"{folder}: {error}")
    reports = gather_objects((found, failure), mesh.world)
    for _, told in reports:
        if told is not None:
            raise told
    return manifest, [each for each, _ in reports]


def restore(
    folder: Path,
    optimizer: StageOptimizer,
    mesh: Mesh,
    *,
    optional: Callable[[str], bool] = lambda name: False,
) -> Manifest:
    """Load this rank's masters, state and mask, bit for bit, and refresh the parameters.

    Args:
        optional: tensor's name (`mask/...`, `weight/...`) -> whether it is loaded only where the checkpoint and the
            optimizer both have it, in one shape; elsewhere it is left as it is.
    Raises:
        CheckpointError: a broken file, a tensor that is missing, left over or of another shape; the same on every rank.
        CheckpointOutOfReach: a rank cannot read a file here and now; the same on every rank.
    Collectives: those of `read_together` and `StageOptimizer.gather`.
    """

    def load(files: CheckpointFiles) -> set[str]:
        """Return what is left over on this rank."""
        read = _load(files, optimizer, optional)
        return {name for name in files.names - read if not optional(name)}

    manifest, reports = read_together(folder, mesh, load)
    if left := set.intersection(*reports):
        raise CheckpointError(
            f"{folder} holds tensors that the student does not have: {', '.join(sorted(left)[:4])}; {_OTHER}"
        )
    optimizer.set_updates(manifest.updates)
    return manifest


@torch.no_grad()
def _load(files: CheckpointFiles, optimizer: StageOptimizer, optional: Callable[[str], bool]) -> set[str]:
    """Fill the optimizer's state; return the names that were read."""
    names = set()
    found = {name.partition("/")[0] for name in files.names} - {"weight", "mask"}
    if found and found != set(optimizer.kinds):
        kinds = (", ".join(sorted(each)) or "none" for each in (found, optimizer.kinds))
        raise CheckpointError("it holds the state of another rule: {}, not {}".format(*kinds))
    for entry, parts in optimizer.state():
        for kind, part in parts.items():
            name = tensor_name(kind, entry)
            fits = name in files.names and files.shape(name) == entry.full_shape
            if not fits and optional(name):
                continue
            if name not in files.names:
                raise CheckpointError(f"there is no tensor {name!r}; {_OTHER}")
            if files.shape(name) != entry.full_shape:
                raise CheckpointError(f"{name!r} is {list(files.shape(name))}, here {list(entry.full_shape)}")
            part.write(files.read_entries(name, entry.shard, part.start, part.stop))
            names.add(name)
    return names
