"""Which checkpoints are complete, sound, the newest of these; and what becomes of the others."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.checkpoint_folders import (
    complete_checkpoints,
    drop_after,
    folder_of,
    newest_sound,
    remove,
    verify,
)
from parallel.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointOutOfReach,
    Manifest,
    write_manifest,
)
from parallel.hashed_files import write_file
from parallel.mesh import Mesh
from tests.workers import run_distributed

SINGLE = Mesh.single()
FILES = ("a.safetensors", "b.safetensors", "c.safetensors")


def write(root: Path, step: int) -> Path:
    """Write a checkpoint whose files hold anything."""
    folder = folder_of(root, step)
    (folder / "student").mkdir(parents=True)
    files = {name: write_file(folder / name, [name.encode() * (7 + at)]) for at, name in enumerate(FILES)}
    companion = {"student/config.json": write_file(folder / "student/config.json", [b"{}"])}
    write_manifest(Manifest(step, step, {"mesh.pp": 1}, files, companion, {}), folder)
    return folder


def flip(file: Path, at: int = 3) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 16
    file.write_bytes(content)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_complete_ones_by_their_step(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (10, 9, 100_000_000)]
    (tmp_path / "step-00000010.partial").mkdir()
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / "step-new").mkdir()
    assert complete_checkpoints(tmp_path) == [folders[1], folders[0], folders[2]]
    assert complete_checkpoints(tmp_path / "nowhere") == []
    remove(folders[0])
    assert complete_checkpoints(tmp_path) == [folders[1], folders[2]]


@pytest.mark.parametrize("name", [*FILES, "student/config.json"])
def test_any_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    assert verify(folder, SINGLE).step == 4
    flip(folder / name, at=0)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        verify(folder, SINGLE)
    assert str(folder / name) in str(caught.value)


def test_the_newest_sound_one_and_why_not_the_others(tmp_path: Path) -> None:
    assert newest_sound(tmp_path, SINGLE) == (None, [])
    folders = [write(tmp_path, step) for step in (2, 4, 6, 8, 10)]
    flip(folders[1] / FILES[0])
    flip(folders[2] / FILES[2])
    (folders[3] / FILES[1]).unlink()
    (folders[4] / MANIFEST).unlink()
    sound, passed = newest_sound(tmp_path, SINGLE)
    assert sound is not None and sound.folder == folders[0] and sound.manifest.step == 2
    assert [(each.folder, each.was_complete) for each in passed] == [
        (folders[4], False),
        (folders[3], True),
        (folders[2], True),
        (folders[1], True),
    ]
    for each, words in zip(
        passed, ("no manifest", "has 0 bytes", "c.safetensors is damaged", "a.safetensors"), strict=True
    ):
        assert words in each.reason
    drop_after(tmp_path, 2, damaged=passed)
    assert names(tmp_path) == ["step-00000002", *(f"step-0000000{step}.damaged" for step in (4, 6, 8))]
    assert complete_checkpoints(tmp_path) == [folders[0]]


def test_a_run_that_goes_on_from_an_older_one_leaves_no_newer_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    drop_after(tmp_path, 4, damaged=[])
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def _verified(folder: Path) -> tuple[list[str], str]:
    """Return which files this rank reads, and what it is told of the checkpoint when the last rank's is damaged."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    read = []

    def look(path: Path, record: object) -> None:
        read.append(path.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.checkpoint_folders.difference", look)
        verify(folder, mesh)
    torch.distributed.barrier()
    if mesh.world.is_first:
        flip(folder / FILES[1])
    torch.distributed.barrier()
    sound, passed = newest_sound(folder.parent, mesh)
    assert sound is None and len(passed) == 1
    return read, passed[0].reason


def test_each_file_is_read_by_one_rank(tmp_path: Path) -> None:
    (first, told), (second, other) = run_distributed(2, _verified, write(tmp_path, 1))
    assert sorted(first + second) == sorted([*FILES, "config.json"]) and min(len(first), len(second)) == 2
    assert told == other and told.endswith("b.safetensors is damaged: its content is not that of its SHA-256")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 1)
    original = Path.open

    def fail(self: Path, mode: str = "r", **rest: object) -> object:
        if self.name == FILES[0]:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, mode, **rest)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointOutOfReach, match=r"a.safetensors cannot be read: Permission denied"):
        verify(folder, SINGLE)
    # It may be sound: nobody goes on from an older one because of that.
    with pytest.raises(CheckpointOutOfReach):
        newest_sound(tmp_path, SINGLE)
    assert folder.is_dir()


def _verify_where_one_rank_sees_less(folder: Path) -> list[str]:
    """The second rank does not see a file; then nobody does."""
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    seen = []
    original = Path.stat
    for blind in ({1}, {0, 1}):

        def look(self: Path, hidden: bool = mesh.world.rank in blind, **rest: Any) -> os.stat_result:
            if hidden and self.name in FILES:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
            return original(self, **rest)

        with mock.patch.object(Path, "stat", look):
            try:
                verify(folder, mesh)
            except CheckpointError as error:
                seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_what_one_machine_does_not_see_is_no_damage(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    for first, second in run_distributed(2, _verify_where_one_rank_sees_less, folder):
        assert first.startswith("CheckpointOutOfReach: ") and "has 0 bytes" in first
        assert second.startswith("CheckpointError: ")


def _told_where_the_first_rank_is_refused(folder: Path) -> list[str]:
    """The first rank's disk refuses the manifest, then the folder of checkpoints; return what this rank is told."""
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    told = []
    for call, place in (("stat", folder / MANIFEST), ("iterdir", folder.parent)):
        original = getattr(Path, call)

        def refuse(self: Path, original: Any = original, place: Path = place, **rest: Any) -> Any:
            if self == place and mesh.world.is_first:
                raise OSError(errno.EIO, "Input/output error", str(self))
            return original(self, **rest)

        with mock.patch.object(Path, call, refuse), pytest.raises(CheckpointOutOfReach) as caught:
            newest_sound(folder.parent, mesh)
        told.append(str(caught.value))
    return told


def test_a_disk_that_refuses_the_first_rank_is_told_on_every_rank(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    expected = [f"{place} cannot be read: Input/output error" for place in (folder / MANIFEST, tmp_path)]
    assert run_distributed(2, _told_where_the_first_rank_is_refused, folder) == [expected] * 2


def test_a_link_out_of_the_folder_is_no_way_around_the_hash(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.write_bytes(b"y" * (folder / FILES[0]).stat().st_size)
    (folder / FILES[0]).unlink()
    os.symlink(outside, folder / FILES[0])
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(folder, SINGLE)
