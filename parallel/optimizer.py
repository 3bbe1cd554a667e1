"""The optimizer of one stage, over flat buffers, with a global gradient norm.

Decides where gradients and masters live. All trainable parameters of a stage are views into one flat buffer, their
gradients are accumulated into a second one (`parameter.main_grad`), in float32 at least: a gradient summed over many
micro-batches in bf16 would lose the small ones. bf16 parameters have a float32 master; float32 and float64 parameters
are their own master. One all-reduce reduces a stage over dp, one fused AdamW call steps each run of the buffer.

The order of parameters in the buffers puts those that the gradient norm counts on this rank first, so that shards are
summed over all ranks, and replicated and tied parameters once. Gradients are sums, not means: the loss is already
divided by the global number of valid tokens.

The four pieces are separate because a plan places them: `reduce`, `norm`, `step`, `gather`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.weights import Entry, parameter_table


class NonFiniteGradient(RuntimeError):
    """The global gradient norm is NaN or infinite; every rank raises it in the same step."""


@dataclass(frozen=True)
class LearningRate:
    """Learning rate by step: linear warm-up, then constant, linear or cosine decay to `min_ratio * peak`."""

    peak: float
    warmup_steps: int
    total_steps: int
    schedule: str = "cosine"
    min_ratio: float = 0.0

    def at(self, step: int) -> float:
        """Return the rate of optimizer step `step` (0 is the first; warm-up reaches the peak at `warmup_steps`)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        decay = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * decay)


@dataclass(frozen=True)
class AdamWOptions:
    """Hyperparameters of AdamW; weight decay applies to matrices only."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies in the flat buffers."""

    entry: Entry
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.entry.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.entry.parameter.shape)


class StageOptimizer:
    """AdamW for the trainable parameters of one stage.

    Args:
        table: the stage's parameters (`weights.parameter_table`); frozen ones are left alone.
        mesh: axes of the reductions.
        options: hyperparameters.
        learning_rate: by step.
    Invariant: parameters are views into `self.flat`; between steps they equal the master in their own dtype.
    """

    def __init__(
        self, table: list[Entry], mesh: Mesh, options: AdamWOptions, learning_rate: LearningRate
    ) -> None:
        self.mesh, self.options, self.learning_rate = mesh, options, learning_rate
        trainable = [entry for entry in table if entry.parameter.requires_grad]
        ordered = sorted(trainable, key=self._run_key)
        self.slots: list[_Slot] = []
        for entry in ordered:
            self.slots.append(_Slot(entry, self.slots[-1].stop if self.slots else 0))
        self._allocate()
        self._adam = torch.optim.AdamW(
            [
                {"params": [run], "weight_decay": options.weight_decay if decays else 0.0}
                for run, decays in self._runs()
            ],
            lr=learning_rate.peak,
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )
        for group in self._adam.param_groups:
            (run,) = group["params"]
            zeros = {name: torch.zeros_like(run) for name in ("exp_avg", "exp_avg_sq")}
            self._adam.state[run] = {"step": torch.zeros((), device=run.device), **zeros}

    @staticmethod
    def of_stage(
        stage: StageModel, mesh: Mesh, options: AdamWOptions, learning_rate: LearningRate
    ) -> StageOptimizer:
        """Return the optimizer of everything that is trainable in a stage."""
        return StageOptimizer(parameter_table(stage), mesh, options, learning_rate)

    def _run_key(self, entry: Entry) -> tuple[bool, bool, bool]:
        return (not self._counted(entry), entry.tp_partial_grad, entry.parameter.ndim < 2)

    def _counted(self, entry: Entry) -> bool:
        """Whether this rank's gradient of the parameter enters the global norm."""
        if entry.is_tied_copy:
            return False
        return entry.shard is not None or self.mesh.tp.is_first

    @torch.no_grad()
    def _allocate(self) -> None:
        dtype = self.slots[0].entry.parameter.dtype
        size = self.slots[-1].stop
        device = self.mesh.device
        main = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.flat = torch.empty(size, dtype=dtype, device=device)
        for slot in self.slots:
            slot.view(self.flat).copy_(slot.entry.parameter)
        self.master = self.flat if main == dtype else self.flat.to(main)
        self.flat_grad = torch.zeros(size, dtype=main, device=device)
        for slot in self.slots:
            parameter = slot.entry.parameter
            parameter.data = slot.view(self.flat)
            parameter.main_grad = slot.view(self.flat_grad)
            parameter.register_post_accumulate_grad_hook(_move_grad)

    def _runs(self) -> list[tuple[nn.Parameter, bool]]:
        runs = []
        for (_, _, is_vector), slots in groupby(self.slots, key=lambda slot: self._run_key(slot.entry)):
            members = list(slots)
            where = slice(members[0].start, members[-1].stop)
            run = nn.Parameter(self.master[where])
            run.grad = self.flat_grad[where]
            runs.append((run, not is_vector))
        return runs

    def zero_grad(self) -> None:
        """Clear the accumulated gradients; call before the first backward of a step."""
        self.flat_grad.zero_()

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over dp, partial ones over tp, tied ones over the two ends of the pipeline.

        Collectives: all-reduce over dp; all-reduce over tp if the stage has partial gradients; all-reduce over the tie.
        """
        all_reduce_(self.flat_grad, self.mesh.dp)
        partial = [slot for slot in self.slots if slot.entry.tp_partial_grad]
        for _, members in groupby(partial, key=lambda slot: self._run_key(slot.entry)):
            slots = list(members)
            all_reduce_(self.flat_grad[slots[0].start : slots[-1].stop], self.mesh.tp)
        if self.mesh.tie.size > 1:
            for slot in self.slots:
                if slot.entry.is_tied_copy or slot.entry.is_tied_source:
                    all_reduce_(slot.view(self.flat_grad), self.mesh.tie)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the global L2 norm of the reduced gradients (0-dim), equal on every rank.

        Collectives: all-reduce over pp x tp.
        """
        counted = sum(slot.entry.parameter.numel() for slot in self.slots if self._counted(slot.entry))
        total = torch.linalg.vector_norm(self.flat_grad[:counted]).square()
        all_reduce_(total, self.mesh.model)
        return total.sqrt()

    @torch.no_grad()
    def step(self, step: int, norm: Tensor) -> float:
        """Clip to the global norm and update the masters; return the learning rate used.

        Args:
            step: optimizer step, from 0.
            norm: what `norm()` returned.
        Raises:
            NonFiniteGradient: NaN or infinity, on every rank alike.
        """
        value = norm.item()
        if not math.isfinite(value):
            raise NonFiniteGradient(f"the gradient norm of step {step + 1} is {value}")
        if self.options.clip and value > self.options.clip:
            self.flat_grad.mul_(self.options.clip / (value + 1e-6))
        rate = self.learning_rate.at(step)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        return rate

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the stepped masters back into the parameters (a copy where the dtypes differ)."""
        if self.master is not self.flat:
            self.flat.copy_(self.master)

    def state(self) -> list[tuple[Entry, dict[str, Tensor]]]:
        """Return for each parameter views of its master and moments, in the parameter's local shape."""
        result = [(slot.entry, {"weight": slot.view(self.master)}) for slot in self.slots]
        for group in self._adam.param_groups:
            (run,) = group["params"]
            offset = run.storage_offset() - self.master.storage_offset()
            for slot, (_, views) in zip(self.slots, result, strict=True):
                if offset <= slot.start and slot.stop <= offset + run.numel():
                    for name in ("exp_avg", "exp_avg_sq"):
                        local = self._adam.state[run][name][slot.start - offset : slot.stop - offset]
                        views[name] = local.view(slot.entry.parameter.shape)
        return result

    def set_step(self, step: int) -> None:
        """Tell AdamW how many updates the restored moments have seen (bias correction); refresh the parameters."""
        for state in self._adam.state.values():
            state["step"].fill_(step)
        self.gather()


def _move_grad(parameter: nn.Parameter) -> None:
    """Add what autograd left in `grad` to the flat buffer (norms and whatever is no parallel layer)."""
    # Parallel layers give autograd no gradient for their weights, but the hook runs all the same.
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
