"""Numbers that change over the steps of a round: what the settings may say instead of one number.

Decides the forms (`Ramp`, `Stages`), which plain mappings they are read from, and the value at a step. A round's first
step has the start, its last one the end. Assumes nothing; does not judge values (`distill.checks`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EXAMPLE = "{kind: linear, start: 4, end: 1}"
_KINDS = ("linear", "cosine", "steps")
_FIELDS = {"kind", "start", "end", "values"}


@dataclass(frozen=True)
class Ramp:
    """From `start` at the first step to `end` at the last, in a straight line or half a cosine."""

    kind: Literal["linear", "cosine"]
    start: float
    end: float

    def at(self, step: int, num_steps: int) -> float:
        """Return start + (end - start) * w, w = x or (1 - cos(pi * x)) / 2, x = step / (num_steps - 1) up to 1."""
        share = min(1.0, step / max(1, num_steps - 1))
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        low, high = sorted(self.extremes)
        # Exact at both ends, and never beyond them by a rounding: an alpha must not pass 1.
        return min(high, max(low, self.start * (1 - share) + self.end * share))

    @property
    def extremes(self) -> tuple[float, ...]:
        """The values between which all others lie."""
        return self.start, self.end


@dataclass(frozen=True)
class Stages:
    """From each step named on, its value."""

    kind: Literal["steps"]
    values: Mapping[int, float]
    """By step, counted from 0; one for step 0 is among them."""

    def at(self, step: int, num_steps: int) -> float:
        """Return the value of the last step named that is not after `step`."""
        steps = sorted(self.values)
        return self.values[steps[bisect.bisect_right(steps, step) - 1]]

    @property
    def extremes(self) -> tuple[float, ...]:
        """All values."""
        return tuple(self.values.values())


def value_at(number: float | Ramp | Stages, step: int, num_steps: int) -> float:
    """Return a number, or the value that a schedule has at step `step` (from 0) of `num_steps`."""
    return number.at(step, num_steps) if isinstance(number, (Ramp, Stages)) else number


def extremes(number: float | Ramp | Stages) -> tuple[float, ...]:
    """Return values that bound all that a number or schedule takes, each of which it may take."""
    return number.extremes if isinstance(number, (Ramp, Stages)) else (number,)


def is_schedule(value: Any) -> bool:
    """Whether a plain mapping is meant as one value that changes, not as a group of keys (which may have a `kind`, too)."""
    return isinstance(value, Mapping) and value.get("kind") in _KINDS and value.keys() <= _FIELDS
