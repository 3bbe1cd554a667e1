"""Cut a student out of a teacher: which units stay, and the student's Hugging Face folder.

Decides by scores alone: within each layer the best feed-forward channels and query groups, over the model the best
residual channels and layers; what stays keeps its order. Assumes a uniform shape (`distill.shape`). The checkpoint is
cut as a stream, one tensor in memory beside the shard being filled, and strictly: every tensor of the teacher is used
or belongs to a dropped layer, every parameter of the student is written. The folder appears whole or not at all.

A cut of the residual width changes the scale of what it leaves, and this is corrected in the weights (c = sqrt(D/D')):

- Norms over the residual width divide by a root mean square over D entries. With the dropped ones zero that is 1/c of
  the mean over the D' that stay, so the norm's weight is multiplied by c (as 1 + w in Gemma). For RMS norms the student
  then equals the teacher with the dropped residual channels zeroed, up to the norm's epsilon; for layer norms
  (starcoder2), whose mean is over fewer entries too, it is close but no identity. Measured on SmolLM2 cut to 480
  residual channels and 6 heads, without training: perplexity 114 with this, 158 without.
- Gemma multiplies embeddings by sqrt(hidden size): they are multiplied by c. Tied to the head they scale the logits
  as well, so the final norm then stays as it was.

Not changed: attention scales (head width, query_pre_attn_scalar, Granite's multipliers), because no head changes, and
q_norm and k_norm where they run over all heads (olmo2) when heads are cut: the kept heads are then divided by their own
root mean square, which stands for that of all heads.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.atomic import build_once
from distill.config import ConfigError
from distill.scores import Scores
from distill.shape import Shape, student_config
from distill.structure import Kept, Layout, Sizes, Unit, cut, layout_of, student_name
from distill.weight_files import check_weight_files
from parallel.model import build_meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEPT_FOLDER = "pruning"
"""Inside a student's folder: apart from the weights, because inference engines read every safetensors file beside them."""
KEPT_FILE = "kept.safetensors"
PROVENANCE_FILE = "provenance.json"

_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "LICENSE*",
)
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def choose(scores: Scores, config: PretrainedConfig, shape: Shape) -> Kept:
    """Return the units of the teacher that a student of this shape keeps.

    Args:
        scores: of every layer of the teacher.
        config: the teacher's.
        shape: the student's.
    """
    sizes = Sizes.of(config)
    assert sorted(scores.layers) == list(range(sizes.layers)), (
        f"scores of layers {sorted(scores.layers)}, {sizes}"
    )
    layers = shape.layers
    if layers is None:
        influence = torch.tensor([scores.layers[layer] for layer in range(sizes.layers)], dtype=torch.float64)
        layers = tuple(_best(influence, shape.num_layers).tolist())
    return Kept(
        hidden=_best(scores.hidden, shape.hidden_size),
        ffn={layer: _best(scores.ffn[layer], shape.intermediate_size) for layer in layers},
        groups={layer: _best(scores.groups[layer], shape.num_key_value_heads) for layer in layers},
        layers=layers,
    )


@dataclass(frozen=True)
class _Rescale:
    """The factors that correct a cut of the residual width; all 1 without one."""

    norms: float
    final_norm: float
    embedding: float
    norm_offset: float
    """1 where a norm multiplies by 1 + weight, else 0."""

    def apply(self, tensor: Tensor, layout: Layout, leaf: str) -> Tensor:
        """Return a parameter, already cut, with its scale corrected."""
        if layout.module == "embed_tokens":
            factor, offset = self.embedding, 0.0
        elif layout.dims == ((Unit.HIDDEN,),) and leaf == "weight":
            factor, offset = self.final_norm if layout.module == "norm" else self.norms, self.norm_offset
        else:
            return tensor
        if factor == 1.0:
            return tensor
        return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)


def _rescale(teacher: PreTrainedModel, student: PreTrainedModel) -> _Rescale:
    norms = math.sqrt(teacher.config.hidden_size / student.config.hidden_size)
    if norms == 1.0:
        return _Rescale(1.0, 1.0, 1.0, 0.0)
    scales = [
        getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0) for model in (teacher, student)
    ]
    embedding = scales[0] / scales[1]
    final_norm = norms / embedding if teacher.config.tie_word_embeddings else norms
    return _Rescale(norms, final_norm, embedding, _norm_offset(student.base_model.norm))


def _norm_offset(norm: torch.nn.Module) -> float:
    """Return 1 if the norm multiplies by 1 + weight, 0 if by weight, by running one whose parameters are all zero."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for parameter in probe.parameters():
        torch.nn.init.zeros_(parameter)
    output = probe(torch.linspace(-1, 1, max(parameter.numel() for parameter in probe.parameters()))[None])
    return 1.0 if output.abs().max() > 0 else 0.0


@dataclass(frozen=True)
class _Job:
    """One tensor of the teacher that becomes one of the student."""

    name: str
    file: Path
    student_name: str
    layout: Layout
    size_bytes: int


def prune_checkpoint(
    source: Path,
    target: Path,
    config: PretrainedConfig,
    kept: Kept,
    *,
    provenance: Mapping[str, Any],
    max_shard_bytes: int = 2 * 2**30,
) -> PretrainedConfig:
    """Write the student that keeps `kept` of the teacher in `source` as a Hugging Face folder.

    Writes weights in the teacher's dtypes, config, generation config, tokenizer, and under `pruning/` the kept
    indices and `provenance` as JSON. Runs on one process; needs no more memory than a shard and its largest tensor.

    Args:
        source: the teacher's folder with safetensors and config.
        target: the student's folder; must not exist.
        config: the teacher's.
        kept: units of the teacher to keep.
        provenance: what to remember of the cut (method, keys, teacher's name); plain JSON values.
        max_shard_bytes: largest weight file, and so the memory it takes to write.
    Returns:
        The student's config.
    Raises:
        ConfigError: `target` exists; a tensor of the teacher is damaged, unknown, missing or of another shape.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it or name another folder for the pruned student")
    student = student_config(config, kept)
    models = build_meta_model(config), build_meta_model(student)
    if not student.architectures:
        student.architectures = [type(models[1]).__name__]
    jobs = _jobs(source, models, kept)
    sizes, rescale = Sizes.of(config), _rescale(*models)

    def write(folder: Path) -> None:
        folder.mkdir()
        _write_weights(folder, jobs, kept, sizes=sizes, rescale=rescale, max_bytes=max_shard_bytes)
        student.save_pretrained(folder)
        copy_companions(source, folder)
        _write_kept(folder / KEPT_FOLDER, kept, provenance)

    build_once(target, write)
    return student


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model's folder holds beside config and weights: tokenizer, generation config, licence."""
    for path in {path for pattern in _COMPANIONS for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def load_kept(folder: Path) -> tuple[Kept, dict[str, Any]]:
    """Return the kept indices of a pruned student's folder and the provenance written with them."""
    return Kept.load(folder / KEPT_FOLDER / KEPT_FILE)


def _write_kept(folder: Path, kept: Kept, provenance: Mapping[str, Any]) -> None:
    folder.mkdir()
    kept.save(folder / KEPT_FILE, provenance)
    text = json.dumps(dict(provenance), indent=2, sort_keys=True)
    (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


def _tensor_files(source: Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint, in the order of files."""
    check_weight_files(source, key="teacher.model")
    index = source / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files: dict[str, Path] = {}
    for shard in shards:
        with safe_open(source / shard, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), source / shard)
    return files


def _jobs(source: Path, models: tuple[PreTrainedModel, PreTrainedModel], kept: Kept) -> list[_Job]:
    """Pair every tensor of the checkpoint with a parameter of the student, strictly both ways."""
    teacher, student = models
    sizes = Sizes.of(teacher.config)
    parameters = dict(student.named_parameters())
    files = _tensor_files(source)
    if teacher.config.tie_word_embeddings and "lm_head.weight" in files:
        _check_tied(files.pop("lm_head.weight"), files)
    jobs: list[_Job] = []
    for name, path in files.items():
        if _ROTARY_BUFFER.search(name):
            continue
        with safe_open(path, framework="pt") as file:
            header = file.get_slice(name)
            layout = layout_of(name, tuple(header.get_shape()), sizes)
            itemsize = _ITEM_BYTES.get(header.get_dtype())
        if itemsize is None:
            raise ConfigError(
                f"teacher.model: {path} holds {name} as {header.get_dtype()}; pruning needs plain floats"
            )
        new_name = student_name(name, kept)
        if new_name is None:
            continue
        if new_name not in parameters:
            raise ConfigError(
                f"teacher.model: {path} holds {name}, which {type(student).__name__} does not have"
            )
        jobs.append(_Job(name, path, new_name, layout, parameters[new_name].numel() * itemsize))
    missing = parameters.keys() - {job.student_name for job in jobs}
    if missing:
        raise ConfigError(
            f"teacher.model: {source} lacks the tensors of the student's {', '.join(sorted(missing)[:3])}"
        )
    return jobs


def _check_tied(head: Path, files: Mapping[str, Path]) -> None:
    """Accept a copy of the embeddings as the head of a tied checkpoint, nothing else."""
    name = next(name for name in files if name.endswith("embed_tokens.weight"))
    with safe_open(head, framework="pt") as file, safe_open(files[name], framework="pt") as other:
        if not torch.equal(file.get_tensor("lm_head.weight"), other.get_tensor(name)):
            raise ConfigError(
                f"teacher.model: {head} ties lm_head to the embeddings, but holds another lm_head.weight"
            )


def _shards(jobs: list[_Job], max_shard_bytes: int) -> list[list[_Job]]:
    """Return the tensors of each weight file."""
    shards: list[list[_Job]] = [[]]
    filled_bytes = 0
    for job in jobs:
        if shards[-1] and filled_bytes + job.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(job)
        filled_bytes += job.size_bytes
    return shards


def _write_weights(
    folder: Path, jobs: list[_Job], kept: Kept, *, sizes: Sizes, rescale: _Rescale, max_bytes: int
) -> None:
    shards = _shards(jobs, max_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        shard_name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        tensors: dict[str, Tensor] = {}
        for job in shard:
            with safe_open(job.file, framework="pt") as file:
                tensor = cut(file.get_tensor(job.name), job.layout, sizes, kept)
            tensors[job.student_name] = rescale.apply(tensor, job.layout, job.name.rpartition(".")[2])
        save_file(tensors, folder / shard_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(job.size_bytes for job in jobs)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
