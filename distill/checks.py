"""What a user may ask for, as far as the settings alone show it: values, sizes that must divide, and settings that fit the world.

Decides, with `bounds`, `loss_checks`, `student_checks`, `optimizer_checks` and `judging_checks`, the sentence of every such mistake, each naming
the key, its value and what would be right. Assumes a `Config` with the right types (`distill.convert`). Needs no torch, so
a command can refuse within a second of its start. What fits the models, `model_checks` and `shape` say; whether a name is that of
a causal LM, `pretrained` finds out.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill.bounds import check_bounds
from distill.config import Config, ConfigError, Train
from distill.convert import config_to_dict, either, flatten, round_config, show
from distill.judging_checks import check_judging
from distill.loss_checks import check_loss
from distill.optimizer_checks import check_optimizer
from distill.places import check_writable
from distill.rounds import rounds_of
from distill.student_checks import check_student
from distill.student_config import Prune, Sparsity

_POSITIVE = (
    "student.prune.min_channels",
    "student.prune.num_layers",
    "student.prune.hidden_size",
    "student.prune.intermediate_size",
    "student.prune.num_attention_heads",
    "student.prune.num_key_value_heads",
    "student.prune.calibration_rows",
    "student.prune.candidates",
    "student.sparsity.steps",
    "student.low_rank.params",
    "loss.top_k",
    "loss.hidden.every",
    "mesh.pp",
    "mesh.tp",
    "pipeline.virtual_stages",
    "pipeline.slices",
    "pipeline.measure_steps",
    "data.seq_len",
    "train.global_batch_size",
    "train.microbatch_size",
    "train.steps",
    "train.tokens",
    "train.timeout_s",
    "train.max_skipped_steps",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.clip",
    "gate.repeats",
    "checkpoint.keep",
    "log.every",
    "log.health_limit_s",
    "evaluate.rows",
)
_NO_CLIPPING = "must be a number above 0; use null for no clipping"
_NOT_NEGATIVE = (
    "train.seed",
    "pipeline.replan_every",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "checkpoint.every",
    "evaluate.every",
)
_SHARES = ("optimizer.min_lr_ratio",)
_WORDS = {
    "student.prune.method": ("activation", "l1", "l2", "random"),
    "student.prune.depth_method": (None, "block_influence", "leave_one_out", "random"),
    "student.sparsity.method": (None, "magnitude", "wanda"),
    "student.sparsity.pattern": ("unstructured", "2:4"),
    "student.sparsity.schedule": ("at_once", "cubic", "linear"),
    "loss.hidden.kind": ("mse", "cosine"),
    "loss.hidden.projection": ("learned", "none"),
    "loss.kind": ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "top_k_kl"),
    "pipeline.schedule": ("gpipe", "1f1b", "interleaved", "zero_bubble"),
    "pipeline.teacher": ("fill", "inline", "batch"),
    "train.recompute": ("none", "selective", "full"),
    "train.dtype": ("bfloat16", "float32", "float64"),
    "optimizer.engine": ("torch", "deepspeed"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "optimizer.moments": ("keep", "reset"),
    "log.wandb": ("offline", "online", "disabled"),
    "run.device": ("auto", "cpu", "cuda"),
    "export.low_rank": ("merged", "factored"),
}


def check_config(
    config: Config, *, world_size: int, needs: Iterable[str] = ("teacher.model", "data.path")
) -> Config:
    """Check every setting that can be judged without the models, and fill in `mesh.dp`.

    Args:
        world_size: processes of this run.
        needs: keys that the command cannot do without.
    Returns:
        The same settings with `mesh.dp` > 0.
    Raises:
        ConfigError: the first mistake found.
    """
    _check_rounds(config)
    rounds = rounds_of(config)
    for index, settings in enumerate(rounds):
        try:
            _check_settings(settings)
        except ConfigError as error:
            if len(rounds) == 1 or _is_shared(config, error):
                raise
            raise ConfigError(f"rounds[{index}]: {error}") from error
    if config.train.tokens is not None and config.train.steps != Train().steps:
        raise ConfigError(
            f"train.steps={config.train.steps} does nothing beside train.tokens={config.train.tokens}; leave one of them out"
        )
    config = fill_mesh(config, world_size)
    for index, settings in enumerate(rounds):
        _check_ratio(config, index, settings.student.prune)
        _check_batch(replace(settings, mesh=config.mesh))
        # An earlier round's student is not there yet.
        own = round_config(config, index).teacher == settings.teacher
        _check_paths(settings if own else replace(settings, teacher=config.teacher), needs)
    _check_sparsity([settings.student.sparsity for settings in rounds])
    check_judging(config.evaluate)
    if config.log.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"log.wandb={config.log.wandb} needs wandb, which is not installed; use disabled")
    return config


def fill_mesh(config: Config, world_size: int) -> Config:
    """Return the settings with `mesh.dp` = what pp and tp leave of the world.

    Raises:
        ConfigError: the mesh does not have exactly `world_size` places.
    """
    mesh = config.mesh
    model_size = mesh.pp * mesh.tp
    if mesh.dp == -1:
        if world_size % model_size:
            raise ConfigError(
                f"mesh.pp={mesh.pp} x mesh.tp={mesh.tp} = {model_size} does not divide the number of processes, "
                f"{world_size}; start a multiple of {model_size} (.venv/bin/python -m launch.torchrun --nproc-per-node "
                f"{model_size} -m launch.distill ...), or use sizes whose product divides {world_size}"
            )
        return replace(config, mesh=replace(mesh, dp=world_size // model_size))
    if mesh.dp < 1:
        raise ConfigError(f"mesh.dp={mesh.dp} must be at least 1, or -1 for what is left of the processes")
    if model_size * mesh.dp != world_size:
        raise ConfigError(
            f"mesh.pp={mesh.pp} x mesh.dp={mesh.dp} x mesh.tp={mesh.tp} = {model_size * mesh.dp}, but the number of "
            f"processes is {world_size}; start {model_size * mesh.dp} or change the sizes"
        )
    return config


def _check_rounds(config: Config) -> None:
    if not config.rounds:
        raise ConfigError(
            "rounds=[] must have an entry for each round; use [{}] for one as the other keys say"
        )


def _is_shared(config: Config, error: ConfigError) -> bool:
    """Whether a mistake is made by the keys that all rounds share, whatever an entry says."""
    try:
        _check_settings(round_config(replace(config, rounds=({},)), 0))
    except ConfigError as shared:
        return str(shared) == str(error)
    return False


def _check_settings(settings: Config) -> None:
    """Check all values of one round's settings."""
    check_loss(settings.loss, settings.train.steps)
    _check_values(flatten(config_to_dict(settings)))


def _check_ratio(config: Config, index: int, prune: Prune) -> None:
    """Check that the ratio an entry of `rounds` names is not idle because sizes are set, there or for all rounds."""
    key = "student.prune.pruning_ratio"
    if key in flatten(config.rounds[index]) and (sizes := prune.sizes):
        name, value = next(iter(sizes.items()))
        raise ConfigError(
            f"rounds[{index}].{key}={prune.pruning_ratio} does nothing beside student.prune.{name}={show(value)}; leave "
            f"it out, or set {name} to null for this round"
        )


def _check_sparsity(rounds: Sequence[Sparsity]) -> None:
    """Check that no round asks to hold less than the one before: what is held stays held."""
    for index, (before, now) in enumerate(pairwise(rounds), start=1):
        if before.method is not None and now.method is not None and now.share < before.share:
            raise ConfigError(
                f"rounds[{index}].student.sparsity holds {now.share:g} of the weights at zero, but the round before {before.share:g}, "
                f"and what is held stays held; use a ratio of {before.share:g} or more, or method: null, which lets all weights train"
            )


def _check_values(flat: dict[str, Any]) -> None:
    """Check single values; a null is one that the type allows."""
    for key, words in _WORDS.items():
        value = flat[key]
        if value not in words:
            raise ConfigError(f"{key}={show(value)} is not known; use {either(map(show, words))}")
    for key in _POSITIVE:
        if flat[key] is not None and not 0 < flat[key] < math.inf:
            wanted = _NO_CLIPPING if key == "optimizer.clip" else "must be greater than 0"
            raise ConfigError(f"{key}={flat[key]} {wanted}")
    for key in _NOT_NEGATIVE:
        if not 0 <= flat[key] < math.inf:
            raise ConfigError(f"{key}={flat[key]} must be 0 or more")
    for key in _SHARES:
        if not 0 <= flat[key] <= 1:
            raise ConfigError(f"{key}={flat[key]} is outside 0 to 1")
    if not 0 <= (ratio := flat["student.prune.pruning_ratio"]) < 1:
        raise ConfigError(f"student.prune.pruning_ratio={ratio} must be 0 or more and less than 1")
    if not 0 < (fraction := flat["data.held_out_fraction"]) < 1:
        raise ConfigError(f"data.held_out_fraction={fraction} must be greater than 0 and less than 1")
    if not all(0 <= beta < 1 for beta in flat["optimizer.betas"]):
        raise ConfigError(
            f"optimizer.betas={show(flat['optimizer.betas'])} must each be 0 or more and less than 1"
        )
    check_bounds(flat)
    _check_related(flat)


def _check_related(flat: dict[str, Any]) -> None:
    """Check values of one group against each other."""
    _check_weights(flat["data.weights"], flat["data.path"])
    _check_virtual_stages(flat)
    check_student(flat)
    check_optimizer(flat)
    if flat["train.compile"] and flat["train.recompute"] == "selective":
        raise ConfigError("train.compile=true does not go with train.recompute=selective; use none or full")
    for key in ("pipeline.student_layers", "pipeline.teacher_layers"):
        if flat[key] is not None and (not flat[key] or min(flat[key]) < 1):
            raise ConfigError(f"{key}={show(flat[key])} must be 1 or more for each stage, or null")
    if flat["optimizer.warmup_steps"] > flat["train.steps"]:
        raise ConfigError(
            f"optimizer.warmup_steps={flat['optimizer.warmup_steps']} is more than train.steps={flat['train.steps']}; "
            "use fewer"
        )


def _check_weights(weights: Any, paths: Any) -> None:
    if weights is None:
        return
    if isinstance(paths, str) or paths is None or len(paths) != len(weights):
        raise ConfigError(
            f"data.weights={show(weights)} must have a number for each entry of the list data.path={show(paths)}"
        )
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError(f"data.weights={show(weights)} must each be 0 or more, and one of them more")


def _check_virtual_stages(flat: dict[str, Any]) -> None:
    virtual_stages, schedule = flat["pipeline.virtual_stages"], flat["pipeline.schedule"]
    if virtual_stages == 1:
        return
    if schedule not in ("interleaved", "gpipe"):
        raise ConfigError(
            f"pipeline.virtual_stages={virtual_stages} does not go with pipeline.schedule={schedule}; use "
            "interleaved or gpipe, or 1"
        )
    if flat["mesh.pp"] == 1:
        raise ConfigError(f"pipeline.virtual_stages={virtual_stages} needs mesh.pp of 2 or more; use 1")


def _check_batch(config: Config) -> None:
    rows, unit = config.train.global_batch_size, config.mesh.dp * config.train.microbatch_size
    if rows % unit:
        near = [size for size in (rows // unit * unit, (rows // unit + 1) * unit) if size]
        raise ConfigError(
            f"train.global_batch_size={rows} is not a multiple of mesh.dp={config.mesh.dp} x "
            f"train.microbatch_size={config.train.microbatch_size} = {unit}; use {either(near)}"
        )


def _check_paths(config: Config, needs: Iterable[str]) -> None:
    """Check that what must be named is named, and that what looks like a local path is there."""
    flat = flatten(config_to_dict(config))
    advice = {
        "teacher.model": "a hub id, a folder, a GGUF file or embedded",
        "student.model": "a hub id, a folder or a GGUF file",
        "data.path": "a file, a folder, a list of files, a data set id or pydoc",
    }
    if "teacher.model" in needs:
        check_writable("data.cache_dir", config.data.cache_dir)
    for key in needs:
        if not flat[key]:
            raise ConfigError(f"{key}={show(flat[key])} must be given; use {advice[key]}")
    paths = flat["data.path"]
    named = {("data.path", path) for path in ([paths] if isinstance(paths, str) else paths or [])}
    named |= {(key, flat[key]) for key in ("teacher.model", "student.model") if flat[key] is not None}
    for key, name in sorted(named):
        if _is_local(name) and not Path(name).expanduser().exists():
            raise ConfigError(f"{key}={name} does not exist; use {advice[key]}")


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: hub ids are `name` or `owner/name`, without a suffix of a text or weight file."""
    suffixes = (".gguf", ".txt", ".md", ".jsonl", ".json", ".parquet")
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith((*suffixes, "/"))
