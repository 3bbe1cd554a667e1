"""The keys of `launch.plan` beside the settings, their checks, and the costs that a user gives with them.

Decides names, meanings and types of `plan.*`, and how one number stands for stages of other layouts. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.config import Config, ConfigError, MeshShape
from distill.convert import show, unknown_key
from distill.places import writable_file
from parallel.pipeline.simulate import Costs

KEYS = {
    "plan.costs.forward": (
        "Seconds of the student's forward on a stage for one micro-batch: a number, or a list with one entry a stage."
    ),
    "plan.costs.backward": "The same for the whole backward. zero_bubble takes half of it for the weights.",
    "plan.costs.teacher": "Seconds of the whole teacher forward on a rank for one micro-batch: a number, or one entry a rank.",
    "plan.costs.latency": (
        "Seconds of a message between neighbour stages; in estimates also of each of the four sums over tp that a layer "
        "needs. 0 when left out."
    ),
    "plan.costs.step_end": (
        "Seconds of the end of a step, in which only the teacher can run: reduction over dp, norm, optimizer. A number, or "
        "one entry a stage."
    ),
    "plan.slices": "Pieces a rank's teacher forward is cut into when it fills; left out: pipeline.slices, or chosen.",
    "plan.devices": "Compare every layout pp x dp x tp of this many devices, instead of the one in mesh.",
    "plan.out": "File for the result as JSON: one object, or a list of them with plan.devices.",
    "plan.svg": "File for a picture of a step in each way; with plan.devices of the fastest layout.",
}
"""What each key means."""
_COST, _LISTS = "plan.costs.", ("forward", "backward", "teacher", "step_end")

Seconds = float | tuple[float, ...]


@dataclass(frozen=True)
class Options:
    """The values of this command's own keys."""

    costs: Mapping[str, Seconds] = field(default_factory=dict)
    """By the last word of the key; those left out are not in it."""
    slices: int | None = None
    devices: int | None = None
    out: Path | None = None
    svg: Path | None = None

    def missing_costs(self, *, needs_teacher: bool) -> list[str]:
        """Return the keys of the costs that a step cannot do without and that are not given."""
        needed = ("forward", "backward", "teacher") if needs_teacher else ("forward", "backward")
        return [f"{_COST}{name}" for name in needed if name not in self.costs]


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the values of `plan.*`.

    Args:
        values: by dotted key.
    Raises:
        ConfigError: an unknown key, a cost that is no time, a count below 1, a file that cannot be written.
    """
    for key, value in values.items():
        if any(known.startswith(f"{key}.") for known in KEYS):
            raise ConfigError(
                f"{key}={show(value)} is not a group of keys; {_COST}forward=1.5 sets one of it"
            )
        if key not in KEYS:
            raise unknown_key(key, KEYS)
    given = {key: value for key, value in values.items() if value is not None}
    costs = {
        key.removeprefix(_COST): _seconds(key, value) for key, value in given.items() if key.startswith(_COST)
    }
    devices = _count("plan.devices", given.get("plan.devices"))
    lists = [name for name, value in costs.items() if isinstance(value, tuple)]
    if devices is not None and lists:
        raise ConfigError(
            f"{_COST}{lists[0]}={show(costs[lists[0]])} is a list for one layout, but plan.devices={devices} compares "
            "several; use one number"
        )
    return Options(
        costs=costs,
        slices=_count("plan.slices", given.get("plan.slices")),
        devices=devices,
        out=writable_file("plan.out", given.get("plan.out")),
        svg=writable_file("plan.svg", given.get("plan.svg")),
    )


def given_costs(base: Costs, options: Options, mesh: MeshShape, case: Config, num_slices: int) -> Costs:
    """Return `base` with the costs that the user gave in place of its own.

    Args:
        mesh: what the given costs belong to. A rank of another layout has pp * tp / (pp' * tp') of them.
        case: the settings of the layout.
        num_slices: the teacher's.
    Raises:
        ConfigError: a list that does not fit the layout.
    """
    own, virtual_stages = case.mesh, case.pipeline.virtual_stages
    share = mesh.pp * mesh.tp / (own.pp * own.tp)

    def work(name: str, parts: int) -> Seconds:
        value = _fitting(name, options.costs[name], own.pp, 1 if name == "teacher" else virtual_stages)
        if isinstance(value, tuple):
            return tuple(each * share / parts for each in value)
        return value * share / parts

    changes: dict[str, Any] = {}
    if "forward" in options.costs:
        changes["forward"] = work("forward", 1)
    if "backward" in options.costs:
        changes |= dict.fromkeys(("backward_input", "backward_weight"), work("backward", 2))
    if "teacher" in options.costs:
        changes["teacher_slice"] = work("teacher", num_slices)
    if "latency" in options.costs:
        changes["latency"] = options.costs["latency"]
    if "step_end" in options.costs:
        step_end = _fitting("step_end", options.costs["step_end"], own.pp, virtual_stages)
        changes |= {"norm": step_end, "step": 0.0}
    return replace(base, **changes)


def _fitting(name: str, value: Seconds, pp: int, virtual_stages: int) -> Seconds:
    """Return the value if it is one number or as long as the stages are many."""
    count = pp * virtual_stages
    if isinstance(value, tuple) and len(value) != count:
        size = f"mesh.pp={pp}"
        if virtual_stages > 1:
            size += f" x pipeline.virtual_stages={virtual_stages} = {count}"
        raise ConfigError(
            f"{_COST}{name}={show(value)} has {len(value)} entries, but there are {size} stages; use one number or "
            f"{count} entries"
        )
    return value


def _seconds(key: str, value: Any) -> Seconds:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if is_list and key.removeprefix(_COST) not in _LISTS:
        raise ConfigError(f"{key}={show(value)} must be one number of seconds")
    each = value if is_list else [value]
    for number in each:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
            wanted = "a number of seconds, 0 or more" + (
                ", or a list of them" if key.removeprefix(_COST) in _LISTS else ""
            )
            raise ConfigError(f"{key}={show(value)} must be {wanted}")
    return tuple(map(float, value)) if is_list else float(value)


def _count(key: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{key}={show(value)} must be a whole number of 1 or more")
    return value
