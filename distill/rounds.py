"""The rounds of a run: what each is trained with, how far the run is, and whether a round was good enough.

Decides what a round may take from those before it: its teacher may be the student of an earlier round (`previous`,
`round-N`), its student begins as the one the round before left, cut anew where `student.prune` says something else. All cuts
count the units of the first round's teacher. Gates look at the held-out gap: the student's loss less that of the first
round's teacher, nats per token. What is here depends on settings and numbers alone, so every rank decides alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from distill.config import Config, ConfigError, Gate
from distill.convert import round_config

STUDENT_FOLDER = "student"
CUT_FOLDER = "pruned"
FACTORED_FOLDER = "factored"
_PREVIOUS = "previous"
_ROUND = re.compile(r"round-(\d+)")


def round_folder(folder: Path, index: int) -> Path:
    """Return where the student of a round that is not the last is exported to, in the run's folder."""
    return folder / f"round-{index}"


def rounds_of(config: Config) -> tuple[Config, ...]:
    """Return the settings of each round, with folders in place of the words for earlier rounds' students.

    Raises:
        ConfigError: a round names a student that is not there by then, or a key that a round may not override.
    """
    folder = Path(config.run.dir or ".")
    rounds = []
    for index in range(len(config.rounds)):
        settings = round_config(config, index)
        source = _earlier_round(settings.teacher.model, index)
        if source is not None:
            teacher = replace(settings.teacher, model=str(round_folder(folder, source)))
            settings = replace(settings, teacher=teacher)
        rounds.append(settings)
    return tuple(rounds)


def _earlier_round(name: str | None, index: int) -> int | None:
    """Return which earlier round's student a teacher's name means; None for a model of its own."""
    if name is None:
        return None
    found = _ROUND.fullmatch(name)
    if name != _PREVIOUS and found is None:
        return None
    source = index - 1 if found is None else int(found[1])
    if not 0 <= source < index:
        raise ConfigError(
            f"rounds[{index}].teacher.model={name} is the student of a round that does not come before; use a model"
            + (f", previous, or round-0 to round-{index - 1}" if index else "")
        )
    return source


@dataclass(frozen=True)
class Lineage:
    """Where the student of a round comes from."""

    origin: str
    """The model whose units all cuts count: the first round's teacher."""
    made_in: int
    """The round that its student was made for: this one, or an earlier one whose student it goes on with."""
    previous: Path | None
    """The student of the round before that; None for the first round."""
    begins: Path | None
    """The cut student of that round, which is made if it is not there; None where `student.model` names it."""
    factored: Path
    """The same with linears of a low rank, where they are asked for."""
    continued: Path | None
    """The student as the round before left it, where this one goes on training it; None where it has one of its own."""


def lineage_of(rounds: Sequence[Config], index: int) -> Lineage:
    """Return where the student of round `index` comes from."""
    folder = Path(rounds[0].run.dir or ".")
    shapes = [(each.student.prune, each.student.low_rank) for each in rounds]
    made_in = next(
        number for number in range(index, -1, -1) if not number or shapes[number] != shapes[number - 1]
    )
    suffix = f"-{made_in}" if made_in else ""
    ready = made_in == 0 and rounds[0].student.model is not None
    return Lineage(
        origin=rounds[0].teacher.model,
        made_in=made_in,
        previous=round_folder(folder, made_in - 1) if made_in else None,
        begins=None if ready else folder / f"{CUT_FOLDER}{suffix}",
        factored=folder / f"{FACTORED_FOLDER}{suffix}",
        continued=round_folder(folder, index - 1) if index > made_in else None,
    )


@dataclass(frozen=True)
class Progress:
    """How far a run is; what a checkpoint holds beside the optimizer."""

    step: int = 0
    """Optimizer steps done, over all rounds."""
    round: int = 0
    attempt: int = 0
    """Times this round has been trained before (`gate.repeat_until`)."""
    round_step: int = 0
    """Steps done of this training of the round."""
    read: Mapping[str, int] = field(default_factory=dict)
    """Tokens of rows that trainings before this one have read, by source (`distill.stream`): where the text goes on."""
    tokens: int = 0
    """Valid tokens trained on."""
    prune_s: tuple[float, ...] = ()
    """Seconds that making the student of each round took; those of later rounds may be left out."""
    skipped: int = 0
    """Of the steps, those that changed nothing because a number was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the latest."""

    def after_pruning(self, seconds: float) -> Progress:
        """Return the progress after so many more seconds of making this round's student."""
        own = [*self.prune_s, *[0.0] * (self.round + 1 - len(self.prune_s))]
        own[self.round] += seconds
        return replace(self, prune_s=tuple(own))

    def after_step(self, *, tokens: int, skipped: bool = False) -> Progress:
        """Return the progress one step later."""
        return replace(
            self,
            step=self.step + 1,
            round_step=self.round_step + 1,
            tokens=self.tokens + tokens,
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
        )

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds.

        Raises:
            ValueError: an entry is missing, unknown or impossible; the message names it.
        """
        names = [each.name for each in fields(Progress)]
        if values.keys() != set(names):
            raise ValueError(f"extras must hold {', '.join(names)} and nothing else")
        for name, value in values.items():
            if not _may_be(name, value):
                raise ValueError(f"extras.{name} is {value!r:.40}, which is not made of numbers of 0 or more")
        if values["round_step"] > values["step"]:
            raise ValueError(f"extras.round_step is {values['round_step']}, more than step={values['step']}")
        return Progress(**{**values, "prune_s": tuple(values["prune_s"])})

    def next_round(self, read: Mapping[str, int]) -> Progress:
        """Return the progress at the first step of the next round, where the stream of this one has read so much."""
        return replace(self, round=self.round + 1, attempt=0, round_step=0, read={**self.read, **read})

    def again(self, read: Mapping[str, int]) -> Progress:
        """Return the progress at the first step of the same round's next training."""
        return replace(self, attempt=self.attempt + 1, round_step=0, read={**self.read, **read})


def _may_be(name: str, value: Any) -> bool:
    """Whether a checkpoint may hold this as the entry `name` of the progress."""
    if name == "read":
        return isinstance(value, dict) and all(_is_number(part, int) for part in value.values())
    if name == "prune_s":
        return isinstance(value, list) and all(_is_number(part, int, float) for part in value)
    return _is_number(value, int)


def _is_number(value: Any, *kinds: type) -> bool:
    return type(value) in kinds and 0 <= value < 2**53


def may_repeat(gate: Gate, attempt: int) -> bool:
    """Whether a round may be trained once more after one that had been trained `attempt` times before."""
    return gate.repeat_until is not None and attempt + 1 < gate.repeats


def verdict(gate: Gate, *, gap: float, attempt: int) -> tuple[str, str]:
    """Return what follows a round, `next`, `again` or `stop`, and why, empty for `next`.

    Args:
        gap: the student's held-out loss less the teacher's, nats per token.
        attempt: times the round had been trained before.
    """
    if not math.isfinite(gap):
        # It is above no limit, and the student is of no use to another round.
        return "stop", f"gap {gap} is not finite: the run ends here"
    if may_repeat(gate, attempt) and gap > gate.repeat_until:
        return "again", f"gap {gap:.4f} is above gate.repeat_until={gate.repeat_until}: once more"
    if gate.stop_if is not None and gap > gate.stop_if:
        return "stop", f"gap {gap:.4f} is above gate.stop_if={gate.stop_if}: the run ends here"
    return "next", ""
