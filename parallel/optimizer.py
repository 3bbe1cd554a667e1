"""The optimizer of one rank's stages, over flat buffers, with a global gradient norm.

Decides where gradients and masters live. All trainable parameters of a rank are views into one flat buffer, their
gradients are accumulated into a second one (`parameter.main_grad`), in float32 at least: a gradient summed over many
micro-batches in bf16 would lose the small ones. bf16 parameters have a float32 master; float32 and float64 parameters
are their own master. A step allocates nothing but scalars.

A rank holds one or more stages ("chunks"), each with a part of the buffers cut into buckets (`parallel.buckets`). A bucket
is summed over dp in one call, whenever that is, so the parameters do not depend on when. The norm adds shards over all
ranks, and replicated and tied parameters once, in a fixed order. Gradients are sums, not means: the loss is already
divided by the global number of valid tokens.

A mask may mark entries that are held at exactly 0, in parameter, master and moments. Their gradients are cleared when all
reductions are done, before the norm; AdamW then leaves a 0 whose moments are 0 as it is. Who chooses them is not known here.

The four pieces are separate because a plan places them: `reduce` (parts of it earlier, with `reduce_bucket`), `norm`,
`step`, `gather`. The first two may run on a thread beside compute: they use the mesh's gradient axes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from parallel.buckets import Bucket, lay_out
from parallel.collectives import all_reduce_
from parallel.gradients import main_dtype
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.weights import Entry, parameter_table

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of the running means of the gradient and of its square."""


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


class StageOptimizer:
    """AdamW for the trainable parameters of one rank's stages.

    Args:
        tables: each chunk's parameters (`weights.parameter_table`), stages ascending; frozen ones are left alone.
        mesh: axes of the reductions.
        options: hyperparameters.
        learning_rate: by step.
        bucket_bytes: of gradients, from which on a bucket takes no further layer.
    Invariant: parameters are views into `self.flat`; between steps they equal the master in their own dtype.
    """

    def __init__(
        self,
        tables: Sequence[list[Entry]],
        mesh: Mesh,
        options: AdamWOptions,
        learning_rate: LearningRate,
        *,
        bucket_bytes: int = 25 * 1024**2,
    ) -> None:
        self.mesh, self.options, self.learning_rate = mesh, options, learning_rate
        trainable = [[entry for entry in table if entry.parameter.requires_grad] for table in tables]
        entries = [entry for table in trainable for entry in table]
        assert entries, "a rank without trainable parameters has nothing to optimize"
        tie = {entry.is_tied_copy for entry in entries if entry.is_tied_copy or entry.is_tied_source}
        assert len(tie) < 2, "both ends of a tie on one rank: it needs two ranks, or one stage"
        dtype = entries[0].parameter.dtype
        main = main_dtype(dtype)
        self._chunks = lay_out(trainable, mesh.tp, bucket_bytes // main.itemsize)
        self.slots = [slot for chunk in self._chunks for slot in chunk.slots]
        self.mask: Tensor | None = None
        """True for entries of the flat buffers that are held at 0; None where nothing is (see `make_mask`)."""
        self._reduced: set[tuple[int, int]] = set()
        self._complete: set[int] = set()
        self._allocate(dtype, main)
        self._adam = self._make_adam()

    @staticmethod
    def of_stages(
        stages: Sequence[StageModel],
        mesh: Mesh,
        options: AdamWOptions,
        learning_rate: LearningRate,
        *,
        bucket_bytes: int = 25 * 1024**2,
        beside: Callable[[StageModel], list[Entry]] | None = None,
    ) -> StageOptimizer:
        """Return the optimizer of everything that is trainable in a rank's stages, which ascend.

        Args:
            beside: stage -> what is trained with it and is no part of the model; named like no parameter of it.
        """
        tables = [parameter_table(stage) + (beside(stage) if beside else []) for stage in stages]
        return StageOptimizer(tables, mesh, options, learning_rate, bucket_bytes=bucket_bytes)

    @property
    def num_chunks(self) -> int:
        """Stages of this rank."""
        return len(self._chunks)

    def buckets(self, chunk: int) -> tuple[Bucket, ...]:
        """Return the chunk's buckets in the order in which a backward completes them."""
        return self._chunks[chunk].buckets

    @torch.no_grad()
    def _allocate(self, dtype: torch.dtype, main: torch.dtype) -> None:
        size = max(bucket.stop for chunk in self._chunks for bucket in chunk.buckets)
        self.flat = torch.zeros(size, dtype=dtype, device=self.mesh.device)
        for slot in self.slots:
            slot.view(self.flat).copy_(slot.entry.parameter)
        self.master = self.flat if main == dtype else self.flat.to(main)
        self.flat_grad = torch.zeros_like(self.master)
        self._moments = {name: torch.zeros_like(self.master) for name in MOMENTS}
        for slot in self.slots:
            parameter = slot.entry.parameter
            parameter.data = slot.view(self.flat)
            parameter.main_grad = slot.view(self.flat_grad)
            parameter.register_post_accumulate_grad_hook(_move_grad)

    def _make_adam(self) -> torch.optim.AdamW:
        """Return an AdamW over the runs of neighbours that decay, and those that do not."""
        runs: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        state = {}
        for decays, slots in groupby(self.slots, key=lambda slot: slot.entry.parameter.ndim > 1):
            members = list(slots)
            where = slice(members[0].start, members[-1].stop)
            run = nn.Parameter(self.master[where])
            run.grad = self.flat_grad[where]
            runs[decays].append(run)
            step = torch.zeros((), device=run.device)
            state[run] = {"step": step, **{name: flat[where] for name, flat in self._moments.items()}}
        adam = torch.optim.AdamW(
            [
                {"params": params, "weight_decay": self.options.weight_decay if decays else 0.0}
                for decays, params in runs.items()
                if params
            ],
            lr=self.learning_rate.peak,
            betas=self.options.betas,
            eps=self.options.eps,
            fused=True,
        )
        adam.state.update(state)
        return adam

    def zero_grad(self) -> None:
        """Clear the accumulated gradients; call before the first backward of a step."""
        self.flat_grad.zero_()
        self._reduced.clear()
        self._complete.clear()

    @torch.no_grad()
    def reduce_bucket(self, chunk: int, index: int) -> None:
        """Sum one bucket over dp; once a step, when its gradients are complete, in one order on all replicas.

        Collectives: all-reduce over the gradients' dp.
        """
        assert (chunk, index) not in self._reduced, f"bucket {index} of chunk {chunk} is already reduced"
        self._reduced.add((chunk, index))
        bucket = self._chunks[chunk].buckets[index]
        all_reduce_(self.flat_grad[bucket.start : bucket.stop], self.mesh.gradients.dp)

    @torch.no_grad()
    def reduce(self, chunk: int) -> None:
        """Sum the chunk's gradients over dp, bucket by bucket where that is not done yet, and partial ones over tp.

        Collectives: all-reduces over the gradients' dp; one over their tp if the chunk has partial gradients.
        """
        assert chunk not in self._complete, f"chunk {chunk} is already reduced"
        self._complete.add(chunk)
        for index in range(len(self._chunks[chunk].buckets)):
            if (chunk, index) not in self._reduced:
                self.reduce_bucket(chunk, index)
        partial = self.flat_grad[self._chunks[chunk].partial]
        if partial.numel():
            all_reduce_(partial, self.mesh.gradients.tp)

    def make_mask(self) -> None:
        """Allocate `mask`, one byte an entry, with nothing held; from then on checkpoints hold it."""
        assert self.mask is None, "there is a mask already"
        self.mask = torch.zeros_like(self.flat, dtype=torch.bool)

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set parameters, masters and moments to 0 where the mask says so; call after every change of it."""
        for flat in (self.flat, self.master, *self._moments.values()):
            flat.masked_fill_(self.mask, 0)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Sum tied gradients over the two ends of the pipeline; return the global L2 norm (0-dim), equal on every rank.

        Gradients of entries that are held at 0 are cleared and do not count. The tie waits for the first stage, whose
        backward is the last, and so must not stand before other reductions.

        Collectives: all-reduce over the gradients' tie if the model is tied; one over their model.
        """
        assert len(self._complete) == self.num_chunks, f"only chunks {sorted(self._complete)} are reduced"
        for slot in self.slots:
            if slot.entry.is_tied_copy or slot.entry.is_tied_source:
                all_reduce_(slot.view(self.flat_grad), self.mesh.gradients.tie)
        if self.mask is not None:
            self.flat_grad.masked_fill_(self.mask, 0)
        buckets = [bucket for chunk in self._chunks for bucket in chunk.buckets]
        parts = [self.flat_grad[bucket.start : bucket.counted_stop] for bucket in buckets]
        total = torch.stack([torch.linalg.vector_norm(part) for part in parts]).square().sum()
        all_reduce_(total, self.mesh.gradients.model)
        return total.sqrt()

    @torch.no_grad()
    def step(self, step: int, norm: Tensor) -> float:
        """Clip to the global norm and update the masters; return the learning rate used.

        With a norm that is NaN or infinite, which it is on every rank alike, nothing changes.

        Args:
            step: optimizer step, from 0.
            norm: what `norm()` returned.
        """
        value = norm.item()
        if not math.isfinite(value):
            return self.learning_rate.at(step)
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
        """Return for each parameter views of its master, moments and mask if any, in the parameter's local shape."""
        buffers = {"weight": self.master, **self._moments}
        if self.mask is not None:
            buffers["mask"] = self.mask
        return [
            (slot.entry, {name: slot.view(flat) for name, flat in buffers.items()}) for slot in self.slots
        ]

    @property
    def num_updates(self) -> int:
        """Updates that the moments have seen, for AdamW's bias correction."""
        return int(next(iter(self._adam.state.values()))["step"])

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Begin as if nothing had been updated yet."""
        for flat in self._moments.values():
            flat.zero_()
        self.set_updates(0)

    def set_updates(self, count: int) -> None:
        """Tell AdamW how many updates the restored moments have seen; refresh the parameters."""
        for state in self._adam.state.values():
            state["step"].fill_(count)
        self.gather()


def _move_grad(parameter: nn.Parameter) -> None:
    """Add what autograd left in `grad` to the flat buffer (norms and whatever is no parallel layer)."""
    # Parallel layers give autograd no gradient for their weights, but the hook runs all the same.
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
