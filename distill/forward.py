"""Forward passes of student and teacher through the pipeline, without gradients: for evaluation and calibration.

The links and the executor of training run plans of their own, of forwards alone, with `F` and `K` bound to stages that keep
nothing. What happens with the last stage's hidden states is the caller's. The links must not be those of a training whose teacher is ahead: its
messages would be taken for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

from distill.config import Config
from distill.data import MicroBatch
from distill.step import messages
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.actions import Action, Kind, Plan
from parallel.pipeline.course import proven
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import Links
from parallel.pipeline.schedules import forward_only
from parallel.pipeline.stage import ForwardStage

_LIST = 8
"""Micro-batches for each rank that are on their way at once; filling and draining takes an eighth as long."""
Consume = Callable[[MicroBatch, dict[Kind, Tensor]], None]


def forward_links(
    config: Config,
    mesh: Mesh,
    students: Sequence[StageModel],
    teacher: StageModel | None,
    *,
    num_stages: int,
) -> Links:
    """Return channels for forward passes alone.

    Args:
        config: says the shape of a micro-batch.
        students, teacher: this rank's stages of the models that will run.
        num_stages: of the whole student.
    Collectives: those of making `Links`.
    """
    student = students[0] if students else None
    traffic = messages(student, teacher, rows=config.train.microbatch_size, seq_len=config.data.seq_len)
    forward = {kind: message for kind, message in traffic.items() if kind is not Kind.B}
    return Links(mesh, forward, num_stages=num_stages)


def run_forward(
    mesh: Mesh,
    links: Links,
    microbatches: Sequence[MicroBatch],
    *,
    students: Sequence[StageModel] = (),
    teacher: StageModel | None = None,
    before: Callable[[MicroBatch], None] = lambda microbatch: None,
    consume: Consume = lambda microbatch, hidden: None,
) -> None:
    """Run the models given over all micro-batches.

    Args:
        links: channels for F (student) and K (teacher), as far as the models are given.
        microbatches: the same number on every replica.
        students: this rank's stages of the student, in ascending order.
        before: called on every stage before it runs a model on a micro-batch.
        consume: called on the last stage with the final hidden states [B, S, D] by kind (F student, K teacher).
    Collectives: those of the stages over tp, and messages over pp.
    """
    size, rank = mesh.pp.size, mesh.pp.rank
    stages = {(Kind.F, chunk * size + rank): ForwardStage(model) for chunk, model in enumerate(students)}
    if teacher is not None:
        stages[Kind.K, rank] = ForwardStage(teacher)
    kinds = {kind for kind, _ in stages}
    done: dict[int, dict[Kind, Tensor]] = {}

    def forward(action: Action) -> None:
        stage, kind, index, _ = action
        running, batch, part = stages[kind, stage], microbatches[index], action.slice or 0
        model = running.model
        before(batch)
        x = None
        if part == 0:
            x = batch.input_ids_BS if model.is_first else links.take(kind, stage, index)
        hidden = running.forward(index, x, batch.position_ids_BS, part=part)
        if hidden is None:
            return
        if not model.is_first:
            links.release(kind, stage, index)
        if not model.is_last:
            links.put(kind, stage, index, hidden)
            return
        done.setdefault(index, {})[kind] = hidden
        if done[index].keys() == kinds:
            consume(batch, done.pop(index))

    plan_of = _plans(size, students, teacher)
    # In order, because both models' hidden states are looked at when the second of them is there.
    executor = Executor(
        {Kind.F: forward, Kind.K: forward}, links, rank=rank, place=mesh.describe(), in_order=True
    )
    # In lists, at whose ends all that was sent has been taken: nothing comes back that would tell, and a rank would keep what it
    # has sent, or run ahead of the next.
    most = _LIST * size if size > 1 else len(microbatches)
    for first in range(0, len(microbatches), max(1, most)):
        executor.run(plan_of(min(most, len(microbatches) - first)), first_microbatch=first)
    executor.close()


def _plans(
    num_ranks: int, students: Sequence[StageModel], teacher: StageModel | None
) -> Callable[[int], Plan]:
    """Return what makes the plan of so many micro-batches, each once."""

    @cache
    def plan_of(num_microbatches: int) -> Plan:
        plan = forward_only(
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            student=bool(students),
            teacher=teacher is not None,
            num_slices=teacher.num_slices if teacher is not None else 1,
            virtual_stages=len(students) or 1,
        )
        return proven(plan, ahead=frozenset())

    return plan_of
