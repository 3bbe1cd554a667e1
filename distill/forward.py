"""Forward passes of student and teacher through the pipeline, without gradients: for evaluation and calibration.

The same plan, links and executor as training, with `F` and `K` bound to stages that keep nothing. What happens with the
last stage's hidden states is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from distill.data import MicroBatch
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.executor import execute
from parallel.pipeline.lower import add_communication
from parallel.pipeline.p2p import Links
from parallel.pipeline.schedules import forward_only
from parallel.pipeline.stage import ForwardStage

Consume = Callable[[MicroBatch, dict[Kind, Tensor]], None]


def run_forward(
    mesh: Mesh,
    links: Links,
    microbatches: Sequence[MicroBatch],
    *,
    student: StageModel | None = None,
    teacher: StageModel | None = None,
    before: Callable[[MicroBatch], None] = lambda microbatch: None,
    consume: Consume = lambda microbatch, hidden: None,
) -> None:
    """Run the models given over all micro-batches.

    Args:
        links: channels for F (student) and K (teacher), as far as the models are given.
        microbatches: the same number on every replica.
        before: called on every stage before it runs a model on a micro-batch.
        consume: called on the last stage with the final hidden states [B, S, D] by kind (F student, K teacher).
    Collectives: those of the stages over tp, and messages over pp.
    """
    models = {kind: model for kind, model in ((Kind.F, student), (Kind.K, teacher)) if model is not None}
    stages = {kind: ForwardStage(model) for kind, model in models.items()}
    done: dict[int, dict[Kind, Tensor]] = {}

    def forward(action: Action) -> None:
        kind, index = action.kind, action.microbatch
        model, batch, part = models[kind], microbatches[index], action.slice or 0
        before(batch)
        x = None
        if part == 0:
            x = batch.input_ids_BS if model.is_first else links.inbox.pop((kind, index))
        hidden = stages[kind].forward(index, x, batch.position_ids_BS, part=part)
        if hidden is None:
            return
        if not model.is_last:
            links.outbox[kind, index] = hidden
            return
        done.setdefault(index, {})[kind] = hidden
        if done[index].keys() == models.keys():
            consume(batch, done.pop(index))

    plan = forward_only(
        num_ranks=mesh.pp.size,
        num_microbatches=len(microbatches),
        student=student is not None,
        teacher=teacher is not None,
        num_slices=teacher.num_slices if teacher is not None else 1,
    )
    actions = add_communication(plan).ranks[mesh.pp.rank]
    links.begin(actions)
    handlers = {Kind.F: forward, Kind.K: forward, **links.handlers()}
    execute(actions, handlers, rank=mesh.pp.rank, place=mesh.describe())
    links.finish()
