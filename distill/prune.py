"""Cut a student out of a teacher: which units stay, and the student's Hugging Face folder.

Decides by scores alone: within each layer the best feed-forward channels and query groups, over the model the best
residual channels and layers; what stays keeps its order. How many a layer keeps is the shape's (`distill.shape`), or,
per layer, decided by ranking all layers together (`share_out`). The checkpoint is
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
import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.atomic import build_once
from distill.config import ConfigError
from distill.cut_config import MODELING_CLASS, MODELING_FILE, student_config
from distill.cut_files import stored_parameters, write_tensors
from distill.kept import Kept
from distill.saved_config import save_config
from distill.scores import Scores
from distill.shape import Shape
from distill.structure import Layout, Sizes, Unit, cut, layout_of, student_name
from parallel import layerwise as layerwise_module
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


_ROWS = 4096
"""Rows of an embedding that are in float64 at a time."""


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
    ffn = {layer: scores.ffn[layer] for layer in layers}
    groups = {layer: scores.groups[layer] for layer in layers}
    channels_of = dict.fromkeys(layers, shape.intermediate_size)
    groups_of = dict.fromkeys(layers, shape.num_key_value_heads)
    if (steps := shape.per_layer) is not None:
        channels_of, groups_of = ({layer: len(own) for layer, own in each.items()} for each in (ffn, groups))
        if steps.ffn is not None:
            channels_of = share_out(ffn, shape.intermediate_size, step=steps.ffn, fewest=steps.min_channels)
        if steps.groups is not None:
            groups_of = share_out(groups, shape.num_key_value_heads, step=steps.groups, fewest=1)
    return Kept(
        hidden=_best(scores.hidden, shape.hidden_size),
        ffn={layer: _best(ffn[layer], channels_of[layer]) for layer in layers},
        groups={layer: _best(groups[layer], groups_of[layer]) for layer in layers},
        layers=layers,
    )


def share_out(scores: Mapping[int, Tensor], mean: int, *, step: int, fewest: int) -> dict[int, int]:
    """Return how many units each layer keeps when all layers are ranked together.

    Layers are made comparable by dividing a layer's scores by their mean: the residual stream grows with depth, and raw
    scores would empty the early layers. What counts is then how unevenly a layer works: one that leans on a few
    units keeps few, one whose units all matter alike keeps many. Units go in runs of `step` from the best down, and the
    runs with the highest sums stay; of equal ones the earlier layer's.

    Args:
        scores: layer -> [units].
        mean: units to keep in a layer on average; all of them stay where that is all there are.
        step: what a layer keeps is a multiple of it (or all, if the layer has fewer).
        fewest: units that a layer keeps at least, rounded up to a multiple.
    """
    widths = {layer: len(score) for layer, score in scores.items()}
    if mean * len(scores) >= sum(widths.values()):
        return widths
    kept = {layer: min(-(-fewest // step) * step, widths[layer]) for layer in scores}
    runs: list[tuple[float, int, int]] = []
    for layer, score in scores.items():
        ranked = score.double().sort(descending=True).values / score.double().mean().clamp_min(1e-300)
        sums = ranked[: widths[layer] // step * step].view(-1, step).sum(dim=1).tolist()
        runs += [(-value, layer, number) for number, value in enumerate(sums)]
    left = mean * len(scores) - sum(kept.values())
    for _, layer, number in sorted(runs):
        if left >= step and (number + 1) * step > kept[layer]:
            kept[layer] += step
            left -= step
    return kept


@dataclass(frozen=True)
class Rescale:
    """The factors that correct a cut of the residual width; all 1 without one."""

    norms: float
    final_norm: float
    embedding: float
    norm_offset: float
    """1 where a norm multiplies by 1 + weight, else 0."""

    def factor(self, layout: Layout, name: str) -> float:
        """Return what a parameter, plus `norm_offset` where it is a norm's weight, is multiplied by."""
        if layout.module == "embed_tokens":
            return self.embedding
        if layout.dims == ((Unit.HIDDEN,),) and name.endswith(".weight"):
            return self.final_norm if layout.module == "norm" else self.norms
        return 1.0

    def apply(self, tensor: Tensor, layout: Layout, name: str) -> Tensor:
        """Return a parameter, already cut, with its scale corrected."""
        factor = self.factor(layout, name)
        if factor == 1.0:
            return tensor
        if layout.module == "embed_tokens":
            # A whole embedding in float64 can be larger than all else together.
            scaled = tensor.clone()
            for rows in scaled.split(_ROWS):
                rows.copy_(rows.double() * factor)
            return scaled
        return ((tensor.double() + self.norm_offset) * factor - self.norm_offset).to(tensor.dtype)


def rescale_of(teacher: PreTrainedModel, student: PreTrainedModel) -> Rescale:
    """Return the correction of a cut, from both models on the meta device."""
    norms = math.sqrt(teacher.config.hidden_size / student.config.hidden_size)
    if norms == 1.0:
        return Rescale(1.0, 1.0, 1.0, 0.0)
    scales = [
        getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0) for model in (teacher, student)
    ]
    embedding = scales[0] / scales[1]
    final_norm = norms / embedding if teacher.config.tie_word_embeddings else norms
    return Rescale(norms, final_norm, embedding, _norm_offset(student.base_model.norm))


def _norm_offset(norm: torch.nn.Module) -> float:
    """Return 1 if the norm multiplies by 1 + weight, 0 if by weight, by running one whose parameters are all zero."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for parameter in probe.parameters():
        torch.nn.init.zeros_(parameter)
    output = probe(torch.linspace(-1, 1, max(parameter.numel() for parameter in probe.parameters()))[None])
    return 1.0 if output.abs().max() > 0 else 0.0


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
    refuse_existing(target)
    student = student_config(config, kept)
    models = build_meta_model(config), build_meta_model(student)
    sources = {
        new_name: stored
        for name, stored in stored_parameters(source, models[0], key="teacher.model").items()
        if (new_name := student_name(name, kept)) is not None
    }
    sizes, rescale = Sizes.of(config), rescale_of(*models)

    def produce(name: str) -> Tensor:
        stored = sources[name]
        layout = layout_of(stored.name, stored.shape, sizes)
        return rescale.apply(cut(stored.read(), layout, sizes, kept), layout, name)

    write_student(
        target,
        student,
        models[1],
        {name: stored.dtype for name, stored in sources.items()},
        produce,
        companions=source,
        kept=kept,
        provenance=provenance,
        max_shard_bytes=max_shard_bytes,
    )
    return student


def refuse_existing(target: Path) -> None:
    """Raise ConfigError if something is at `target`."""
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it or name another folder for the pruned student")


def write_student(
    target: Path,
    config: PretrainedConfig,
    model: PreTrainedModel,
    dtypes: Mapping[str, torch.dtype],
    produce: Callable[[str], Tensor],
    *,
    companions: Path,
    kept: Kept,
    provenance: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    """Write a student's folder whole or not at all: weights, config, companions, and under `pruning/` what was kept.

    Args:
        config: the student's; gets the name of its architecture if it lacks one.
        model: the student on the meta device.
        dtypes: of its parameters, in the order of writing.
        produce: parameter's name -> the tensor.
        companions: the folder that tokenizer and generation config are copied from.
        kept, provenance: as `prune_checkpoint` takes them.
    """
    parameters = dict(model.named_parameters())
    sizes_bytes = {name: parameters[name].numel() * dtype.itemsize for name, dtype in dtypes.items()}
    if not config.architectures:
        config.architectures = [type(model).__name__]

    def write(folder: Path) -> None:
        folder.mkdir()
        write_tensors(folder, sizes_bytes, produce, max_shard_bytes=max_shard_bytes)
        save_config(config, folder)
        copy_companions(companions, folder)
        write_modeling_code(folder, model)
        _write_kept(folder / KEPT_FOLDER, kept, provenance)

    build_once(target, write)


def write_modeling_code(folder: Path, model: PreTrainedModel) -> None:
    """Write the code that builds a model whose layers differ in width; nothing for one that transformers builds itself."""
    if not model.config.is_heterogeneous:
        return
    (folder / MODELING_FILE).write_text(modeling_code(type(model).__name__), encoding="utf-8")


def modeling_code(base: str) -> str:
    """Return the code of a model whose layers differ in width; `base` is the family's class in transformers."""
    code = inspect.getsource(layerwise_module)
    code += (
        f"\n\nfrom transformers import {base}  # noqa: E402\n\n\nclass {MODELING_CLASS}(layerwise({base})):\n"
    )
    return code + f'    """{base} whose layers follow `config.per_layer_config`."""\n'


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model's folder holds beside config and weights: tokenizer, generation config, licence."""
    for path in companion_paths(source):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def companion_paths(source: Path) -> list[Path]:
    """Return the files and folders that `copy_companions` copies."""
    return sorted({path for pattern in _COMPANIONS for path in source.glob(pattern)})


def load_kept(folder: Path) -> tuple[Kept, dict[str, Any]]:
    """Return the kept indices of a pruned student's folder and the provenance written with them."""
    return Kept.load(folder / KEPT_FOLDER / KEPT_FILE)


def _write_kept(folder: Path, kept: Kept, provenance: Mapping[str, Any]) -> None:
    folder.mkdir()
    kept.save(folder / KEPT_FILE, provenance)
    text = json.dumps(dict(provenance), indent=2, sort_keys=True)
    (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")
