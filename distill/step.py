"""One optimizer step: the plan's actions bound to teacher, student, loss and optimizer.

Decides what each kind of action means: `F` and `B`/`W` are the student's, `K` is a slice of the teacher (only this file
knows that), and on the last stage `B` begins with both heads and the loss. The order is the plan's, the
micro-batches are the caller's. Teacher outputs are looked up by micro-batch, never "the latest". The loss is
divided by one number, the valid tokens of the whole step, known before the first backward.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import Loss
from distill.data import MicroBatch
from distill.losses import Head, fused_distillation_loss
from parallel.collectives import all_reduce_
from parallel.gradients import grad_target
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import StageOptimizer
from parallel.pipeline.actions import Action, Kind, Plan
from parallel.pipeline.executor import execute
from parallel.pipeline.p2p import Links, Message
from parallel.pipeline.simulate import OCCUPYING, Event
from parallel.pipeline.stage import ForwardStage, TrainStage


def head_of(stage: StageModel) -> Head:
    """Return the output head of a last stage as the losses take it."""
    head = stage.head
    return Head(
        head.weight,
        head.bias,
        scale=stage.transform.scale,
        softcap=stage.transform.softcap,
        vocab_size=head.out_features,
    )


def messages(
    student: StageModel | None, teacher: StageModel | None, *, rows: int, seq_len: int
) -> dict[Kind, Message]:
    """Return shape and dtype of what travels between stages, for micro-batches of `rows` x `seq_len` tokens."""
    traffic: dict[Kind, Message] = {}
    for model, kinds in ((student, (Kind.F, Kind.B)), (teacher, (Kind.K,))):
        if model is not None:
            shape = (rows, seq_len, model.config.hidden_size)
            dtype = next(model.parameters()).dtype
            traffic |= dict.fromkeys(kinds, Message(shape, dtype))
    return traffic


@dataclass(frozen=True)
class StepStats:
    """What one step reports, equal on every rank but for `step_s`."""

    hard: float
    """Cross-entropy, nats per valid token."""
    soft: float
    """T^2 KL, nats per valid token."""
    total: float
    grad_norm: float
    learning_rate: float
    num_valid_tokens: int
    step_s: float
    bubble_fraction: float
    """Idle share of the step, mean over all ranks: time in which it neither computed nor stepped."""


@dataclass
class _Progress:
    """What changes while a step runs."""

    microbatches: Sequence[MicroBatch]
    num_valid_tokens: int
    step: int
    hard: Tensor
    soft: Tensor
    norm: Tensor | None = None
    learning_rate: float = 0.0


class DistillationStep:
    """Runs optimizer steps of one rank by a lowered plan.

    Args:
        mesh: where this rank stands.
        student, teacher: this rank's stages; the teacher may be None when the loss is the hard one alone.
        optimizer: of the student's stage.
        plan: lowered; its rank `mesh.pp.rank` is run.
        loss: kind, temperature, alpha.
        links: channels to the neighbour stages.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        student: StageModel,
        teacher: StageModel | None,
        optimizer: StageOptimizer,
        plan: Plan,
        loss: Loss,
        links: Links,
    ) -> None:
        self.mesh, self.loss, self.links, self.optimizer = mesh, loss, links, optimizer
        self.student_model, self.teacher_model = student, teacher
        self.student = TrainStage(student)
        self.teacher = ForwardStage(teacher) if teacher is not None else None
        self.actions, self.num_microbatches = plan.ranks[mesh.pp.rank], plan.shape.num_microbatches
        self._whole = whole_backwards(self.actions)
        self._student_hidden: dict[int, Tensor] = {}
        self._signals: dict[int, Tensor] = {}
        self.last_events: list[Event] = []
        """This rank's actions of the last step with their times."""
        self._handlers = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.W: self._backward_weight,
            Kind.K: self._teacher_forward,
            Kind.REDUCE: lambda action: self.optimizer.reduce(),
            Kind.NORM: self._norm,
            Kind.STEP: self._step,
            Kind.GATHER: lambda action: self.optimizer.gather(),
            **links.handlers(),
        }

    def __call__(self, step: int, microbatches: Sequence[MicroBatch]) -> StepStats:
        """Run optimizer step `step` on this replica's micro-batches.

        Collectives: all-reduce of the token count over dp; those of the plan; all-reduce of the statistics over the world.
        """
        assert len(microbatches) == self.num_microbatches, (len(microbatches), self.num_microbatches)
        start_s = time.perf_counter()
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self._now = _Progress(
            microbatches, self._count_tokens(microbatches), step, zero.clone(), zero.clone()
        )
        self.optimizer.zero_grad()
        self.links.begin(self.actions)
        self.last_events = execute(
            self.actions, self._handlers, rank=self.mesh.pp.rank, place=self.mesh.describe()
        )
        self.links.finish()
        assert not self._signals and not self._student_hidden and not self.student.num_kept
        return self._stats(time.perf_counter() - start_s)

    def _count_tokens(self, microbatches: Sequence[MicroBatch]) -> int:
        count = torch.tensor(sum(batch.num_valid_tokens for batch in microbatches), device=self.mesh.device)
        all_reduce_(count, self.mesh.dp)
        return int(count)

    def _forward(self, action: Action) -> None:
        microbatch = action.microbatch
        batch = self._now.microbatches[microbatch]
        x = batch.input_ids_BS if self.student_model.is_first else self.links.inbox.pop((Kind.F, microbatch))
        hidden = self.student.forward(microbatch, x, batch.position_ids_BS)
        if self.student_model.is_last:
            self._student_hidden[microbatch] = hidden
        else:
            self.links.outbox[Kind.F, microbatch] = hidden

    def _backward(self, action: Action) -> None:
        microbatch = action.microbatch
        if self.student_model.is_last:
            grad = self._loss(microbatch)
        else:
            grad = self.links.inbox.pop((Kind.B, microbatch))
        backward = self.student.backward if action in self._whole else self.student.backward_input
        grad_input = backward(microbatch, grad)
        if grad_input is not None:
            self.links.outbox[Kind.B, microbatch] = grad_input

    def _backward_weight(self, action: Action) -> None:
        if action._replace(kind=Kind.B) not in self._whole:
            self.student.backward_weight(action.microbatch)

    def _loss(self, microbatch: int) -> Tensor:
        """Run both heads and the loss on a micro-batch; return the gradient of the student's hidden state."""
        hidden_BSD = self._student_hidden.pop(microbatch)
        signal_BSE = self._signals.pop(microbatch, None)
        head = self.student_model.head
        trains = head.weight.requires_grad
        result = fused_distillation_loss(
            hidden_BSD.flatten(0, 1),
            head_of(self.student_model),
            None if signal_BSE is None else signal_BSE.flatten(0, 1),
            None if self.teacher_model is None else head_of(self.teacher_model),
            self._now.microbatches[microbatch].labels_BS.flatten(),
            kind=self.loss.kind,
            temperature=self.loss.temperature,
            alpha=self.loss.alpha,
            num_valid_tokens=max(1, self._now.num_valid_tokens),
            tp=self.mesh.tp,
            grad_weight_out_VD=grad_target(head.weight) if trains else None,
            grad_bias_out_V=grad_target(head.bias) if trains and head.bias is not None else None,
        )
        self._now.hard += result.hard
        self._now.soft += result.soft
        return result.grad_hidden_TD.view_as(hidden_BSD)

    def _teacher_forward(self, action: Action) -> None:
        microbatch, part = action.microbatch, action.slice or 0
        batch = self._now.microbatches[microbatch]
        x = None
        if part == 0:
            x = (
                batch.input_ids_BS
                if self.teacher_model.is_first
                else self.links.inbox.pop((Kind.K, microbatch))
            )
        hidden = self.teacher.forward(microbatch, x, batch.position_ids_BS, part=part)
        if hidden is None:
            return
        if self.teacher_model.is_last:
            self._signals[microbatch] = hidden
        else:
            self.links.outbox[Kind.K, microbatch] = hidden

    def _norm(self, action: Action) -> None:
        self._now.norm = self.optimizer.norm()

    def _step(self, action: Action) -> None:
        self._now.learning_rate = self.optimizer.step(self._now.step, self._now.norm)

    def _stats(self, step_s: float) -> StepStats:
        busy_s = sum(
            event.end_s - event.start_s for event in self.last_events if event.action.kind in OCCUPYING
        )
        mine = torch.stack([self._now.hard, self._now.soft]) / self.mesh.tp.size
        report = torch.cat([mine.cpu(), torch.tensor([max(0.0, 1 - busy_s / step_s)], dtype=torch.float64)])
        report = report.to(self.mesh.device)
        all_reduce_(report, self.mesh.world)
        hard, soft, idle = report.tolist()
        return StepStats(
            hard=hard,
            soft=soft,
            total=self.loss.alpha * hard + (1 - self.loss.alpha) * soft,
            grad_norm=self._now.norm.item(),
            learning_rate=self._now.learning_rate,
            num_valid_tokens=self._now.num_valid_tokens,
            step_s=step_s,
            bubble_fraction=idle / self.mesh.world.size,
        )


def whole_backwards(actions: Sequence[Action]) -> frozenset[Action]:
    """Return the `B` actions that their own `W` follows directly: they run as one backward."""
    return frozenset(
        first
        for first, second in itertools.pairwise(actions)
        if first.kind is Kind.B and second == first._replace(kind=Kind.W)
    )
