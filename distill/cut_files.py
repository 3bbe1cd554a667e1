"""Read a checkpoint's tensors one by one and write those of a cut model, shard by shard.

Decides that a checkpoint holds exactly the parameters of its model: a tensor left over on either side, another shape or a
type that is no plain float is an error before anything is written. What transformers ignores is ignored (rotary
buffers; a tied head that repeats the embeddings). In memory are the shard being filled and the tensors that `produce`
reads for one of its entries. Knows nothing of what is cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.config import ConfigError
from distill.weight_files import check_weight_files
from parallel.weights import ROTARY_BUFFER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Return the tensor."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def stored_parameters(folder: Path, model: PreTrainedModel, *, key: str) -> dict[str, Stored]:
    """Return where each parameter of a model lies, in the order of files.

    Args:
        folder: Hugging Face folder with safetensors.
        model: the model that they belong to, on the meta device.
        key: the setting that names the folder, for messages.
    Raises:
        ConfigError: a file is damaged; a tensor is missing, unknown, of another shape or of another type than floats.
    """
    check_weight_files(folder, key=key)
    parameters = dict(model.named_parameters())
    found: dict[str, Stored] = {}
    for path in _shards(folder):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not ROTARY_BUFFER.search(name)]  # noqa: SIM118
            for name in names:
                header = file.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise ConfigError(
                        f"{key}: {path} holds {name} as {header.get_dtype()}; pruning needs plain floats"
                    )
                shape = tuple(header.get_shape())
                found[name] = Stored(name, path, shape, DTYPES[header.get_dtype()])
    if model.config.tie_word_embeddings and "lm_head.weight" in found:
        _check_tied(found.pop("lm_head.weight"), found, key)
    for name, stored in found.items():
        if name not in parameters:
            raise ConfigError(
                f"{key}: {stored.path} holds {name}, which {type(model).__name__} does not have"
            )
        if stored.shape != tuple(parameters[name].shape):
            raise ConfigError(
                f"{key}: {stored.path} holds {name} of shape {stored.shape}, but its config says "
                f"{tuple(parameters[name].shape)}"
            )
    missing = sorted(parameters.keys() - found.keys())
    if missing:
        raise ConfigError(f"{key}: {folder} lacks the tensors of {', '.join(missing[:3])}")
    return found


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [
        folder / shard
        for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    ]


def _check_tied(head: Stored, found: Mapping[str, Stored], key: str) -> None:
    """Accept a copy of the embeddings as the head of a tied checkpoint, nothing else."""
    embeddings = next(stored for name, stored in found.items() if name.endswith("embed_tokens.weight"))
    if not torch.equal(head.read(), embeddings.read()):
        raise ConfigError(
            f"{key}: {head.path} ties lm_head to the embeddings, but holds another lm_head.weight"
        )


def write_tensors(
    folder: Path, sizes_bytes: Mapping[str, int], produce: Callable[[str], Tensor], *, max_shard_bytes: int
) -> None:
    """Write tensors as the safetensors of a Hugging Face folder, one file in memory at a time.

    Args:
        folder: is there, without weights.
        sizes_bytes: of each tensor by name, in the order of writing.
        produce: name -> the tensor; called once for each.
        max_shard_bytes: largest file; a tensor larger than that has its own.
    """
    shards = _split(sizes_bytes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        many = len(shards) > 1
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        save_file({name: produce(name) for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes_bytes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _split(sizes_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Return the names of each weight file."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, size_bytes in sizes_bytes.items():
        if shards[-1] and filled_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    return shards
