"""What fits together in `optimizer.*`: engine, rule, stage, and what is installed for them.

Decides the sentence of every mistake there. Needs no torch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from distill.config import ConfigError
from distill.convert import either, show

NAMES = ("adamw", "adam", "radam", "adamax", "adagrad", "rmsprop", "sgd", "adamw8bit")
"""Rules that exist (`parallel.update_rules`)."""
_STAGES = {"torch": (0, 1), "deepspeed": (1, 2)}
_OF_MATRICES = ("adafactor", "lamb", "lars", "lbfgs", "muon", "shampoo", "soap")
"""Rules that look at more than one element at a time."""
_PACKAGES = {("optimizer.engine", "deepspeed"): "deepspeed", ("optimizer.name", "adamw8bit"): "bitsandbytes"}
"""(key, value) -> package, which is also the name of the extra that `launch/install.sh` installs."""


def check_optimizer(flat: dict[str, Any]) -> None:
    """Check the values of `optimizer.*` against each other and against `train.dtype`.

    Args:
        flat: dotted key -> value; `optimizer.engine` is one that exists.
    Raises:
        ConfigError: the first mistake found.
    """
    _check_name(flat["optimizer.name"])
    _check_stage(flat)
    _check_dtype(flat)
    if not 0 <= flat["optimizer.momentum"] < 1:
        raise ConfigError(
            f"optimizer.momentum={flat['optimizer.momentum']} must be 0 or more and less than 1"
        )
    for (key, value), package in _PACKAGES.items():
        if flat[key] == value and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key}={value} needs {package}, which is not installed; bash launch/install.sh {package}, or use "
                + {"optimizer.engine": "torch", "optimizer.name": "adamw"}[key]
            )


def _check_name(name: str) -> None:
    if name in _OF_MATRICES:
        raise ConfigError(
            f"optimizer.name={name} looks at whole matrices or layers, but each rank updates ranges of flat buffers that "
            f"begin and end anywhere in a matrix; use a rule that works element by element: {either(NAMES)}"
        )
    if name not in NAMES:
        raise ConfigError(f"optimizer.name={show(name)} is not known; use {either(NAMES)}")


def _check_stage(flat: dict[str, Any]) -> None:
    engine, stage = flat["optimizer.engine"], flat["optimizer.zero_stage"]
    if stage == 3:
        raise ConfigError(
            "optimizer.zero_stage=3 gathers parameters inside every forward and backward, which puts collectives of "
            "replicas between the messages of a pipeline and can hang it; use 1, and more mesh.tp or mesh.pp for memory"
        )
    if stage not in _STAGES[engine]:
        raise ConfigError(
            f"optimizer.zero_stage={stage} does not go with optimizer.engine={engine}; use {either(_STAGES[engine])}"
        )
    if flat["optimizer.offload"] and engine != "deepspeed":
        raise ConfigError(f"optimizer.offload=true does not go with optimizer.engine={engine}; use deepspeed")


def _check_dtype(flat: dict[str, Any]) -> None:
    stage, dtype = flat["optimizer.zero_stage"], flat["train.dtype"]
    if dtype == "float64" and flat["optimizer.name"] == "adamw8bit":
        raise ConfigError("optimizer.name=adamw8bit computes in float32, but train.dtype=float64; use adamw")
    if dtype == "bfloat16" and stage == 2:
        raise ConfigError(
            "optimizer.zero_stage=2 reduces gradients in train.dtype=bfloat16, in which small ones are lost; use 1, or "
            "train.dtype=float32"
        )
