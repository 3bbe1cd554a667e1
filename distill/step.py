"""One optimizer step: the plan's actions bound to teacher, student, loss and optimizer.

Decides what each kind of action means in training: `F` and `B`/`W` are the student's, `K` is a slice of the teacher, and on the
last stage `B` begins with both heads and the loss. The order is the plan's, the micro-batches are the caller's and are
numbered over the whole run, since the teacher looks ahead over the end of a step.
Teacher outputs are looked up by micro-batch, never "the latest". The loss is divided by one number, the valid tokens
of the whole step, known before the first backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from distill.config import Loss
from distill.data import MicroBatch, Window
from distill.divergences import divergence_of
from distill.hidden_loss import HiddenTerm
from distill.losses import Head, fused_distillation_loss
from distill.step_stats import StepStats
from parallel.collectives import all_reduce_
from parallel.gradients import grad_target
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import StageOptimizer
from parallel.pipeline.actions import Action, Kind, Plan, whole_backwards
from parallel.pipeline.course import Course
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import Links, Message
from parallel.pipeline.simulate import Event, busy_seconds
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


@dataclass
class _Progress:
    """What changes while a step runs."""

    step: int
    loss: Loss
    num_valid_tokens: Future[int]
    hard: Tensor
    soft: Tensor
    norm: Tensor | None = None
    learning_rate: float = 0.0
    early: list[Future[None]] = field(default_factory=list)
    """Reductions of buckets that were started inside a backward."""


class DistillationStep:
    """Runs optimizer steps of one rank by the plans of a course.

    Args:
        mesh: where this rank stands.
        students: this rank's stages of the student, in ascending order.
        teacher: this rank's stage; may be None when the loss is the hard one alone.
        optimizer: of the student's stages.
        course: the plans of each step.
        loss: step -> its kind, temperature and alpha, in numbers.
        links: channels to the neighbour stages.
        batches: the micro-batches of an optimizer step, on this replica; asked ahead of the step.
        hidden: the hidden-state term, which needs the teacher; None without one.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        students: Sequence[StageModel],
        teacher: StageModel | None,
        optimizer: StageOptimizer,
        course: Course,
        loss: Callable[[int], Loss],
        links: Links,
        batches: Callable[[int], Sequence[MicroBatch]],
        hidden: HiddenTerm | None = None,
    ) -> None:
        self.mesh, self.loss, self.links, self.optimizer, self.course = mesh, loss, links, optimizer, course
        self.student_models, self.teacher_model = students, teacher
        self.students = {
            chunk * mesh.pp.size + mesh.pp.rank: TrainStage(model) for chunk, model in enumerate(students)
        }
        self.teacher = ForwardStage(teacher) if teacher is not None else None
        self._window = Window(batches, mesh.device)
        self.hidden = hidden
        if hidden is not None:
            hidden.attach(self.students.values(), self.teacher, self._window.step)
        self._whole: frozenset[Action] = frozenset()
        self._student_hidden: dict[int, Tensor] = {}
        self._signals: dict[int, Tensor] = {}
        self.most_signals = 0
        """Teacher outputs that have waited here at once, at most."""
        self.last_events: list[Event] = []
        """This rank's actions of the last step with their times."""
        self.last_plan: Plan | None = None
        """The plan by which the last step ran."""
        handlers = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.W: self._backward_weight,
            Kind.K: self._teacher_forward,
            Kind.REDUCE: self._reduce,
            Kind.NORM: self._norm,
            Kind.STEP: self._step,
            Kind.GATHER: self._gather,
        }
        self._executor = Executor(handlers, links, rank=mesh.pp.rank, place=mesh.describe())

    def __call__(self, step: int, *, carries: bool = False) -> StepStats:
        """Run optimizer step `step`, and what the teacher does ahead in it.

        Args:
            carries: the next step follows at once, or `settle`: the parameters may still be on their way.
        Collectives: all-reduce of the token count over dp; those of the plan; all-reduce of the statistics over the world.
        """
        start_s = time.perf_counter()
        self._window.forget_before(step)
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        tokens = sum(batch.num_valid_tokens for batch in self._window.step(step))
        count = self._executor.beside(lambda: self._add_up_tokens(tokens))
        self._now = _Progress(step, self.loss(step), count, zero.clone(), zero.clone())
        self.optimizer.zero_grad()
        if self.hidden is not None:
            self.hidden.begin(step, self._now.loss.hidden.weight, self._count_valid_tokens)
        busy_s = 0.0
        for plan, first_microbatch in self.course.of(step):
            self.last_plan, self._num_microbatches = plan, plan.shape.num_microbatches
            self._first_microbatch = first_microbatch
            actions = plan.ranks[self.mesh.pp.rank]
            self._whole = whole_backwards(actions)
            last = max((each.microbatch for each in actions if each.microbatch is not None), default=0)
            for ahead in range(step, (first_microbatch + last) // self._num_microbatches + 1):
                # Before anything runs that could wait for the copy on a GPU.
                self._window.step(ahead)
            self.last_events = self._executor.run(plan, first_microbatch=first_microbatch, carries=carries)
            busy_s += busy_seconds(self.last_events)
        kept = [stage for stage in self.students.values() if stage.num_kept]
        assert not kept and not self._student_hidden and all(key >= self._end for key in self._signals)
        return self._stats(time.perf_counter() - start_s, busy_s)

    def settle(self) -> None:
        """Wait for the parameters of a step that has carried them."""
        self._executor.settle()

    def close(self) -> None:
        """End the threads, also with the teacher ahead; the links stay. Collectives: those of `Links.drop`, `HiddenTerm.close`.

        Nothing is left under way: with NCCL a process that leaves waits for what it has sent.
        """
        self._executor.close()
        self.links.drop()
        if self.hidden is not None:
            self.hidden.close()

    @property
    def _end(self) -> int:
        """Number in the run of the first micro-batch after the step."""
        return (self._now.step + 1) * self._num_microbatches

    def _count_valid_tokens(self) -> int:
        """Return the labels that count in the step, on all replicas."""
        return self._executor.result(self._now.num_valid_tokens, "the token count")

    def _add_up_tokens(self, num_valid_tokens: int) -> int:
        count = torch.tensor(num_valid_tokens, device=self.mesh.device)
        all_reduce_(count, self.mesh.gradients.dp)
        return int(count)

    def _microbatch(self, number: int) -> MicroBatch:
        step, index = divmod(number, self._num_microbatches)
        return self._window.step(step)[index]

    def _forward(self, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        model, batch = self.students[stage].model, self._microbatch(microbatch)
        x = batch.input_ids_BS if model.is_first else self.links.take(Kind.F, stage, microbatch)
        hidden = self.students[stage].forward(microbatch, x, batch.position_ids_BS)
        if model.is_last:
            self._student_hidden[microbatch] = hidden
        else:
            self.links.put(Kind.F, stage, microbatch, hidden)

    def _backward(self, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        student = self.students[stage]
        if student.model.is_last:
            grad = self._loss(student.model, microbatch)
        else:
            grad = self.links.take(Kind.B, stage, microbatch)
        if not self._is_whole(action):
            grad_input = student.backward_input(microbatch, grad)
        elif microbatch == self._end - 1 and self.mesh.dp.size > 1:
            grad_input = student.backward(microbatch, grad, layer_done=self._reduce_early(stage))
        else:
            grad_input = student.backward(microbatch, grad)
        if grad_input is not None:
            self.links.put(Kind.B, stage, microbatch, grad_input)

    def _backward_weight(self, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        student = self.students[stage]
        if not self._is_whole(action._replace(kind=Kind.B)):
            student.backward_weight(microbatch)
        # Until here weight gradients may have looked at what the neighbours sent.
        if not student.model.is_first:
            self.links.release(Kind.F, stage, microbatch)
        if not student.model.is_last:
            self.links.release(Kind.B, stage, microbatch)

    def _is_whole(self, action: Action) -> bool:
        return action._replace(microbatch=action.microbatch - self._first_microbatch) in self._whole

    def _loss(self, student: StageModel, microbatch: int) -> Tensor:
        """Run both heads and the loss on a micro-batch; return the gradient of the student's hidden state."""
        hidden_BSD = self._student_hidden.pop(microbatch)
        signal_BSE = self._signals.pop(microbatch, None)
        if signal_BSE is not None and signal_BSE.is_cuda:
            # Made on the teacher's stream; its memory must not go back there before this one has read it.
            signal_BSE.record_stream(torch.cuda.current_stream(signal_BSE.device))
        head, loss = student.head, self._now.loss
        trains = head.weight.requires_grad
        result = fused_distillation_loss(
            hidden_BSD.flatten(0, 1),
            head_of(student),
            None if signal_BSE is None else signal_BSE.flatten(0, 1),
            None if self.teacher_model is None else head_of(self.teacher_model),
            self._microbatch(microbatch).labels_BS.flatten(),
            divergence=divergence_of(loss),
            temperature=loss.temperature,
            alpha=loss.alpha,
            num_valid_tokens=max(1, self._count_valid_tokens()),
            tp=self.mesh.tp,
            grad_weight_out_VD=grad_target(head.weight) if trains else None,
            grad_bias_out_V=grad_target(head.bias) if trains and head.bias is not None else None,
        )
        self._now.hard += result.hard
        self._now.soft += result.soft
        # A loss that is not finite makes its gradients so, and the norm tells every rank; others times 1 keep their bits.
        finite = 1 + 0 * (result.hard + result.soft)
        return result.grad_hidden_TD.mul_(finite).view_as(hidden_BSD)

    def _teacher_forward(self, action: Action) -> None:
        stage, microbatch, part = action.stage, action.microbatch, action.slice or 0
        batch, teacher = self._microbatch(microbatch), self.teacher_model
        x = None
        if part == 0:
            x = batch.input_ids_BS if teacher.is_first else self.links.take(Kind.K, stage, microbatch)
        hidden = self.teacher.forward(microbatch, x, batch.position_ids_BS, part=part)
        if hidden is None:
            return
        if not teacher.is_first:
            self.links.release(Kind.K, stage, microbatch)
        if teacher.is_last:
            self._signals[microbatch] = hidden
            self.most_signals = max(self.most_signals, len(self._signals))
        else:
            self.links.put(Kind.K, stage, microbatch, hidden)

    def _reduce_early(self, stage: int) -> Callable[[int], None]:
        """Return what starts the reduction of a bucket when a backward has completed the last of its layers."""
        chunk = stage // self.mesh.pp.size
        missing = [set(bucket.layers) for bucket in self.optimizer.buckets(chunk)]

        def layer_done(layer: int) -> None:
            for index, layers in enumerate(missing):
                if layer in layers:
                    layers.remove(layer)
                    if not layers:
                        reduce = partial(self.optimizer.reduce_bucket, chunk, index)
                        self._now.early.append(self._executor.beside(reduce))

        return layer_done

    def _reduce(self, action: Action) -> None:
        self.optimizer.reduce(action.stage // self.mesh.pp.size)

    def _norm(self, action: Action) -> None:
        if self._ends_the_rank(action):
            for future in self._now.early:
                # Done by now, since reductions run in order; this raises what went wrong.
                future.result()
            self._now.norm = self.optimizer.norm()

    def _step(self, action: Action) -> None:
        if self._ends_the_rank(action):
            self._now.learning_rate = self.optimizer.step(self._now.step, self._now.norm)

    def _gather(self, action: Action) -> None:
        if self._ends_the_rank(action):
            self.optimizer.gather()

    def _ends_the_rank(self, action: Action) -> bool:
        """Whether an action at the end of the step is that of the rank's last stage: the optimizer takes all at once."""
        return action.stage == max(self.students)

    def _stats(self, step_s: float, busy_s: float) -> StepStats:
        far = torch.zeros_like(self._now.hard) if self.hidden is None else self.hidden.sum
        mine = torch.stack([self._now.hard, self._now.soft, far]) / self.mesh.tp.size
        report = torch.cat([mine, mine.new_tensor([max(0.0, 1 - busy_s / step_s)])])
        all_reduce_(report, self.mesh.world)
        hard, soft, hidden, idle = report.tolist()
        loss = self._now.loss
        return StepStats(
            hard=hard,
            soft=soft,
            hidden=hidden,
            total=loss.alpha * hard + (1 - loss.alpha) * soft + loss.hidden.weight * hidden,
            temperature=loss.temperature,
            alpha=loss.alpha,
            grad_norm=self._now.norm.item(),
            learning_rate=self._now.learning_rate,
            num_valid_tokens=self._count_valid_tokens(),
            step_s=step_s,
            bubble_fraction=idle / self.mesh.world.size,
        )
