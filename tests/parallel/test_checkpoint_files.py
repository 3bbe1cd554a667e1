"""Slices come back from whatever pieces were written, and what is missing or contradicts itself is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel.checkpoint_files import CheckpointError, CheckpointFiles, Span, write_shards
from parallel.checkpoint_manifest import CheckpointOutOfReach
from parallel.layers import ShardSpec

WHOLE = torch.arange(60.0).view(12, 5)


def _write(folder: Path, dim: int, pieces: list[tuple[int, int]], **extra: torch.Tensor) -> list[Path]:
    paths = []
    for number, (start, stop) in enumerate(pieces):
        paths.append(folder / f"{number}.safetensors")
        tensors = {"w": WHOLE.narrow(dim, start, stop - start).contiguous(), **extra}
        write_shards(tensors, {"w": ShardSpec(dim, start, stop, WHOLE.shape[dim])}, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("dim", "pieces"),
    [
        (0, [(0, 12)]),
        (0, [(5, 12), (0, 5)]),
        (1, [(0, 2), (2, 3), (3, 5)]),
        (0, [(0, 4), (0, 4), (4, 8), (4, 8), (8, 12)]),
        (0, [(0, 5), (5, 5), (5, 12)]),
    ],
    ids=["one", "any order", "three", "heads held twice", "one that is empty"],
)
def test_every_slice_of_every_cut(tmp_path: Path, dim: int, pieces: list[tuple[int, int]]) -> None:
    with CheckpointFiles(_write(tmp_path, dim, pieces, norm=torch.ones(3))) as files:
        assert files.names == {"w", "norm"}
        assert files.shape("w") == (12, 5) and files.shape("norm") == (3,)
        assert torch.equal(files.read("w"), WHOLE) and torch.equal(files.read("norm"), torch.ones(3))
        full = WHOLE.shape[dim]
        for start in range(full):
            for stop in range(start + 1, full + 1):
                wanted = WHOLE.narrow(dim, start, stop - start)
                assert torch.equal(files.read("w", ShardSpec(dim, start, stop, full)), wanted)
        across = ShardSpec(1 - dim, 1, 4, WHOLE.shape[1 - dim])
        assert torch.equal(files.read("w", across), WHOLE.narrow(1 - dim, 1, 3)), (
            "along the dim that is not cut"
        )


def _write_entries(folder: Path, shards: list[ShardSpec], cuts: list[list[tuple[int, int]]]) -> list[Path]:
    """Write some entries of each shard into a file each, as replicas do."""
    paths = []
    for shard, ends in zip(shards, cuts, strict=True):
        local = WHOLE.narrow(shard.dim, shard.start, shard.stop - shard.start).contiguous()
        for start, stop in ends:
            paths.append(folder / f"{len(paths)}.safetensors")
            spans = {"w": Span(start, tuple(local.shape))}
            write_shards({"w": local.flatten()[start:stop]}, {"w": shard}, paths[-1], spans)
    return paths


@pytest.mark.parametrize(
    ("shards", "cuts"),
    [
        ([ShardSpec(0, 0, 12, 12)], [[(0, 7), (7, 33), (33, 60)]]),
        ([ShardSpec(0, 0, 5, 12), ShardSpec(0, 5, 12, 12)], [[(11, 25), (0, 11)], [(0, 35)]]),
        ([ShardSpec(1, 0, 2, 5), ShardSpec(1, 2, 5, 5)], [[(0, 5), (5, 24)], [(0, 20), (14, 36)]]),
    ],
    ids=["replicas", "rows and replicas", "columns and replicas"],
)
def test_replicas_parts_fit_every_layout(
    tmp_path: Path, shards: list[ShardSpec], cuts: list[list[tuple[int, int]]]
) -> None:
    with CheckpointFiles(_write_entries(tmp_path, shards, cuts)) as files:
        assert files.shape("w") == (12, 5) and torch.equal(files.read("w"), WHOLE)
        for shard in (None, ShardSpec(0, 3, 8, 12), ShardSpec(1, 1, 4, 5)):
            wanted = (
                WHOLE if shard is None else WHOLE.narrow(shard.dim, shard.start, shard.stop - shard.start)
            )
            assert torch.equal(files.read("w", shard), wanted)
            flat = wanted.flatten()
            for start in range(0, flat.numel(), 3):
                for stop in range(start + 1, flat.numel() + 1, 2):
                    assert torch.equal(files.read_entries("w", shard, start, stop), flat[start:stop])


def test_a_part_that_is_missing_or_impossible_is_named(tmp_path: Path) -> None:
    shard = ShardSpec(0, 0, 12, 12)
    with CheckpointFiles(_write_entries(tmp_path, [shard], [[(0, 20), (30, 60)]])) as files:
        assert torch.equal(files.read_entries("w", None, 31, 60), WHOLE.flatten()[31:])
        with pytest.raises(CheckpointError, match="no file holds entries 20 to 60 of 'w'"):
            files.read("w")
    path = tmp_path / "x.safetensors"
    for tensor, span in ((WHOLE, Span(0, (12, 5))), (torch.ones(9), Span(52, (12, 5)))):
        write_shards({"w": tensor}, {"w": shard}, path, {"w": span})
        with CheckpointFiles([path]) as files, pytest.raises(CheckpointError, match="its header says Span"):
            files.read("w")


def test_a_whole_tensor_is_cut_along_any_dim(tmp_path: Path) -> None:
    save_file({"w": WHOLE}, tmp_path / "w.safetensors")
    with CheckpointFiles([tmp_path / "w.safetensors"]) as files:
        assert torch.equal(files.read("w", ShardSpec(0, 2, 7, 12)), WHOLE[2:7])
        assert torch.equal(files.read("w", ShardSpec(1, 1, 2, 5)), WHOLE[:, 1:2])


def test_what_is_not_there_or_contradicts_itself_is_named(tmp_path: Path) -> None:
    with CheckpointFiles(_write(tmp_path, 0, [(0, 5), (6, 12)])) as files:
        with pytest.raises(CheckpointError, match="no file holds 'w' from 5 to 12 of dim 0"):
            files.read("w")
        assert torch.equal(files.read("w", ShardSpec(0, 7, 9, 12)), WHOLE[7:9])
        with pytest.raises(CheckpointError, match="has the tensor 'v'"):
            files.read("v")
        with pytest.raises(CheckpointError, match="needed up to 13 of dim 0"):
            files.read("w", ShardSpec(0, 0, 13, 13))
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_shards({"w": WHOLE[:5].contiguous()}, {"w": ShardSpec(0, 0, 6, 12)}, path)
    with (
        CheckpointFiles([path]) as files,
        pytest.raises(CheckpointError, match=r"a.safetensors: 'w' is \[5, 5\]"),
    ):
        files.read("w")
    write_shards({"w": WHOLE[:2].contiguous()}, {"w": ShardSpec(0, 0, 2, 12)}, path)
    write_shards({"w": WHOLE[:, 2:].contiguous()}, {"w": ShardSpec(1, 2, 5, 5)}, other)
    with (
        CheckpointFiles([path, other]) as files,
        pytest.raises(CheckpointError, match=r"'w' is cut along dims \[0, 1\]"),
    ):
        files.read("w")
    save_file({"w": WHOLE}, path)
    save_file({"w": WHOLE[:6].contiguous()}, other)
    with (
        CheckpointFiles([path, other]) as files,
        pytest.raises(CheckpointError, match="disagree on the shape of 'w'"),
    ):
        files.read("w")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "no mapping"),
        ("[" * 100_000, "recursion"),
        ('{"v": [0, 0, 1, 1]}', "places 'v', which is not in it"),
        *(
            (f'{{"w": {place}}}', f"places 'w' at {place.replace(chr(34), chr(39))}, which is no")
            for place in (
                "3",
                "{}",
                "[0, 1]",
                '["a", 0, 1, 2]',
                "[-1, 0, 12, 12]",
                "[0, -3, 12, 12]",
                "[0, 5, 3, 12]",
                "[0, 0, 13, 12]",
                "[0, 0.0, 12, 12]",
            )
        ),
        ('{"w": [false, 0, 12, 12]}', "places 'w' at [False"),
    ],
)
def test_headers_that_say_impossible_things_are_named(tmp_path: Path, header: str, words: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": WHOLE}, path, metadata={"shards": header})
    with pytest.raises(CheckpointError, match="w.safetensors cannot be read") as caught:
        CheckpointFiles([path])
    assert words in str(caught.value)


@pytest.mark.parametrize("pieces", [[(0, 7), (3, 12)], [(0, 12), (0, 4)], [(0, 4), (4, 9), (8, 12)]])
def test_shards_that_overlap_are_named(tmp_path: Path, pieces: list[tuple[int, int]]) -> None:
    with (
        CheckpointFiles(_write(tmp_path, 0, pieces)) as files,
        pytest.raises(CheckpointError, match=r"safetensors holds 'w' from \d+ to \d+, .* they overlap"),
    ):
        files.read("w")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight/a", torch.ones(3, dtype=torch.int64)),
        ("exp_avg/a", torch.ones(3, dtype=torch.bool)),
        ("mask/a", torch.ones(3)),
        ("mask/a", torch.ones(3, dtype=torch.uint8)),
    ],
)
def test_other_types_are_named(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    save_file({name: tensor}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"a.safetensors cannot be read: '{name}' is of the type"):
        CheckpointFiles([tmp_path / "a.safetensors"])


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "no mapping"),
        ('{"v": [0, 1]}', "places 'v', which is not in it"),
        *(
            (f'{{"w": {place}}}', "has 'w' from")
            for place in ("3", "{}", "[0]", '["a", 0]', "[-1, 60]", "[0, true]", "[0.0, 3]")
        ),
    ],
)
def test_headers_of_parts_that_say_impossible_things_are_named(
    tmp_path: Path, header: str, words: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": WHOLE.flatten()}, path, metadata={"spans": header})
    with pytest.raises(CheckpointError, match="w.safetensors cannot be read") as caught:
        CheckpointFiles([path])
    assert words in str(caught.value)


def test_a_file_that_the_system_refuses_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _write(tmp_path, 0, [(0, 12)])

    def refuse(*given: object, **rest: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("parallel.checkpoint_files.safe_open", refuse)
    with pytest.raises(CheckpointOutOfReach, match="0.safetensors cannot be read: .*Permission denied"):
        CheckpointFiles(paths)
