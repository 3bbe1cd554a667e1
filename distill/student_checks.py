"""What fits together in `student.*`, as far as the settings show it.

Decides the sentence of every mistake there. Needs no torch; what fits the teacher, `distill.shape`, `distill.search` and
`distill.ranks` find out.
"""

from __future__ import annotations

import itertools
from typing import Any

from distill.budget import budget_of
from distill.config import ConfigError
from distill.convert import show

LOW_RANK_KEYS = tuple(f"student.low_rank.{name}" for name in ("ratio", "params", "energy"))
"""Each says how small factors are."""


def check_student(flat: dict[str, Any]) -> None:
    """Check the values of `student.*` against each other and against the steps of the round.

    Args:
        flat: dotted key -> value, each right by itself.
    Raises:
        ConfigError: the first mistake found.
    """
    _check_sparsity(flat)
    _check_low_rank(flat)
    ranks = [key for key in LOW_RANK_KEYS if flat[key] is not None]
    if ranks and flat["student.sparsity.method"] is not None:
        raise ConfigError(
            f"student.sparsity.method={flat['student.sparsity.method']} holds weights of dense linears, but "
            f"{ranks[0]}={show(flat[ranks[0]])} factors them; leave one of them null"
        )
    if flat["student.prune.target_params"] is not None:
        budget_of(flat["student.prune.target_params"], 10**12)
    for key in ("student.prune.layers", "student.low_rank.layers"):
        _check_indices(key, flat[key])
    layers, num_layers = flat["student.prune.layers"], flat["student.prune.num_layers"]
    if layers is not None and num_layers not in (None, len(layers)):
        raise ConfigError(
            f"student.prune.num_layers={num_layers} but student.prune.layers names {len(layers)}; leave one of them null"
        )


def _check_indices(key: str, layers: list[int] | None) -> None:
    if layers is None:
        return
    if not layers or layers[0] < 0 or any(before >= after for before, after in itertools.pairwise(layers)):
        raise ConfigError(f"{key}={show(layers)} must be layer indices from 0 up, each once, in order")


def _check_low_rank(flat: dict[str, Any]) -> None:
    """Check that at most one key says how small the factors are, and that what it says can be."""
    given = [key for key in LOW_RANK_KEYS if flat[key] is not None]
    if len(given) > 1:
        both = " and ".join(f"{key}={show(flat[key])}" for key in given)
        raise ConfigError(f"{both} each say how small the factors are; leave all but one of them null")
    for key in ("student.low_rank.ratio", "student.low_rank.energy"):
        if flat[key] is not None and not 0 < flat[key] < 1:
            raise ConfigError(f"{key}={flat[key]} must be greater than 0 and less than 1, or null")
    modules = flat["student.low_rank.modules"]
    if not modules or (isinstance(modules, str) and modules not in ("ffn", "attention")):
        raise ConfigError(
            f"student.low_rank.modules={show(modules)} is not known; use ffn, attention, or a list such as [mlp.down_proj]"
        )


def _check_sparsity(flat: dict[str, Any]) -> None:
    ratio, steps = flat["student.sparsity.ratio"], flat["student.sparsity.steps"]
    if not 0 < ratio < 1:
        raise ConfigError(f"student.sparsity.ratio={ratio} must be greater than 0 and less than 1")
    if flat["student.sparsity.pattern"] == "2:4" and ratio != 0.5:
        raise ConfigError(
            f"student.sparsity.ratio={ratio} does not go with student.sparsity.pattern=2:4; use 0.5, or unstructured"
        )
    if steps is not None and flat["student.sparsity.schedule"] == "at_once":
        raise ConfigError(
            f"student.sparsity.steps={steps} does not go with student.sparsity.schedule=at_once; use null, cubic or linear"
        )
    if steps is not None and steps > flat["train.steps"]:
        raise ConfigError(
            f"student.sparsity.steps={steps} is more than train.steps={flat['train.steps']}; use fewer"
        )
