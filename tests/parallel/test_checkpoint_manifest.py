"""A manifest is whole and possible, or an error that says what is wrong with which entry."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointOutOfReach,
    Manifest,
    read_manifest,
    write_manifest,
)
from parallel.hashed_files import FileRecord, write_file
from tests.parallel.forged import checksum, edit_manifest

FILE, COMPANION = "stage-000-tp-00.safetensors", "student/pruning/kept.safetensors"
NONE = "0" * 64


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / COMPANION).parent.mkdir(parents=True)
    written = Manifest(
        step=7,
        updates=5,
        layout={"mesh.pp": 1},
        files={FILE: write_file(tmp_path / FILE, [b"tensors"])},
        companions={COMPANION: write_file(tmp_path / COMPANION, [b"kept"])},
        extras={"tokens": 3, "prune_s": 0.1},
    )
    write_manifest(written, tmp_path)
    return written


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert all(word in str(caught.value) for word in words), (words, caught.value)


def test_it_comes_back(manifest: Manifest, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == manifest
    assert manifest.records.keys() == {FILE, COMPANION}
    body = json.loads((tmp_path / MANIFEST).read_text())
    assert body.pop("checksum") == checksum(body), "the format is what forged.py says"


def test_what_is_no_manifest_is_named(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    whole = path.read_text()
    body = json.loads(whole)
    deep = "[" * 100_000 + "]" * 100_000
    broken = ["", "{", "null", "[]", "3", '"x"', "{}", '{"step": 1}', whole[: len(whole) // 2], deep]
    broken += [json.dumps({key: each for key, each in body.items() if key != name}) for name in body]
    broken += [
        json.dumps({**body, "more": 1}),
        json.dumps({**body, "step": 8}),
        whole.replace("mesh.pp", "mesh.tp"),
    ]
    broken += [json.dumps({**body, "checksum": each}) for each in (NONE, None, 3, [])]
    for text in broken:
        path.write_text(text)
        refused(tmp_path, str(path), "cannot be read")
    path.write_bytes(b"\xff\xfe{}")
    refused(tmp_path, str(path), "cannot be read")
    path.unlink()
    refused(tmp_path, f"{tmp_path} is no checkpoint: it has no {MANIFEST}")
    path.mkdir()
    refused(tmp_path, "is no checkpoint")


def test_one_flipped_bit_of_it_is_seen(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = read_manifest(tmp_path)
        except CheckpointError:
            continue
        # Blanks between entries mean nothing.
        assert found == manifest and chr(whole[at]).isspace()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *(("step", each, "step is ") for each in (None, -1, 1.5, True, "7", [], 10**300)),
        ("updates", -1, "updates is -1"),
        *((key, each, f"{key} is no mapping") for key in ("layout", "files", "companions", "extras") for each in (None, [], 3)),
        ("layout", {"mesh.pp": 0}, "layout.mesh.pp is 0"),
        ("layout", {"mesh.pp": "2"}, "layout.mesh.pp is '2'"),
        ("files", {FILE: 7}, f"{FILE} must have sha256 and size_bytes"),
        ("files", {FILE: {"size_bytes": 7}}, "must have"),
        ("files", {FILE: {"size_bytes": -7, "sha256": NONE}}, f"the size_bytes of {FILE} is -7"),
        ("files", {FILE: {"size_bytes": 7.0, "sha256": NONE}}, "is 7.0"),
        *(
            ("files", {FILE: {"size_bytes": 7, "sha256": each}}, f"the sha256 of {FILE} is")
            for each in (None, 3, "", "0" * 63, "G" * 64)
        ),
        *(
            (group, {name: {"size_bytes": 7, "sha256": NONE}}, f"the file name {name!r} is not one inside")
            for group in ("files", "companions")
            for name in ("../x", "/etc/passwd", "..", ".", "", "/", "a/../b", "a//b", "./a", "a\\b", "C:a", "a\0b", MANIFEST)
        ),
        ("files", {f"sub/{FILE}": {"size_bytes": 7, "sha256": NONE}}, "is not one inside"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_named(
    key: str, value: Any, words: str, manifest: Manifest, tmp_path: Path
) -> None:
    edit_manifest(tmp_path, lambda body: {**body, key: value})
    refused(tmp_path, str(tmp_path / MANIFEST), "cannot be read", words)


@pytest.mark.parametrize("name", [MANIFEST, FILE])
@pytest.mark.parametrize("call", ["stat", "read_bytes"])
def test_what_the_system_refuses_is_out_of_reach(
    call: str, name: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Path, call)

    def refuse(self: Path, **rest: Any) -> Any:
        if self.name == name:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return original(self, **rest)

    monkeypatch.setattr(Path, call, refuse)
    if (call, name) == ("read_bytes", FILE):
        assert read_manifest(tmp_path) == manifest, "of files the size is looked at"
        return
    with pytest.raises(CheckpointOutOfReach, match=f"{name} cannot be read: Stale file handle"):
        read_manifest(tmp_path)


def test_files_that_are_missing_or_short_are_named(manifest: Manifest, tmp_path: Path) -> None:
    for name in (FILE, COMPANION):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1])
        refused(tmp_path, f"{tmp_path / name} has {len(whole) - 1} bytes, its checkpoint says {len(whole)}")
        (tmp_path / name).unlink()
        refused(tmp_path, f"{tmp_path / name} has 0 bytes")
        (tmp_path / name).write_bytes(whole)
    assert read_manifest(tmp_path).files[FILE] == FileRecord(7, manifest.files[FILE].sha256)
