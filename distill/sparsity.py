"""Weights that are held at zero: which ones, and when.

Decides the masks of the student's linear weights in its decoder layers (`structure.MATRICES`; embeddings, head, norms and
biases stay dense), and leaves the holding to `parallel.optimizer`. The score of a weight and whom it is compared with:

    magnitude   |w_ij|                 with the whole matrix
    wanda       |w_ij| * ||x_j||_2     with its output row; x_j: input channel j over the calibration text

    unstructured   of each set the share `ratio` with the lowest scores
    2:4            of each four neighbours along the input dim the two with the lowest scores; while the share of groups
                   rises, of each set the groups first whose two lowest scores add up to least

Matrices are those of the model's files, also where tp cuts them, and equal scores go by their order there, so the masks
do not depend on the layout. What is held stays held. The share is reached at once, before the first step, or rises over
the first n steps: after t of them

    at_once   ratio        linear   ratio * t/n        cubic   ratio * (1 - (1 - t/n)^3)

Scores are taken from the masters in float32; input norms are those of the student before the round's first step, and are
measured anew when a run goes on: the student that the round began with is still there.

Legend: R rows (outputs), C columns (inputs) of this rank's part of a matrix; Q groups of four.
Source: Zhu & Gupta 2017 (cubic); Sun et al. 2023 (Wanda); Mishra et al. 2021 (2:4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import Config, ConfigError
from distill.data import MicroBatch
from distill.forward import run_forward
from distill.importance import ActivationRecorder
from distill.scores import unite
from distill.structure import MATRICES, Sizes, Unit
from distill.student_config import Sparsity
from parallel.buckets import Slot, is_counted
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import StageOptimizer
from parallel.pipeline.p2p import Links
from parallel.ranking import float_keys, smallest

GROUP = 4
"""Neighbours along the input dim of which 2:4 keeps two."""
InputNorms = Mapping[tuple[int, str], Tensor]
"""(layer, name of a linear in it) -> float32 [in], ||x_j||_2 of each of its whole input's channels."""


def progress_after(schedule: str, step: int, rising_steps: int) -> float:
    """Return which part of the final share is held after `step` of `rising_steps` optimizer steps, 0 to 1."""
    if step >= rising_steps:
        return 1.0
    done = step / rising_steps
    return done if schedule == "linear" else 1 - (1 - done) ** 3


def input_norms(
    stages: Sequence[StageModel], mesh: Mesh, links: Links, microbatches: Sequence[MicroBatch]
) -> dict[tuple[int, str], Tensor]:
    """Measure how strongly each input channel of each linear weight is driven by a text.

    Args:
        stages: this rank's stages of the student, in ascending order.
        links: channels for F.
        microbatches: this replica's share of the text; positions without a label do not count.
    Returns:
        Norms of the linears in the layers of this rank, the same on all ranks that hold the layer.
    Collectives: a forward pass, then gathers of objects over tp, dp and pp.
    """
    layers = {index: layer for stage in stages for index, layer in stage.layers.items()}
    with ActivationRecorder(layers, Sizes.of(stages[0].config), influence=False) as recorder:
        run_forward(
            mesh,
            links,
            microbatches,
            students=stages,
            before=recorder.look_at,
        )
    by_layer = unite(recorder.measured, mesh)
    return {
        (index, name): _read_by(name, by_layer[index]).sqrt().float()
        for index, layer in layers.items()
        for name, _ in layer.named_modules()
        if name in MATRICES
    }


def _read_by(name: str, quantities: Mapping[str, Tensor]) -> Tensor:
    """Return the sums of squares of a linear's input; what reads the residual stream in one block reads the same."""
    if name in quantities:
        return quantities[name]
    block, _, _ = name.partition(".")
    return next(
        squares
        for other, squares in quantities.items()
        if other.startswith(f"{block}.") and other in MATRICES and MATRICES[other][1] == (Unit.HIDDEN,)
    )


@dataclass(frozen=True)
class _Target:
    """One matrix that is made sparse, as this rank has it."""

    slot: Slot
    norm_C: Tensor | None
    """||x_j||_2 of this rank's columns; None for magnitude."""


class Sparsifier:
    """Masks of one rank's stages; chooses them at `begin` and at the ends of the steps in which the share rises.

    Args:
        stages: of the student, in ascending order.
        optimizer: of these stages; it gets a mask here.
        settings: what to hold at zero; `method` is not None.
        total_steps: optimizer steps of the round.
        norms: `input_norms`; None for `magnitude`.
    Raises:
        ConfigError: a group of 2:4 would be cut by tp or by the end of a row.
    Collectives: as `advance`.
    """

    def __init__(
        self,
        stages: Sequence[StageModel],
        optimizer: StageOptimizer,
        settings: Sparsity,
        *,
        total_steps: int,
        norms: InputNorms | None = None,
    ) -> None:
        self.settings, self._optimizer = settings, optimizer
        self._rising_steps = 0
        if settings.schedule != "at_once":
            self._rising_steps = settings.steps or max(1, total_steps // 2)
        slots = {id(slot.entry.parameter): slot for slot in optimizer.slots}
        self._targets = [
            _Target(slots[id(module.weight)], None if norms is None else norms[index, name])
            for stage in stages
            for index, layer in stage.layers.items()
            for name, module in layer.named_modules()
            if name in MATRICES
        ]
        self._targets = [self._local(target) for target in self._targets]
        optimizer.make_mask()

    def begin(self) -> None:
        """Hold what the schedule holds at once; call when the weights are those that training goes on from.

        Collectives: as `advance`.
        """
        if self.settings.schedule == "at_once":
            self._hold(1.0)

    def _local(self, target: _Target) -> _Target:
        """Return the target with the norms of this rank's columns, checked."""
        slot, norm = target.slot, target.norm_C
        shard, parameter = slot.entry.shard, slot.entry.parameter
        columns = shard if shard is not None and shard.dim == 1 else None
        if self.settings.pattern == "2:4":
            ends = (columns.start, columns.stop) if columns is not None else (0, parameter.shape[1])
            if any(end % GROUP for end in ends):
                raise ConfigError(
                    f"student.sparsity.pattern=2:4 needs groups of {GROUP} inputs, but mesh.tp={slot.entry.tp.size} gives "
                    f"a rank inputs {ends[0]} to {ends[1]} of {slot.entry.name}; use another mesh.tp or unstructured"
                )
        if norm is not None and columns is not None:
            norm = norm[columns.start : columns.stop]
        return _Target(slot, None if norm is None else norm.to(parameter.device))

    def advance(self, step: int) -> None:
        """Hold more at zero at the end of optimizer step `step` (from 0), if the share is still to rise.

        Collectives: those of `StageOptimizer.master` and of `ranking.smallest`, matrix by matrix.
        """
        if step < self._rising_steps:
            self._hold(progress_after(self.settings.schedule, step + 1, self._rising_steps))

    def share(self) -> float:
        """Return which share of the weights in these matrices is held at zero. Collectives: an all-reduce over pp x tp."""
        mesh = self._optimizer.mesh
        counted = [target.slot for target in self._targets if is_counted(target.slot.entry, mesh.tp)]
        held = sum(int(slot.view(self._optimizer.mask).sum()) for slot in counted)
        size = sum(slot.entry.parameter.numel() for slot in counted)
        total = torch.tensor([held, size], dtype=torch.int64, device=mesh.device)
        all_reduce_(total, mesh.model)
        held, size = total.tolist()
        return held / size

    @torch.no_grad()
    def _hold(self, progress: float) -> None:
        choose = self._groups if self.settings.pattern == "2:4" else self._entries
        for target in self._targets:
            held_RC = target.slot.view(self._optimizer.mask)
            scores_RC = self._optimizer.master(target.slot).abs()
            if target.norm_C is not None:
                scores_RC = scores_RC * target.norm_C
            held_RC |= choose(target, scores_RC, held_RC, progress)
        self._optimizer.apply_mask()

    def _entries(self, target: _Target, scores_RC: Tensor, held_RC: Tensor, progress: float) -> Tensor:
        # Key 0 is for what is held already: below every other, so that it is chosen again.
        keys_RC = float_keys(scores_RC).masked_fill_(held_RC, 0)
        return self._smallest(target, keys_RC, self.settings.ratio * progress, unit=1)

    def _groups(self, target: _Target, scores_RC: Tensor, held_RC: Tensor, progress: float) -> Tensor:
        shape = (scores_RC.shape[0], scores_RC.shape[1] // GROUP, GROUP)
        scores_RQ4 = scores_RC.reshape(shape)
        lowest = float_keys(scores_RQ4).argsort(dim=-1, stable=True)[..., : GROUP // 2]
        damage_RQ = scores_RQ4.gather(-1, lowest).sum(dim=-1)
        keys_RQ = float_keys(damage_RQ).masked_fill_(held_RC.view(shape).any(dim=-1), 0)
        chosen_RQ = self._smallest(target, keys_RQ, progress, unit=GROUP)
        low_RQ4 = torch.zeros(shape, dtype=torch.bool, device=scores_RC.device).scatter_(-1, lowest, True)
        return (low_RQ4 & chosen_RQ[..., None]).view_as(held_RC)

    def _smallest(self, target: _Target, keys: Tensor, share: float, *, unit: int) -> Tensor:
        """Mark the share of a set's entries, or groups of `unit` entries, with the smallest keys."""
        entry, per_row = target.slot.entry, self.settings.method == "wanda"
        rows, columns = entry.full_shape
        size = columns // unit * (1 if per_row else rows)
        return smallest(keys, round(share * size), per_row=per_row, shard=entry.shard, tp=entry.tp)


def sparsify(
    config: Config,
    *,
    stages: Sequence[StageModel],
    optimizer: StageOptimizer,
    measure: Callable[[], InputNorms],
) -> Sparsifier | None:
    """Return the sparsifier that the settings ask for, or None.

    Args: as `Sparsifier`, but
        measure: returns `input_norms`.
    Collectives: for `wanda` those of `measure`.
    """
    settings = config.student.sparsity
    if settings.method is None:
        return None
    norms = measure() if settings.method == "wanda" else None
    return Sparsifier(stages, optimizer, settings, total_steps=config.train.steps, norms=norms)
