"""A student's Hugging Face folder out of a checkpoint alone: one process, without the run, its layout or the teacher.

Decides that the weights are those which the run itself exports at that step, bit for bit: masters rounded to the type that it
trained in, and factors merged after that. What is trained beside the model (projections of hidden states) and the
optimizer's moments are left out; anything else left over on either side is an error. Tensors are read one by one; in memory
is the file being filled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from distill.atomic import build_once
from distill.companions import STUDENT, read_settings
from distill.config import Config, ConfigError
from distill.cut_files import write_tensors
from distill.deploy.export import merged_config, model_card, write_config
from distill.failures import RunFailed
from distill.hidden_map import PROJECTION
from distill.loading import DTYPES
from distill.prune import KEPT_FOLDER, copy_companions, load_kept, write_modeling_code
from distill.rounds import Progress
from distill.structure import MATRICES, layer_module
from parallel.checkpoint import open_files
from parallel.checkpoint_files import CheckpointFiles
from parallel.checkpoint_folders import verify
from parallel.checkpoint_manifest import CheckpointError, CheckpointOutOfReach, Manifest
from parallel.factored import merge_factors, ranks_of
from parallel.mesh import Mesh
from parallel.model import build_meta_model

MAX_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class _Source:
    """A sound checkpoint, opened."""

    folder: Path
    manifest: Manifest
    settings: Config
    """Of the round that wrote it."""
    model_config: PretrainedConfig
    """The student's, as it is trained."""
    files: CheckpointFiles

    @property
    def dtype(self) -> torch.dtype:
        """Type that the student trains in."""
        return DTYPES[self.settings.train.dtype]


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    *,
    low_rank: str | None = None,
    for_training: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the student of a checkpoint as a Hugging Face folder with tokenizer and model card, whole or not at all.

    Args:
        checkpoint: a folder `checkpoints/step-N`; nothing outside it is read.
        target: must not exist.
        low_rank: factored linears `merged` or `factored`; None: as the run's settings say.
        for_training: whether only a run will load the folder, so that no code for transformers need exist.
        max_shard_bytes: largest weight file, and so the memory it takes to write.
    Raises:
        ConfigError: the checkpoint is not sound or holds no student, `target` exists, or transformers could not load it.
        RunFailed: it cannot be read here and now.
        OSError: the folder cannot be written.
    """
    if target.exists():
        raise ConfigError(f"out={target} exists already; remove it or name another folder")
    try:
        manifest = verify(checkpoint, Mesh.single())
        settings = read_settings(checkpoint)
        model_config = _student_config(checkpoint / STUDENT)
        with open_files(checkpoint, manifest) as files:
            source = _Source(checkpoint, manifest, settings, model_config, files)
            merges = (low_rank or settings.export.low_rank) == "merged"
            if not merges and not for_training and ranks_of(model_config) and model_config.is_heterogeneous:
                raise ConfigError(
                    f"export.low_rank=factored does not go with layers of different widths, which the student of {checkpoint} has; "
                    "use merged"
                )
            build_once(target, lambda folder: _write(source, folder, merges, max_shard_bytes))
    except CheckpointOutOfReach as error:
        raise RunFailed(f"checkpoint={checkpoint}: {error}") from error
    except CheckpointError as error:
        raise ConfigError(f"checkpoint={checkpoint}: {error}") from error


def _write(source: _Source, folder: Path, merges: bool, max_shard_bytes: int) -> None:
    """Write the whole folder; a tensor that is missing or left over is seen before the first weight is read."""
    folder.mkdir()
    written = merged_config(source.model_config) if merges else source.model_config
    trained, model = _built(source.model_config), _built(written)
    _check_names(source, trained)
    sizes_bytes = {name: each.numel() * source.dtype.itemsize for name, each in model.named_parameters()}
    write_tensors(folder, sizes_bytes, _producer(source, merges=merges), max_shard_bytes=max_shard_bytes)
    write_config(source.model_config, folder, dtype=source.dtype, merge_factors=merges)
    write_modeling_code(folder, model)
    copy_companions(source.folder / STUDENT, folder)
    if (source.folder / STUDENT / KEPT_FOLDER).is_dir():
        shutil.copytree(source.folder / STUDENT / KEPT_FOLDER, folder / KEPT_FOLDER)
    (folder / "README.md").write_text(_card(source, low_rank="merged" if merges else "factored"), "utf-8")


def _student_config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read ({_first_line(error)})") from error


def _built(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a config on the meta device."""
    try:
        return build_meta_model(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"its student/config.json builds no causal LM ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_names(source: _Source, model: PreTrainedModel) -> None:
    """Raise CheckpointError unless the checkpoint holds the student's parameters, all of them and nothing unknown."""
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    for name, shape in shapes.items():
        found = source.files.shape(f"weight/{name}")
        if found != shape:
            raise CheckpointError(f"weight/{name} is {list(found)}, its config says {list(shape)}")
    for name in sorted(source.files.names):
        # What the optimizer keeps of a parameter has its name too.
        _, _, parameter = name.partition("/")
        if parameter not in shapes and not parameter.startswith(PROJECTION):
            raise CheckpointError(f"it holds {name!r}, which {type(model).__name__} does not have")


def _producer(source: _Source, *, merges: bool) -> Callable[[str], Tensor]:
    """Return what gives a tensor of the written folder by its name."""
    ranks = ranks_of(source.model_config) if merges else {}

    def read(name: str) -> Tensor:
        return source.files.read(f"weight/{name}").to(source.dtype)

    def produce(name: str) -> Tensor:
        linear, _, leaf = name.rpartition(".")
        if linear not in ranks:
            return read(name)
        parts = ("second.bias",) if leaf == "bias" else ("first.weight", "second.weight")
        factors = ((f"{linear}.{part}", read(f"{linear}.{part}")) for part in parts)
        return dict(merge_factors(factors, ranks))[name].to(source.dtype)

    return produce


def _card(source: _Source, *, low_rank: str) -> str:
    settings = source.settings
    settings = replace(settings, export=replace(settings.export, low_rank=low_rank))
    try:
        progress = Progress.from_dict(source.manifest.extras)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    summary: dict[str, Any] = {"tokens": progress.tokens, "step": progress.step, **_sparsity(source)}
    return model_card(
        settings,
        summary,
        origin=_origin(source),
        model_config=source.model_config,
    )


def _origin(source: _Source) -> str:
    """Return the model that the student was cut out of, as far as its folder remembers."""
    teacher = str(source.settings.teacher.model)
    folder = source.folder / STUDENT
    return load_kept(folder)[1].get("teacher", teacher) if (folder / KEPT_FOLDER).is_dir() else teacher


def _sparsity(source: _Source) -> Mapping[str, Any]:
    """Return the pattern and the share of the linears' weights that are held at zero, where some are."""
    masks = [
        name
        for name in sorted(source.files.names)
        if name.startswith("mask/")
        and name.endswith(".weight")
        and layer_module(name.removeprefix("mask/")) in MATRICES
    ]
    held = size = 0
    for name in masks:
        mask = source.files.read(name)
        held, size = held + int(mask.sum()), size + mask.numel()
    if not size:
        return {}
    return {"sparsity": {"pattern": source.settings.student.sparsity.pattern, "share": held / size}}
