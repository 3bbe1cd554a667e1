"""Forward passes of student and teacher through the pipeline, without gradients: for evaluation and calibration.

The same plan, links and executor as training, with `F` and `K` bound to stages that keep nothing. What happens with the
last stage's hidden states is the caller's. The links must not be those of a training whose teacher is ahead: its
messages would be taken for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from distill.config import Config
from distill.data import MicroBatch
from distill.step import messages
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.executor import Executor
from parallel.pipeline.lower import add_communication
from parallel.pipeline.p2p import Links
from parallel.pipeline.schedules import forward_only
from parallel.pipeline.stage import ForwardStage

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

    plan = forward_only(
        num_ranks=size,
        num_microbatches=len(microbatches),
        student=bool(students),
        teacher=teacher is not None,
        num_slices=teacher.num_slices if teacher is not None else 1,
        virtual_stages=len(students) or 1,
    )
    # In order, because both models' hidden states are looked at when the second of them is there.
    executor = Executor(
        {Kind.F: forward, Kind.K: forward}, links, rank=rank, place=mesh.describe(), in_order=True
    )
    executor.run(add_communication(plan), first_microbatch=0)
    executor.close()
