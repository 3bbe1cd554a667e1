"""The words of a pipeline plan: actions, their text form, and the one rule that says when an action may run.

Decides: what the kinds of action are, what each needs before it (`dependencies`), and what a plan is. Assumes that
stage s lives on rank s % num_ranks and that the teacher has one stage a rank, whatever the student's virtual stages.
Knows no order and no time: `schedules` makes orders, `lower` adds the messages, `validate` checks, `simulate` times.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does; torch.distributed.pipelining writes our bare B as I and our B directly followed by W as B."""

    F = "F"  # student forward
    B = "B"  # gradient with respect to the stage's input
    W = "W"  # gradient with respect to the stage's weights
    K = "K"  # a slice of the teacher's forward, keeps nothing for a backward
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    SEND_K = "SEND_K"
    RECV_K = "RECV_K"
    REDUCE = "REDUCE"  # gradients over the data-parallel axis
    NORM = "NORM"  # global gradient norm
    STEP = "STEP"  # optimizer
    GATHER = "GATHER"  # parameters over the data-parallel axis


COMPUTE = frozenset({Kind.F, Kind.B, Kind.W, Kind.K})
SEND_OF = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B, Kind.K: Kind.SEND_K}
RECV_OF = {Kind.F: Kind.RECV_F, Kind.B: Kind.RECV_B, Kind.K: Kind.RECV_K}
TRAFFIC_OF = {message: kind for table in (SEND_OF, RECV_OF) for kind, message in table.items()}
SENDS = frozenset(SEND_OF.values())
RECVS = frozenset(RECV_OF.values())
STEP_END = (Kind.REDUCE, Kind.NORM, Kind.STEP, Kind.GATHER)


class Action(NamedTuple):
    """One entry of a rank's list; `microbatch` is None exactly for the kinds of STEP_END, `slice` only ever set for K."""

    stage: int
    kind: Kind
    microbatch: int | None = None
    slice: int | None = None

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else self.microbatch
        piece = "" if self.slice is None else f".{self.slice}"
        return f"{self.stage}{self.kind.value}{microbatch}{piece}"

    def __repr__(self) -> str:
        return str(self)


_KINDS = "|".join(sorted(Kind, key=len, reverse=True))
_TEXT = re.compile(rf"(\d+)({_KINDS})(?:(\d+)(?:\.(\d+))?)?")


def parse(text: str) -> Action:
    """Return the action that `text` writes: the inverse of `str(action)`.

    Args:
        text: `<stage><kind>[<microbatch>[.<slice>]]`, e.g. `2F0`, `1SEND_F3`, `0K2.1`, `3REDUCE`.
    Raises:
        ValueError: the text is not of this form, or the kind takes no micro-batch or slice, or misses it.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not an action; write <stage><kind><microbatch>, e.g. 2F0, 1SEND_F3, 0K2.1, 3REDUCE"
        )
    stage, kind, microbatch, piece = match.groups()
    action = Action(
        int(stage),
        Kind(kind),
        None if microbatch is None else int(microbatch),
        None if piece is None else int(piece),
    )
    if (microbatch is None) != (action.kind in STEP_END):
        raise ValueError(f"{text!r}: {kind} {'needs a' if microbatch is None else 'takes no'} micro-batch")
    if piece is not None and action.kind is not Kind.K:
        raise ValueError(f"{text!r}: only K comes in slices")
    return action


@dataclass(frozen=True)
class Shape:
    """Sizes of a pipeline.

    Args:
        num_ranks: devices along the pipeline, at least 1.
        num_stages: student stages, a multiple of `num_ranks`.
        num_microbatches: micro-batches of one optimizer step, at least 1.
        num_slices: pieces of the teacher's forward on a rank and micro-batch; 0 without a teacher.
    Raises:
        ValueError: a size is out of range.
    """

    num_ranks: int
    num_stages: int
    num_microbatches: int
    num_slices: int = 0

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_stages", "num_microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_stages % self.num_ranks:
            raise ValueError(f"num_stages={self.num_stages} is not a multiple of num_ranks={self.num_ranks}")
        if self.num_slices < 0:
            raise ValueError(f"num_slices={self.num_slices} must not be negative")

    def rank_of(self, stage: int) -> int:
        """Return the rank on which a stage lives."""
        return stage % self.num_ranks

    def stages_of(self, rank: int) -> range:
        """Return the student's stages on a rank, in forward order."""
        return range(rank, self.num_stages, self.num_ranks)

    @cached_property
    def slices(self) -> tuple[int | None, ...]:
        """The values of `Action.slice` of one teacher forward: (None,) in one piece, () without a teacher."""
        return (None,) if self.num_slices == 1 else tuple(range(self.num_slices))

    @property
    def last_slice(self) -> int | None:
        """The value of `Action.slice` of a teacher forward's last piece."""
        return self.num_slices - 1 if self.num_slices > 1 else None

    def teacher(self, stage: int, microbatch: int) -> tuple[Action, ...]:
        """Return the teacher's actions of one micro-batch on one stage, in order."""
        return tuple(Action(stage, Kind.K, microbatch, piece) for piece in self.slices)


@dataclass(frozen=True)
class Plan:
    """For each rank the list of its actions in one optimizer step.

    K actions with microbatch >= num_microbatches belong to the steps after this one: they are the teacher's look-ahead.

    Args:
        shape: the sizes.
        schedule: the student's schedule: a name of `schedules.SCHEDULES`, `forward`, or `none` (teacher only).
        teacher: `none`, `inline`, `batch` or `fill`.
        ranks: one tuple of actions a rank, in the order in which the rank issues them.
        carried: K actions that an earlier step has already done, numbered as seen from this step.
    """

    shape: Shape
    schedule: str
    teacher: str
    ranks: tuple[tuple[Action, ...], ...]
    carried: frozenset[Action] = frozenset()

    @cached_property
    def lowered(self) -> bool:
        """Whether the plan already holds its messages."""
        return any(
            action.kind in SENDS or action.kind in RECVS for actions in self.ranks for action in actions
        )

    def ahead(self) -> frozenset[Action]:
        """Return the teacher's actions done when this step ends, numbered as seen from the next step."""
        return self._ahead

    @cached_property
    def _ahead(self) -> frozenset[Action]:
        # Every step asks, and a plan of many micro-batches is long.
        num_microbatches = self.shape.num_microbatches
        done = [action for actions in self.ranks for action in actions if action.kind is Kind.K]
        return frozenset(
            action._replace(microbatch=action.microbatch - num_microbatches)
            for action in (*done, *self.carried)
            if action.microbatch >= num_microbatches
        )

    def fingerprint(self) -> str:
        """Return a hash of everything in the plan, to check that all ranks hold the same one."""
        lines = [repr(self.shape), self.schedule, self.teacher, " ".join(sorted(map(str, self.carried)))]
        lines += [" ".join(map(str, actions)) for actions in self.ranks]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class PlanError(ValueError):
    """A plan that cannot run, or does not do what it must; the message shows the plan and the place."""


def dependencies(action: Action, shape: Shape) -> tuple[Action, ...]:
    """Return what must be done before `action`, within its step: the one readiness rule of the pipeline.

    Only direct needs are listed: the loss needs the last slice of the teacher's last stage, which needs all others.
    F also needs the GATHER of the step before, which the order of a rank's list gives.

    Args:
        action: any action, compute or communication.
        shape: the sizes; num_slices > 0 says that there is a teacher.
    Returns:
        Actions of the same step. A dependency on another rank reaches this one by a message (F, B, K), or by the
        collective itself (NORM: one number over the gradients of all stages).
    """
    stage, kind, microbatch, piece = action
    if kind in SENDS:
        return (
            Action(stage, TRAFFIC_OF[kind], microbatch, shape.last_slice if kind is Kind.SEND_K else None),
        )
    if kind in RECVS:
        return (Action(peer_stage(action), SEND_OF[TRAFFIC_OF[kind]], microbatch),)
    match kind:
        case Kind.F:
            return (Action(stage - 1, Kind.F, microbatch),) if stage else ()
        case Kind.W:
            return (Action(stage, Kind.B, microbatch),)
        case Kind.B:
            here = Action(stage, Kind.F, microbatch)
            if stage < shape.num_stages - 1:
                return here, Action(stage + 1, Kind.B, microbatch)
            if shape.num_slices:
                return here, Action(shape.num_ranks - 1, Kind.K, microbatch, shape.last_slice)
            return (here,)
        case Kind.K if piece:
            return (Action(stage, Kind.K, microbatch, piece - 1),)
        case Kind.K:
            return (Action(stage - 1, Kind.K, microbatch, shape.last_slice),) if stage else ()
        case Kind.REDUCE:
            return tuple(Action(stage, Kind.W, each) for each in range(shape.num_microbatches))
        case Kind.NORM:
            return tuple(Action(each, Kind.REDUCE) for each in range(shape.num_stages))
        case _:
            return (Action(stage, STEP_END[STEP_END.index(kind) - 1]),)


def peer_stage(action: Action) -> int:
    """Return the stage at the other end of a SEND or RECV."""
    forward = action.kind in (Kind.SEND_F, Kind.SEND_K, Kind.RECV_B)
    return action.stage + 1 if forward else action.stage - 1


def format_grid(
    ranks: Sequence[Sequence[Action]], *, mark: tuple[int, int] | None = None, margin: int = 12
) -> str:
    """Return the lists as a grid of text, one row a position in the lists, one column a rank.

    Args:
        ranks: one list of actions a rank.
        mark: (rank, position) to point at with `<-- ERROR HERE`; only `margin` rows around it are shown.
        margin: rows to show on either side of the mark.
    """
    num_rows = max((len(actions) for actions in ranks), default=0)
    first, stop = 0, num_rows
    if mark is not None:
        num_rows = max(num_rows, mark[1] + 1)
        first, stop = max(0, mark[1] - margin), min(num_rows, mark[1] + margin + 1)
    digits = len(str(max(num_rows - 1, 0)))
    labels = [f"rank {rank}" for rank in range(len(ranks))]
    columns = [
        [str(actions[row]) if row < len(actions) else "" for row in range(first, stop)] for actions in ranks
    ]
    if mark is not None:
        columns[mark[0]][mark[1] - first] = f"[{columns[mark[0]][mark[1] - first]}]"
    widths = [
        max(len(cell) for cell in (label, *column)) for label, column in zip(labels, columns, strict=True)
    ]
    header = " " * (digits + 2) + "  ".join(map(str.ljust, labels, widths))
    lines = [header.rstrip()]
    for offset, cells in enumerate(zip(*columns, strict=True)):
        line = f"{first + offset:0{digits}d}  " + "  ".join(map(str.ljust, cells, widths))
        lines.append(
            line.rstrip() + ("  <-- ERROR HERE" if mark is not None and mark[1] == first + offset else "")
        )
    return "\n".join(lines) + "\n"


def error_at(plan: Plan, rank: int, position: int, message: str) -> PlanError:
    """Return a PlanError that shows the plan around one place."""
    return PlanError(f"{message}\n\n{format_grid(plan.ranks, mark=(rank, position))}")


def whole_backwards(actions: Sequence[Action]) -> frozenset[Action]:
    """Return the `B` actions that their own `W` follows directly: they run as one backward."""
    return frozenset(
        first
        for first, second in itertools.pairwise(actions)
        if first.kind is Kind.B and second == first._replace(kind=Kind.W)
    )
