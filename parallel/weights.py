"""Weights between Hugging Face folders and stages: one table, read in both directions, strictly.

`parameter_table` lists every parameter of a stage with its Hugging Face name and the shard this rank owns. Loading,
exporting, checkpoints and the optimizer all use it. A rank reads only its own slices from safetensors files;
export gathers one tensor at a time. A key left over on either side is an error. Nothing here unpickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel import factored
from parallel.collectives import all_gather, barrier, gather_objects, shard_sizes
from parallel.layers import ShardSpec
from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, is_tied

ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""A buffer that older checkpoints hold among the weights; transformers passes it over as well."""
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class WeightsError(ValueError):
    """A folder's weights do not fit the model; the message names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """One parameter of a stage: where it lives, what Hugging Face calls it, which part this rank owns."""

    name: str
    """Hugging Face name of the whole tensor."""
    parameter: nn.Parameter
    shard: ShardSpec | None
    """None: replicated over tp."""
    tp: Axis
    is_tied_source: bool = False
    """The embedding of a tied model."""
    is_tied_copy: bool = False
    """The head of a tied model on a last stage that is not the first: its weight is the embedding's."""
    tp_partial_grad: bool = False
    """Replicated, but each tp rank's gradient is a partial sum (q_norm on local heads)."""
    layer: int | None = None
    """Global decoder layer after whose backward the gradient is complete: its own; the stage's last one for what follows
    the layers (final norm, head); None for what a backward completes at its very end (embedding)."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = list(self.parameter.shape)
        if self.shard is not None:
            shape[self.shard.dim] = self.shard.full
        return tuple(shape)


def parameter_table(stage: StageModel) -> list[Entry]:
    """Return the stage's parameters in module order, each once (a tied head on one stage is not listed apart)."""
    entries, seen = [], set()
    copies_embedding = is_tied(stage) and stage.is_last and not stage.is_first
    embedding_name = f"{stage.names.base}.{stage.names.embedding}.weight"
    for module_name, module in stage.causal_lm.named_modules():
        shards = getattr(module, "shards", {})
        for child, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{child}"
            tied_copy = copies_embedding and name == f"{stage.names.head}.weight"
            entries.append(
                Entry(
                    name=embedding_name if tied_copy else name,
                    parameter=parameter,
                    shard=shards.get(child) if getattr(module, "tp", Axis("tp")).size > 1 else None,
                    tp=getattr(module, "tp", Axis("tp")),
                    is_tied_source=is_tied(stage) and name == embedding_name,
                    is_tied_copy=tied_copy,
                    tp_partial_grad=parameter.tp_partial_grad,
                    layer=_layer_of(module_name, stage),
                )
            )
    return entries


def _layer_of(module_name: str, stage: StageModel) -> int | None:
    names = stage.names
    layers = f"{names.base}.{names.layers}."
    if module_name.startswith(layers):
        return int(module_name.removeprefix(layers).partition(".")[0])
    behind = (names.head, *(f"{names.base}.{name}" for name in names.tail))
    if stage.owned and any(f"{module_name}.".startswith(f"{name}.") for name in behind):
        return stage.owned[-1]
    return None


class WeightFiles:
    """The safetensors files of a Hugging Face folder, opened lazily; maps tensor names to slices.

    Raises:
        WeightsError: no safetensors, a file that the index names is missing or leaves the folder, a file cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.files = self._locate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _locate(self) -> dict[str, object]:
        index = self.folder / INDEX
        if index.exists():
            try:
                names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{index} is no index with a weight_map: {error!r}") from error
        elif (self.folder / SINGLE_FILE).exists():
            names = [SINGLE_FILE]
        else:
            raise WeightsError(f"{self.folder} holds no {SINGLE_FILE} and no {INDEX}")
        located: dict[str, object] = {}
        for name in names:
            if Path(name).name != name:
                raise WeightsError(f"{index} names the file {name!r}, which is outside the folder")
            try:
                handle = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{self.folder / name} cannot be read: {error}") from error
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                located[key] = handle
        return located

    def read(self, entry: Entry, *, may_be_longer: bool = False) -> Tensor:
        """Return this rank's slice of the tensor, in the file's dtype.

        Args:
            may_be_longer: take the first rows where the file has more.
        """
        if entry.name not in self.files:
            raise WeightsError(f"{self.folder} has no tensor {entry.name!r}, which the model needs")
        view = self.files[entry.name].get_slice(entry.name)
        shape, wanted = tuple(view.get_shape()), entry.full_shape
        longer = may_be_longer and shape[1:] == wanted[1:] and shape[0] > wanted[0]
        if shape != wanted and not longer:
            raise WeightsError(
                f"{self.folder}: tensor {entry.name!r} has shape {view.get_shape()}, the config says "
                f"{list(entry.full_shape)}"
            )
        if entry.shard is None and not longer:
            return view[:]
        where = [slice(0, size) for size in wanted]
        if entry.shard is not None:
            where[entry.shard.dim] = slice(entry.shard.start, entry.shard.stop)
        return view[tuple(where)]


@torch.no_grad()
def load_weights(stage: StageModel, folder: Path, *, may_be_padded: bool = False) -> None:
    """Fill the stage's parameters from a Hugging Face folder, reading only the slices this rank owns.

    Peak memory beyond the parameters is one slice.

    Args:
        may_be_padded: whether embedding and head may have more ids in the folder than the config says; the first ones are read.
    Raises:
        WeightsError: a tensor is missing, has another shape, or is left over (no stage of the model owns it).
    """
    with WeightFiles(folder) as files:
        known = set(stage.full_names)
        # Older checkpoints hold what is computed from the config.
        leftover = sorted(name for name in files.files.keys() - known if not ROTARY_BUFFER.search(name))
        if leftover:
            raise WeightsError(
                f"{folder} holds tensors that the model does not have: {', '.join(leftover[:8])}"
            )
        embedding = f"{stage.names.base}.{stage.names.embedding}."
        for entry in parameter_table(stage):
            has_ids = entry.name.startswith((embedding, f"{stage.names.head}."))
            entry.parameter.copy_(files.read(entry, may_be_longer=may_be_padded and has_ids))


def gather_tensor(local: Tensor, entry: Entry) -> Tensor:
    """Return the whole tensor of which `local` (same layout as the parameter) is this rank's part.

    Collectives: one all-gather over tp for a sharded parameter.
    """
    if entry.shard is None:
        return local
    sizes = shard_sizes(entry.shard.full, entry.tp.size)
    return all_gather(local.contiguous(), entry.tp, dim=entry.shard.dim, sizes=sizes)


def _whole_tensors(stage: StageModel, *, merge: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the stage's tensors whole, by name; with `merge` factors as the matrix that they make."""
    tensors = (
        (entry.name, gather_tensor(entry.parameter.detach(), entry))
        for entry in parameter_table(stage)
        if not entry.is_tied_copy
    )
    return factored.merge_factors(tensors, factored.ranks_of(stage.config)) if merge else tensors


def _batches(
    stage: StageModel, max_bytes: int, dtype: torch.dtype, *, merge: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield whole tensors in groups of at most `max_bytes` (at least one tensor)."""
    group: dict[str, Tensor] = {}
    size_bytes = 0
    for name, whole in _whole_tensors(stage, merge=merge):
        tensor = whole.to("cpu", dtype).contiguous()
        if group and size_bytes + tensor.nbytes > max_bytes:
            yield group
            group, size_bytes = {}, 0
        group[name] = tensor
        size_bytes += tensor.nbytes
    if group:
        yield group


@torch.no_grad()
def export_weights(
    stages: Sequence[StageModel],
    mesh: Mesh,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 2 * 1024**3,
    merge_factors: bool = False,
) -> None:
    """Write the whole model's weights as safetensors shards with an index, readable by `from_pretrained`.

    Every rank writes its own stages' files; no rank holds more than one file's tensors at a time. Tied heads are not
    written. The folder must exist.

    Args:
        stages: this rank's stages, in ascending order.
        dtype: of the file.
        max_shard_bytes: file size to stay under (one tensor may exceed it).
        merge_factors: write a factored linear as the one matrix that its factors make.
    Collectives: all-gathers over tp, then two over the world.
    """
    writes = mesh.dp.is_first and mesh.tp.is_first
    written: dict[str, str] = {}
    total_bytes = 0
    for chunk, stage in enumerate(stages):
        place = chunk * mesh.pp.size + mesh.pp.rank
        for number, group in enumerate(_batches(stage, max_shard_bytes, dtype, merge=merge_factors)):
            if writes:
                file = f"model-stage{place:03d}-{number:05d}.safetensors"
                save_file(group, folder / file, metadata={"format": "pt"})
                written |= dict.fromkeys(group, file)
                total_bytes += sum(tensor.nbytes for tensor in group.values())
    reports = gather_objects((written, total_bytes), mesh.world)
    if mesh.world.is_first:
        weight_map = {name: file for names, _ in reports for name, file in names.items()}
        index = {"metadata": {"total_size": sum(size for _, size in reports)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    barrier(mesh.world)
