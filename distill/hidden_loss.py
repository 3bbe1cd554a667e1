"""The hidden-state term: the student's layers pulled towards the teacher's, whichever ranks hold the two.

    loss/hidden = mean over mapped layers i of  sum over valid tokens of D(P_i h_s[i], h_t[f(i)]) / num_valid_tokens
    mse:     D = |P h_s - h_t|^2 / |h_t|^2    (the mean squares' quotient: layers, and tokens whose states are huge, count alike)
    cosine:  D = 1 - cos(P h_s, h_t)

Decides how it joins the pipeline without any action of its own. A hook on the teacher's layer f(i) hands its output over
when `K` has made it; a hook on the gradient of the student's layer i, where a backward comes to it, takes it, computes the
term's gradient in closed form and adds it. Every `K` of a micro-batch comes before its loss and so before every `B` of it:
who takes never waits for somebody that waits for him. Hooks look at what `TrainStage` and `ForwardStage` run, so nothing
happens in evaluations, nor when a backward recomputes a layer.

The projections P_i are trained by the student's optimizer and written to checkpoints, and are no part of the student: not
exported, not counted. They are replicated over tp, where hidden states between layers are as well. P_i's gradient is
work like that of any linear's weight, and complete when the backward has done layer i. A round that cuts its student begins
with new ones; one that goes on with the student of the round before goes on with them where the shapes agree.

Legend: B sequences, S positions, T = B*S tokens, D the student's residual width, E the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import Config
from distill.costs import Split
from distill.data import MicroBatch
from distill.head import compute_dtype
from distill.hidden_map import PROJECTION, Pair, check_widths, first_projection, layer_pairs, shared_with
from distill.loading import Models
from distill.packing import IGNORE
from parallel.gradients import WeightGradients, accumulate_outer_, grad_target
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.handover import Handover, Route
from parallel.pipeline.p2p import Message
from parallel.pipeline.stage import ForwardStage, TrainStage
from parallel.weights import Entry


def hidden_distance(
    student_TE: Tensor, teacher_TE: Tensor, valid_T: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Return the sum of D over the valid tokens, float64 0-dim, and its gradient by the student's side.

    Args:
        student_TE: hidden states in the teacher's width.
        teacher_TE: the teacher's.
        valid_T: bool; which tokens count.
        kind: `mse` or `cosine`.
    Returns:
        The sum, and the gradient [T, E] in float32 at least.
    """
    dtype = compute_dtype(student_TE)
    student_TE, teacher_TE = student_TE.to(dtype), teacher_TE.to(dtype)
    tiny = torch.finfo(dtype).tiny
    if kind == "mse":
        difference_TE = student_TE - teacher_TE
        weight_T = valid_T / teacher_TE.square().sum(dim=1).clamp_min(tiny)
        distance_T = difference_TE.square().sum(dim=1) * weight_T
        return distance_T.sum(dtype=torch.float64), difference_TE.mul_(2 * weight_T[:, None])
    norm_T1 = torch.linalg.vector_norm(student_TE, dim=1, keepdim=True).clamp_min(tiny)
    student_TE = student_TE / norm_T1
    teacher_TE = teacher_TE / torch.linalg.vector_norm(teacher_TE, dim=1, keepdim=True).clamp_min(tiny)
    cosine_T1 = (student_TE * teacher_TE).sum(dim=1, keepdim=True)
    valid_T1 = valid_T[:, None].to(dtype)
    gradient_TE = (cosine_T1 * student_TE - teacher_TE) * (valid_T1 / norm_T1)
    return ((1 - cosine_T1) * valid_T1).sum(dtype=torch.float64), gradient_TE


class HiddenTerm:
    """This rank's part of the term: projections of its student's layers, hooks on both models, and what travels between.

    Args:
        mesh: where this rank stands.
        pairs: layers that are compared, equal on all ranks; a student's layer once.
        split: which rank holds which layer.
        message: shape [B, S, E] and dtype of the teacher's hidden states of a micro-batch.
        kind: `mse` or `cosine`.
        students: this rank's stages of the student.
        first: student's layer -> what its projection starts as [E, D]; None compares without projections.
        channels: without projections, the teacher's channels that the student has, int64 [D]; None: all.
    Collectives: those of making a `Handover`.
    """

    def __init__(
        self,
        mesh: Mesh,
        pairs: Sequence[Pair],
        *,
        split: Split,
        message: Message,
        kind: str,
        students: Sequence[StageModel],
        first: Callable[[int], Tensor] | None,
        channels: Tensor | None = None,
    ) -> None:
        self._mesh, self._pairs, self._kind, self._message = mesh, tuple(pairs), kind, message
        self._channels = None if channels is None else channels.to(mesh.device)
        self.projections: dict[int, nn.Parameter] = {}
        """By layer of the student."""
        for pair in pairs if first is not None else ():
            if any(pair.student in stage.owned for stage in students):
                start_ED = first(pair.student).to(mesh.device, message.dtype)
                self.projections[pair.student] = nn.Parameter(start_ED)
        # As a rank makes them: its teacher's layers in order.
        routes = [
            Route(pair.student, _holder(pair.teacher, split.teacher, mesh), _holder(pair.student, split.student, mesh))
            for pair in sorted(pairs, key=lambda pair: (pair.teacher, pair.student))
        ]  # fmt: skip
        self.handover = Handover(mesh, routes, message)
        self._weight = 0.0
        self._num_valid_tokens: Callable[[], int] | None = None
        self._batches: Callable[[int], Sequence[MicroBatch]] | None = None
        self._labels: dict[int, Tensor] = {}
        self.sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        """This rank's part of the step's loss/hidden."""

    def entries(self, stage: StageModel) -> list[Entry]:
        """Return the projections of a stage's layers, for the optimizer."""
        return [
            Entry(f"{PROJECTION}{layer}.weight", projection, shard=None, tp=self._mesh.tp, layer=layer)
            for layer, projection in self.projections.items()
            if layer in stage.owned
        ]

    def attach(
        self,
        students: Iterable[TrainStage],
        teacher: ForwardStage,
        batches: Callable[[int], Sequence[MicroBatch]],
    ) -> None:
        """Put the hooks on both models; once.

        Args:
            students, teacher: what runs this rank's stages.
            batches: step -> its micro-batches on this replica.
        """
        assert self._batches is None, "the hooks are there already"
        self._batches = batches
        for stage in students:
            for pair in self._pairs:
                if pair.student in stage.model.owned:
                    layer = stage.model.layers[pair.student]
                    layer.register_forward_hook(partial(self._tap, stage, pair.student))
        for layer, module in teacher.model.layers.items():
            names = [pair.student for pair in self._pairs if pair.teacher == layer]
            if names:
                module.register_forward_hook(partial(self._hand_over, teacher, names))

    def begin(self, step: int, weight: float, num_valid_tokens: Callable[[], int]) -> None:
        """Begin optimizer step `step`; all that the one before was handed has been taken.

        Args:
            weight: of the term; where it is 0 nothing is computed.
            num_valid_tokens: of the whole step; asked in its first backward.
        """
        assert self.handover.is_settled, "tensors of the step before have not been taken"
        batches = self._batches(step)
        self._labels = {number: batch.labels_BS for number, batch in enumerate(batches, step * len(batches))}
        self._weight, self._num_valid_tokens = weight, num_valid_tokens
        self.sum.zero_()
        self.handover.expect(self._labels)

    def close(self) -> None:
        """Forget what the teacher has handed over ahead, and let go of the groups. Collectives: those of `Handover.drop`."""
        self.handover.drop()
        self.handover.close()

    @torch.compiler.disable
    def _hand_over(
        self,
        teacher: ForwardStage,
        names: list[int],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Tensor,
    ) -> None:
        if teacher.running is not None:
            for name in names:
                self.handover.put(name, teacher.running, output)

    @torch.compiler.disable
    def _tap(
        self, stage: TrainStage, layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        if stage.running is not None:
            pull = partial(self._pull, layer, stage.running, stage.model.weight_gradients, output.detach())
            output.register_hook(pull)

    @torch.no_grad()
    def _pull(
        self, layer: int, microbatch: int, work: WeightGradients, hidden_BSD: Tensor, grad_BSD: Tensor
    ) -> Tensor:
        """Return the gradient of a layer's output with the term's added."""
        teacher_BSE = self.handover.take(layer, microbatch)
        if self._weight > 0:
            valid_T = self._labels[microbatch].flatten() != IGNORE
            ours_TD = self._gradient(
                layer, work, hidden_BSD.flatten(0, 1), teacher_BSE.flatten(0, 1), valid_T
            )
            grad_BSD = grad_BSD + ours_TD.view_as(grad_BSD)
        self.handover.release(layer, microbatch)
        return grad_BSD

    def _gradient(
        self, layer: int, work: WeightGradients, hidden_TD: Tensor, teacher_TE: Tensor, valid_T: Tensor
    ) -> Tensor:
        """Add a micro-batch's part of the loss and of the projection's gradient; return that of the hidden state."""
        projection_ED = self.projections.get(layer)
        if self._channels is not None:
            teacher_TE = teacher_TE.index_select(1, self._channels)
        student_TE = hidden_TD if projection_ED is None else hidden_TD @ projection_ED.t()
        distance, grad_TE = hidden_distance(student_TE, teacher_TE, valid_T, self._kind)
        share = 1 / (len(self._pairs) * max(1, self._num_valid_tokens()))
        self.sum += distance * share
        grad_TE = (grad_TE * (share * self._weight)).to(hidden_TD.dtype)
        if projection_ED is None:
            return grad_TE
        work.submit(partial(accumulate_outer_, grad_target(projection_ED), grad_TE, hidden_TD))
        return grad_TE @ projection_ED


def _holder(layer: int, stages: Sequence[range], mesh: Mesh) -> int:
    """Return the pipeline rank that holds a layer."""
    return next(stage for stage, layers in enumerate(stages) if layer in layers) % mesh.pp.size


def open_hidden(
    config: Config, mesh: Mesh, models: Models, *, teacher: StageModel, students: Sequence[StageModel]
) -> HiddenTerm | None:
    """Return this rank's part of the term, None where its weight is 0 in every step.

    Args:
        teacher, students: this rank's stages.
    Raises:
        ConfigError: no projection is wanted where one is needed.
    Collectives: those of making a `HiddenTerm`.
    """
    hidden = config.loss.hidden
    if not hidden.is_on:
        return None
    shared = shared_with(models.student_folder, models.teacher_folder, config.teacher.model)
    if shared.layers is None and hidden.layers is None and mesh.world.is_first:
        print(
            f"hidden states: {config.teacher.model} does not have the layers that {models.student_folder} was cut from, as far as "
            "it tells; layers of the same relative depth are compared",
            flush=True,
        )
    widths = {"student_width": students[0].config.hidden_size, "teacher_width": teacher.config.hidden_size}
    check_widths(config, **widths, shares_channels=shared.channels is not None)
    learned = hidden.projection == "learned"
    return HiddenTerm(
        mesh,
        layer_pairs(
            hidden,
            student_layers=models.split.student[-1].stop,
            teacher_layers=models.split.teacher[-1].stop,
            shared=shared.layers,
        ),
        split=models.split,
        message=Message(
            (config.train.microbatch_size, config.data.seq_len, teacher.config.hidden_size),
            next(teacher.parameters()).dtype,
        ),
        kind=hidden.kind,
        students=students,
        first=partial(first_projection, **widths, channels=shared.channels, seed=config.train.seed)
        if learned
        else None,
        channels=None if learned else shared.channels,
    )
