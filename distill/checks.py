"""What a user may ask for: values, sizes that must divide, and settings that fit the models and the world.

Decides: the sentence of every mistake that can be seen before weights are read, each naming the key, its value and
what would be right. Assumes a `Config` with the right types (`distill.convert`). Needs no torch and no weights, so a
command can refuse within a second of its start. Whether a name is that of a causal LM, `distill.pretrained` finds out.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.config import Config, ConfigError
from distill.convert import config_to_dict, either, flatten, round_config, show

_POSITIVE = (
    "student.prune.min_channels",
    "student.prune.num_layers",
    "student.prune.hidden_size",
    "student.prune.intermediate_size",
    "student.prune.num_attention_heads",
    "student.prune.num_key_value_heads",
    "student.prune.calibration_rows",
    "student.prune.candidates",
    "loss.temperature",
    "mesh.pp",
    "mesh.tp",
    "pipeline.virtual_stages",
    "pipeline.slices",
    "pipeline.measure_steps",
    "data.seq_len",
    "train.global_batch_size",
    "train.microbatch_size",
    "train.steps",
    "train.timeout_s",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.clip",
    "checkpoint.keep",
    "log.every",
    "evaluate.rows",
)
_NOT_NEGATIVE = (
    "train.seed",
    "pipeline.replan_every",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "checkpoint.every",
    "evaluate.every",
)
_SHARES = ("loss.alpha", "optimizer.min_lr_ratio")
_WORDS = {
    "student.prune.method": ("activation", "l1"),
    "loss.kind": ("forward_kl",),
    "pipeline.schedule": ("gpipe", "1f1b", "interleaved", "zero_bubble"),
    "pipeline.teacher": ("fill", "inline", "batch"),
    "train.recompute": ("none", "selective", "full"),
    "train.dtype": ("bfloat16", "float32", "float64"),
    "optimizer.engine": ("torch",),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "log.wandb": ("offline", "online", "disabled"),
    "run.device": ("auto", "cpu", "cuda"),
}
_LATER = {
    "optimizer.engine": ("deepspeed",),
}
"""Words that CONTRACT promises and the code does not have yet."""


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
    for index in range(len(config.rounds)):
        _check_values(flatten(config_to_dict(round_config(config, index))))
    config = fill_mesh(config, world_size)
    _check_batch(config)
    _check_paths(config, needs)
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
                f"{world_size}; start a multiple of {model_size} or use sizes whose product divides {world_size}"
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


def check_models(config: Config, teacher: Any, student: Any) -> None:
    """Check the settings against the models' transformers configs; `mesh.dp` must be filled in.

    Args:
        teacher, student: `PretrainedConfig`s; the student's is the pruned one when it is pruned from the teacher.
    Raises:
        ConfigError: more stages than layers, heads that tp does not divide, vocabularies that differ, rows longer
            than the model's positions.
    """
    models = {"teacher": teacher.get_text_config(), "student": student.get_text_config()}
    virtual_stages = config.pipeline.virtual_stages
    for who, model in models.items():
        if config.mesh.pp > model.num_hidden_layers:
            raise ConfigError(
                f"mesh.pp={config.mesh.pp} is more than num_hidden_layers={model.num_hidden_layers} of the {who}; "
                f"use at most {model.num_hidden_layers}"
            )
        if who == "student" and config.mesh.pp * virtual_stages > model.num_hidden_layers:
            raise ConfigError(
                f"mesh.pp={config.mesh.pp} x pipeline.virtual_stages={virtual_stages} is more than "
                f"num_hidden_layers={model.num_hidden_layers} of the student; use at most "
                f"{model.num_hidden_layers // config.mesh.pp} virtual stages"
            )
        longest = getattr(model, "max_position_embeddings", None)
        if longest is not None and config.data.seq_len > longest:
            raise ConfigError(
                f"data.seq_len={config.data.seq_len} is longer than max_position_embeddings={longest} of the {who}; "
                f"use at most {longest}"
            )
    _check_heads(config.mesh.tp, models)
    sizes = {who: model.vocab_size for who, model in models.items()}
    if sizes["teacher"] != sizes["student"]:
        raise ConfigError(
            f"student.model={show(config.student.model)} has vocab_size={sizes['student']} but the teacher has "
            f"vocab_size={sizes['teacher']}; use a student with the teacher's tokenizer"
        )


def _check_heads(tp: int, models: dict[str, Any]) -> None:
    # Layers may differ in width, and their common config then refuses to tell one.
    counts = [
        (who, name, count)
        for who, model in models.items()
        for layer in model.per_layer_config
        for name in ("num_attention_heads", "num_key_value_heads")
        if (count := getattr(layer, name, None))
    ]
    common = math.gcd(*(count for _, _, count in counts))
    divisors = [size for size in range(1, common + 1) if common % size == 0]
    for who, name, count in counts:
        if count % tp:
            raise ConfigError(
                f"mesh.tp={tp} does not divide {name}={count} of the {who}; use {either(divisors)}"
            )


def _check_rounds(config: Config) -> None:
    if len(config.rounds) != 1:
        raise ConfigError(
            f"rounds has {len(config.rounds)} entries; use one, progressive rounds are not built yet"
        )


def _check_values(flat: dict[str, Any]) -> None:
    """Check single values; a null is one that the type allows."""
    for key, words in _WORDS.items():
        value = flat[key]
        if value in words:
            continue
        if value in _LATER.get(key, ()):
            raise ConfigError(f"{key}={value} is not built yet; use {either(words)}")
        raise ConfigError(f"{key}={value} is not known; use {either(words)}")
    for key in _POSITIVE:
        if flat[key] is not None and not 0 < flat[key] < math.inf:
            raise ConfigError(f"{key}={flat[key]} must be greater than 0")
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
    _check_related(flat)


def _check_related(flat: dict[str, Any]) -> None:
    """Check values of one group against each other."""
    _check_virtual_stages(flat)
    if flat["student.prune.target_params"] is not None:
        budget_of(flat["student.prune.target_params"], 10**12)
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
    layers, num_layers = flat["student.prune.layers"], flat["student.prune.num_layers"]
    if layers is None:
        return
    if not layers or layers[0] < 0 or any(before >= after for before, after in itertools.pairwise(layers)):
        raise ConfigError(
            f"student.prune.layers={show(layers)} must be layer indices from 0 up, each once, in order"
        )
    if num_layers not in (None, len(layers)):
        raise ConfigError(
            f"student.prune.num_layers={num_layers} but student.prune.layers names {len(layers)}; leave one of them null"
        )


def budget_of(target: float | str, whole: int) -> int:
    """Return `student.prune.target_params` as a number of parameters.

    Args:
        target: a number, or text like `70M`, `0.5B`, `50%`.
        whole: parameters of the teacher.
    Raises:
        ConfigError: the text is none of these, or the number is not positive.
    """
    units = {"%": whole / 100, "K": 1e3, "M": 1e6, "B": 1e9}
    text = str(target).strip()
    unit = units.get(text[-1:].upper(), 1.0)
    try:
        number = float(text if unit == 1.0 else text[:-1])
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or (text.endswith("%") and number >= 100) or number * unit < 1:
        raise ConfigError(
            f"student.prune.target_params={target} must be a number of parameters like 70M or 0.5B, or a share of the "
            "teacher's like 50%"
        )
    return int(number * unit)


def _check_virtual_stages(flat: dict[str, Any]) -> None:
    virtual_stages, schedule = flat["pipeline.virtual_stages"], flat["pipeline.schedule"]
    if virtual_stages == 1:
        return
    if schedule not in ("interleaved", "gpipe"):
        raise ConfigError(
            f"pipeline.virtual_stages={virtual_stages} does not go with pipeline.schedule={schedule}; use interleaved, or 1"
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
        "student.model": "a hub id or a folder",
        "data.path": "a file, a folder, a list of files, a data set id or pydoc",
    }
    for key in needs:
        if not flat[key]:
            raise ConfigError(f"{key}={show(flat[key])} must be given; use {advice[key]}")
    paths = flat["data.path"]
    named = {("data.path", path) for path in ([paths] if isinstance(paths, str) else paths or [])}
    named |= {(key, flat[key]) for key in ("teacher.model", "student.model") if flat[key] is not None}
    resume = flat["checkpoint.resume"]
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise ConfigError(
            f"checkpoint.resume={resume} is no folder; use auto, none or a folder of checkpoints/"
        )
    for key, name in sorted(named):
        if _is_local(name) and not Path(name).expanduser().exists():
            raise ConfigError(f"{key}={name} does not exist; use {advice[key]}")


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: hub ids are `name` or `owner/name`, without a suffix of a text or weight file."""
    suffixes = (".gguf", ".txt", ".md", ".jsonl", ".json", ".parquet")
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith((*suffixes, "/"))


def not_finite(config: Config, key: str, what: str) -> ConfigError:
    """Return the error for a model that computes no finite numbers.

    Args:
        key: the setting that names the model.
        what: where it showed.
    """
    return ConfigError(
        f"{key}={flatten(config_to_dict(config))[key]}: {what}; its weights hold NaN or infinity, or overflow in "
        f"train.dtype={config.train.dtype}; use another model or a wider dtype"
    )
