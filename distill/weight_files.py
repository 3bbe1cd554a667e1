"""Judge the safetensors files of a model folder by their headers, before any weight is read.

Decides: which files hold the weights (the index if there is one, else `model.safetensors`), and that each is whole: a
file must be exactly as long as its own header says, must hold plain floats and the tensors the index promises, and must lie in the
folder itself or be a link to weights (another safetensors file, or a blob of its own hub cache). Costs one small read a file,
so a file cut short is known at once and not after minutes of loading. Does not look at values; names and shapes are compared
by `distill.model_shapes`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.config import ConfigError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The format's own limit; a longer length means that these eight bytes are no safetensors header.
_MAX_HEADER_BYTES = 100_000_000
_FLOATS = ("F64", "F32", "F16", "BF16")

Shapes = dict[str, tuple[int, ...]]


def check_weight_files(folder: Path, *, key: str) -> Shapes:
    """Check that a folder's safetensors files are all there and whole.

    Args:
        folder: a Hugging Face model folder.
        key: the setting that named it, for the message.
    Returns:
        The shapes of all tensors in them, by name.
    Raises:
        ConfigError: no safetensors, a missing shard or tensor, a shard outside the folder, a file cut short or no safetensors
            file, a tensor of another type than plain floats.
    """
    if (folder / _INDEX).is_file():
        shards = _read_index(folder / _INDEX, key)
    elif (folder / _SINGLE).is_file():
        shards = {_SINGLE: set()}
    else:
        raise ConfigError(_no_weights(folder, key))
    shapes: Shapes = {}
    for shard, expected in sorted(shards.items()):
        path = folder / shard
        if not _is_file(path):
            raise ConfigError(
                f"{key}={folder}: {_INDEX} names {shard}, which is missing; fetch the model again"
            )
        _check_place(path, key)
        found = _check_file(path, key)
        missing = expected - found.keys()
        if missing:
            raise ConfigError(f"{key}={folder}: {shard} lacks {min(missing)}, which {_INDEX} promises there")
        shapes |= found
    return shapes


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A name that is too long, or with a NUL.
        return False


def _check_place(path: Path, key: str) -> None:
    """Refuse a link to what is no file of weights, as a folder from elsewhere may hold it; hub caches are made of links."""
    folder, target = path.parent.resolve(), path.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if target.suffix != path.suffix and not any(target.is_relative_to(home) for home in homes):
        raise ConfigError(
            f"{key}: {path} is a link to {target}, which is no safetensors file; put the file itself there"
        )


def _no_weights(folder: Path, key: str) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{key}={folder} holds its weights as {pickles[0]}; only safetensors are read (a pickle can run code): "
            "convert it with save_pretrained of transformers"
        )
    return f"{key}={folder} holds no weights; it needs {_SINGLE}, or {_INDEX} and the files that it names"


def _read_index(path: Path, key: str) -> dict[str, set[str]]:
    """Return the tensor names of each shard that an index names."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(shard), str(name)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} is not a safetensors index with a weight_map ({error})") from error
    shards: dict[str, set[str]] = {}
    for shard, name in pairs:
        # A plain name stays in the folder on every system: no separator, no drive, no parent.
        if Path(shard).name != shard or "\\" in shard or ":" in shard or not shard.endswith(".safetensors"):
            raise ConfigError(
                f"{key}: {path} names the file {shard!r}; a plain name ending in .safetensors is right"
            )
        shards.setdefault(shard, set()).add(name)
    if not shards:
        raise ConfigError(f"{key}: {path} names no file; the model has no weights")
    return shards


def _check_file(path: Path, key: str) -> Shapes:
    """Return the shapes of the tensors of a safetensors file whose length agrees with its header."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise ConfigError(f"{key}: {path} is not a safetensors file ({size_bytes} bytes); fetch it again")
        if 8 + header_bytes > size_bytes:
            raise ConfigError(_cut_short(path, key, size_bytes, 8 + header_bytes))
        try:
            header: dict[str, Any] = json.loads(file.read(header_bytes))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise _broken(path, key, error) from error
    expected_bytes = 8 + header_bytes + end
    if size_bytes != expected_bytes:
        raise ConfigError(_cut_short(path, key, size_bytes, expected_bytes))
    return _shapes(path, key, tensors)


def _shapes(path: Path, key: str, tensors: dict[str, Any]) -> Shapes:
    """Return the shapes, once the reader of the format itself has found nothing wrong with the header."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, key, error) from error
    for name, entry in tensors.items():
        if entry["dtype"] not in _FLOATS:
            raise ConfigError(
                f"{key}: {path} holds {name} as {entry['dtype']}; plain floats are needed ({', '.join(_FLOATS)})"
            )
    return {name: tuple(entry["shape"]) for name, entry in tensors.items()}


def _broken(path: Path, key: str, error: Exception) -> ConfigError:
    return ConfigError(f"{key}: {path} has a broken safetensors header ({error}); fetch it again")


def _cut_short(path: Path, key: str, size_bytes: int, expected_bytes: int) -> str:
    fault = "is cut short" if size_bytes < expected_bytes else "is too long"
    return (
        f"{key}: {path} {fault}: {size_bytes} bytes where its header needs {expected_bytes}; fetch it again"
    )
