"""A budget of parameters, as `student.prune.target_params` may say it."""

from __future__ import annotations

import math

from distill.config import ConfigError


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
