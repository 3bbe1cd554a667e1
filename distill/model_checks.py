"""Whether settings and models fit each other, as far as the models' configs show it.

Decides the sentence of every such mistake, each naming the key, its value and what would be right. `mesh.dp` is filled in.
Needs no torch and no weights. What the settings alone show is `distill.checks`.
"""

from __future__ import annotations

import math
from typing import Any

from distill.config import Config, ConfigError
from distill.convert import config_to_dict, either, flatten, show


def check_models(config: Config, teacher: Any, student: Any) -> None:
    """Check the settings against the models' transformers configs; `mesh.dp` must be filled in.

    Args:
        teacher, student: `PretrainedConfig`s; the student's is the pruned one when it is pruned from the teacher.
    Raises:
        ConfigError: more stages than layers, heads that tp does not divide, a student with more ids than its teacher, rows longer
            than the model's positions, `loss.top_k` ids or fewer in the vocabulary, pairs of layers that are not there.
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
    if config.student.sparsity.method is not None and config.student.sparsity.pattern == "2:4":
        _check_groups(config.mesh.tp, models["student"])
    sizes = {who: model.vocab_size for who, model in models.items()}
    # A teacher's ids beyond the student's are padding, and left out (`distill.planned_student`).
    if sizes["teacher"] < sizes["student"]:
        raise ConfigError(
            f"student.model={show(config.student.model)} has vocab_size={sizes['student']} but teacher.model={config.teacher.model} "
            f"has vocab_size={sizes['teacher']}; use models of one tokenizer, and cut padding that the student has more of off with "
            f"resize_token_embeddings({sizes['teacher']})"
        )
    if config.loss.kind == "top_k_kl" and config.loss.top_k >= sizes["student"]:
        raise ConfigError(
            f"loss.top_k={config.loss.top_k} must be less than vocab_size={sizes['student']} of the student; "
            f"use at most {sizes['student'] - 1}, or loss.kind=forward_kl"
        )
    if config.loss.hidden.is_on:
        _check_pairs(config, models)


def _check_pairs(config: Config, models: dict[str, Any]) -> None:
    pairs = config.loss.hidden.layers or ()
    for place, who in enumerate(("student", "teacher")):
        last = models[who].num_hidden_layers - 1
        if any(pair[place] > last for pair in pairs):
            raise ConfigError(
                f"loss.hidden.layers={show(pairs)} names a layer that the {who} does not have; use 0 to {last} for it"
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


def _check_groups(tp: int, student: Any) -> None:
    """Check that the inputs of every linear come in whole groups of four, also where tp cuts them."""
    for layer in student.per_layer_config:
        _check_groups_of_layer(tp, layer)


def _check_groups_of_layer(tp: int, student: Any) -> None:
    heads = student.num_attention_heads
    head_width = getattr(student, "head_dim", None) or student.hidden_size // heads
    cut = {"intermediate_size": student.intermediate_size, "query heads x head width": heads * head_width}
    for name, size, parts in (
        ("hidden_size", student.hidden_size, 1),
        *((*item, tp) for item in cut.items()),
    ):
        if size % (4 * parts):
            fitting = [count for count in range(1, parts) if size % (4 * count) == 0]
            advice = f"mesh.tp={either(fitting)}" if fitting else "student.sparsity.pattern=unstructured"
            raise ConfigError(
                f"student.sparsity.pattern=2:4 needs inputs in groups of four on every rank, but mesh.tp={tp} does not "
                f"leave {name}={size} of the student in such; use {advice}"
            )


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
