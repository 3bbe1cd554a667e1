from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.config import ConfigError
from distill.weight_files import check_weight_files
from tests.lying_files import change_header, move_behind_link

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(3, 4)}, tmp_path / FIRST)
    save_file({"b": torch.ones(5), "c": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / SECOND)
    _index(tmp_path, {"a": FIRST, "b": SECOND, "c": SECOND})
    return tmp_path


def _index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def _append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


def test_whole_files_pass(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shapes = check_weight_files(sharded, key="teacher.model")
    assert shapes == {"a": (3, 4), "b": (5,), "c": (2,)}
    single = tmp_path_factory.mktemp("single")
    save_file({"a": torch.zeros(3)}, single / "model.safetensors", metadata={"format": "pt"})
    check_weight_files(single, key="teacher.model")


def test_weights_may_lie_on_another_disk(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "some.safetensors"
    (sharded / FIRST).rename(elsewhere)
    (sharded / FIRST).symlink_to(elsewhere)
    check_weight_files(sharded, key="teacher.model")


def test_a_hub_cache_is_made_of_links(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tmp_path_factory.mktemp("models--some--model")
    snapshot, blob = model / "snapshots" / "1f2e", model / "blobs" / "3d4c"
    blob.parent.mkdir()
    snapshot.parent.mkdir()
    sharded.rename(snapshot)
    (snapshot / FIRST).rename(blob)
    (snapshot / FIRST).symlink_to(blob)
    check_weight_files(snapshot, key="teacher.model")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: _truncate(f / SECOND, -1),
            rf"{SECOND} is cut short: \d+ bytes where its header needs \d+",
        ),
        (lambda f: _truncate(f / SECOND, 40), "is cut short"),
        (lambda f: _truncate(f / SECOND, 5), "is not a safetensors file"),
        (lambda f: _truncate(f / SECOND, 0), "is not a safetensors file"),
        (lambda f: _append(f / FIRST, b"x"), "is too long"),
        (lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "is not a safetensors file"),
        (lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 4) + b"{no}"), "broken safetensors header"),
        (lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 8) + b'{"a":[]}'), "broken safetensors header"),
        (lambda f: change_header(f / SECOND, "b", dtype="F17"), "broken safetensors header"),
        (lambda f: change_header(f / SECOND, "b", shape=[50]), "broken safetensors header"),
        (lambda f: change_header(f / SECOND, "b", dtype="I32"), "holds b as I32; plain floats are needed"),
        (lambda f: (f / SECOND).unlink(), f"names {SECOND}, which is missing"),
        (lambda f: move_behind_link(f / FIRST), "is a link to .*, which is no safetensors file"),
        (lambda f: _index(f, {"a": FIRST, "b": SECOND, "lost": SECOND}), "lacks lost"),
        (lambda f: _index(f, {"a": "../" + f.name + "/" + FIRST}), "plain name ending in .safetensors"),
        (lambda f: _index(f, {"a": "/etc/passwd"}), "plain name ending in .safetensors"),
        (lambda f: _index(f, {"a": "..\\x.safetensors"}), "plain name ending in .safetensors"),
        (lambda f: _index(f, {"a": "pytorch_model.bin"}), "plain name ending in .safetensors"),
        (lambda f: _index(f, {}), "names no file"),
        (lambda f: (f / INDEX).write_text("[1]"), "is not a safetensors index"),
    ],
)
def test_harmed_folders_are_refused(sharded: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(sharded)
    with pytest.raises(ConfigError, match=message) as caught:
        check_weight_files(sharded, key="student.model")
    assert str(caught.value).startswith("student.model")


def test_pickled_weights_are_named_and_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights"):
        check_weight_files(tmp_path, key="teacher.model")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin; only safetensors are read"):
        check_weight_files(tmp_path, key="teacher.model")
