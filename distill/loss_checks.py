"""What fits together in `loss.*`: limits of the kinds, schedules within a round, pairs of layers.

Decides the sentence of every mistake there. Needs no torch. Whether the layers exist, `distill.model_checks` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from distill.annealing import Stages, extremes
from distill.config import ConfigError, Loss
from distill.convert import config_to_dict, flatten, show


def check_loss(loss: Loss, num_steps: int) -> None:
    """Check the loss of a round.

    Args:
        num_steps: optimizer steps of the round.
    Raises:
        ConfigError: the first mistake found.
    """
    _check_schedules(loss, num_steps)
    for key, value in (("loss.beta", loss.beta), ("loss.skew", loss.skew)):
        if not 0.001 <= value <= 0.999:
            raise ConfigError(
                f"{key}={value} must be 0.001 to 0.999; use loss.kind=forward_kl or reverse_kl for the limits"
            )
    _check_pairs(loss.hidden.layers)


def _check_schedules(loss: Loss, num_steps: int) -> None:
    """Check every value that the temperature, alpha and the weight of the hidden states take in a round of so many steps."""
    numbers = {"temperature": loss.temperature, "alpha": loss.alpha, "hidden.weight": loss.hidden.weight}
    typed = flatten(config_to_dict(loss))
    for name, number in numbers.items():
        shown = show(typed[name])
        if isinstance(number, Stages) and min(number.values, default=-1) != 0:
            raise ConfigError(
                f"loss.{name}={shown} must name step 0 as the first, as in values: {{0: ..., 100: ...}}"
            )
        for value in extremes(number):
            if name == "temperature" and not 0 < value < math.inf:
                raise ConfigError(f"loss.{name}={shown} must be greater than 0")
            if name == "temperature" and not 1e-4 <= value <= 1e4:
                raise ConfigError(f"loss.{name}={shown} is outside 0.0001 to 10000")
            if name == "alpha" and not 0 <= value <= 1:
                raise ConfigError(f"loss.{name}={shown} is outside 0 to 1")
            if name == "hidden.weight" and not 0 <= value < math.inf:
                raise ConfigError(f"loss.{name}={shown} must be 0 or more")
        if isinstance(number, Stages) and any(step < 0 for step in number.values):
            raise ConfigError(f"loss.{name}={shown} must name steps of 0 or more")
        if isinstance(number, Stages) and (last := max(number.values)) >= num_steps > 0:
            raise ConfigError(
                f"loss.{name}={shown} names step {show(last)}, but with train.steps={show(num_steps)} the last one is "
                f"{show(num_steps - 1)}; use earlier steps, or more train.steps"
            )


def _check_pairs(pairs: Sequence[tuple[int, int]] | None) -> None:
    students = [student for student, _ in pairs or ()]
    if pairs is not None and (not pairs or len(set(students)) < len(students) or min(map(min, pairs)) < 0):
        raise ConfigError(
            f"loss.hidden.layers={show(pairs)} must be pairs [student's layer, teacher's layer] from 0 up, each layer of "
            "the student once, or null"
        )
