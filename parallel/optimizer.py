"""The optimizer of one rank's stages, over flat buffers, with a global gradient norm.

Decides what happens to gradients at the end of a step, and in which order; who reduces and updates is an engine
(`parallel.torch_engine`, `parallel.deepspeed_engine`), by which rule `parallel.update_rules` says, and where everything
lies `parallel.flat`.

A rank holds one or more stages ("chunks"), each with a part of the buffers cut into buckets (`parallel.buckets`). A bucket
is summed over dp in one call, whenever that is, so the parameters do not depend on when. The norm adds shards over all
ranks, and replicated and tied parameters once, in a fixed order. Gradients are sums, not means: the loss is already
divided by the global number of valid tokens.

A mask may mark entries that are held at exactly 0, in parameter, master and state. Their gradients are cleared before the
norm; a rule then leaves a 0 whose state is 0 as it is, or is put right after each update. Who chooses them is not known here.

The four pieces are separate because a plan places them: `reduce` (parts of it earlier, with `reduce_bucket`), `norm`,
`step`, `gather`. The first two may run on a thread beside compute: they use the mesh's gradient axes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.buckets import Bucket, Slot, lay_out
from parallel.collectives import all_reduce_, broadcast_
from parallel.flat import FlatBuffers
from parallel.flat_state import Part, PlainStore
from parallel.gradients import main_dtype
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.torch_engine import TorchEngine
from parallel.update_rules import OptimizerOptions, Updater
from parallel.weights import Entry, parameter_table


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


class Engine(Protocol):
    """Reduces gradients, and updates and gathers parameters, of one rank's stages; see `parallel.torch_engine`."""

    reduces_early: bool
    updater: Updater
    state_bytes: int

    def reduce(self, bucket: Bucket) -> None: ...
    def norm(self, mask: Tensor | None) -> Tensor: ...
    def update(self, rate: float, clip_factor: float) -> None: ...
    def gather(self) -> None: ...
    def refresh(self) -> None: ...
    def parts(self, slot: Slot) -> dict[str, Part]: ...
    def share(self, slot: Slot, index: int) -> Iterator[tuple[int, int]]: ...


class StageOptimizer:
    """The optimizer of the trainable parameters of one rank's stages.

    Args:
        tables: each chunk's parameters (`weights.parameter_table`), stages ascending; frozen ones are left alone.
        mesh: axes of the reductions.
        options: the rule, its hyperparameters, and who applies it.
        learning_rate: by step.
        bucket_bytes: of gradients, from which on a bucket takes no further layer.
    Invariant: parameters are views into a flat buffer; between steps they equal the master in their own dtype.
    """

    def __init__(
        self,
        tables: Sequence[list[Entry]],
        mesh: Mesh,
        options: OptimizerOptions,
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
        bucket_numel = bucket_bytes // main_dtype(entries[0].parameter.dtype).itemsize
        self._chunks = lay_out(trainable, mesh.tp, bucket_numel, num_parts=mesh.gradients.dp.size)
        self._buffers = FlatBuffers(self._chunks, mesh.device)
        self._engine = _make_engine(self._buffers, mesh, options)
        self.slots = self._buffers.slots
        self.mask: Tensor | None = None
        """True for entries of the flat buffers that are held at 0; None where nothing is (see `make_mask`)."""
        self._reduced: set[tuple[int, int]] = set()
        self._complete: set[int] = set()

    @staticmethod
    def of_stages(
        stages: Sequence[StageModel],
        mesh: Mesh,
        options: OptimizerOptions,
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

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the rule's state, beside masters and mask."""
        return tuple(self._engine.updater.stores)

    @property
    def flat_grad(self) -> Tensor:
        """The accumulated gradients; once reduced, what this rank owns of them is their sum over dp."""
        return self._buffers.flat_grad

    @property
    def state_bytes(self) -> int:
        """Bytes of the masters and the state that this rank holds beside parameters and gradients."""
        return self._engine.state_bytes

    def buckets(self, chunk: int) -> tuple[Bucket, ...]:
        """Return the chunk's buckets that may be reduced early, in the order in which a backward completes them."""
        return self._chunks[chunk].buckets if self._engine.reduces_early else ()

    def zero_grad(self) -> None:
        """Clear the accumulated gradients; call before the first backward of a step."""
        self.flat_grad.zero_()
        self._reduced.clear()
        self._complete.clear()

    @torch.no_grad()
    def reduce_bucket(self, chunk: int, index: int) -> None:
        """Sum one bucket over dp; once a step, when its gradients are complete, in one order on all replicas.

        Collectives: the engine's `reduce`, over the gradients' dp.
        """
        assert (chunk, index) not in self._reduced, f"bucket {index} of chunk {chunk} is already reduced"
        self._reduced.add((chunk, index))
        self._engine.reduce(self._chunks[chunk].buckets[index])

    @torch.no_grad()
    def reduce(self, chunk: int) -> None:
        """Sum the chunk's partial gradients over tp, and all over dp, bucket by bucket where that is not done yet.

        Collectives: an all-reduce over the gradients' tp if the chunk has partial gradients; those of `reduce_bucket`.
        """
        assert chunk not in self._complete, f"chunk {chunk} is already reduced"
        self._complete.add(chunk)
        # Whole, before its bucket is cut over dp: the parts of two tp ranks need not have the same parameters.
        partial = self.flat_grad[self._chunks[chunk].partial]
        if partial.numel():
            all_reduce_(partial, self.mesh.gradients.tp)
        for index in range(len(self._chunks[chunk].buckets)):
            if (chunk, index) not in self._reduced:
                self.reduce_bucket(chunk, index)

    def make_mask(self) -> None:
        """Allocate `mask`, one byte an entry, with nothing held; from then on checkpoints hold it."""
        assert self.mask is None, "there is a mask already"
        self.mask = torch.zeros_like(self.flat_grad, dtype=torch.bool)

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set parameters, masters and state to 0 where the mask says so; call after every change of it."""
        for slot in self.slots:
            held = slot.view(self.mask)
            slot.entry.parameter.masked_fill_(held, 0)
            for part in self._engine.parts(slot).values():
                values = part.read()
                # An offloaded master is on the CPU.
                its_own = held.flatten()[part.start : part.stop].to(values.device)
                part.write(values.masked_fill(its_own, 0))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Sum tied gradients over the two ends of the pipeline; return the global L2 norm (0-dim), equal on every rank.

        Gradients of entries that are held at 0 are cleared and do not count. The tie waits for the first stage, whose
        backward is the last, and so must not stand before other reductions.

        Collectives: the engine's `norm`, over the gradients' axes.
        """
        assert len(self._complete) == self.num_chunks, f"only chunks {sorted(self._complete)} are reduced"
        return self._engine.norm(self.mask)

    @torch.no_grad()
    def step(self, step: int, norm: Tensor) -> float:
        """Clip to the global norm and update the masters; return the learning rate used.

        With a norm that is NaN or infinite, which it is on every rank alike, nothing changes.

        Args:
            step: optimizer step, from 0.
            norm: what `norm()` returned.
        """
        value, clip = norm.item(), self.options.clip
        rate = self.learning_rate.at(step)
        if not math.isfinite(value):
            return rate
        self._engine.update(rate, clip / (value + 1e-6) if clip and value > clip else 1.0)
        if self.mask is not None and not self._engine.updater.keeps_zero:
            self.apply_mask()
        return rate

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the stepped masters back into the parameters of all replicas. Collectives: over the gradients' dp."""
        self._engine.gather()

    def state(self) -> list[tuple[Entry, dict[str, Part]]]:
        """Return for each parameter what this rank holds: its master (`weight`) and state, and all of the mask if any.

        A kind is left out where the rank holds none of it.
        """
        found = []
        for slot in self.slots:
            parts = self._engine.parts(slot)
            if self.mask is not None:
                numel = slot.entry.parameter.numel()
                parts["mask"] = Part(0, numel, PlainStore(self.mask), slot.start)
            found.append((slot.entry, parts))
        return found

    def share(self) -> list[tuple[Entry, dict[str, Part]]]:
        """Return what of `state` this replica saves; together they save everything once."""
        found = []
        for slot, (entry, parts) in zip(self.slots, self.state(), strict=True):
            mine: dict[str, Part] = {}
            for start, stop in self._engine.share(slot, self.mesh.dp.rank):
                its_own = {kind: part.inside(start, stop) for kind, part in parts.items()}
                mine |= {kind: part for kind, part in its_own.items() if part is not None}
            found.append((entry, mine))
        return found

    @torch.no_grad()
    def master(self, slot: Slot) -> Tensor:
        """Return all of this rank's shard of a parameter's master. Collectives: broadcasts over dp if it is cut there."""
        parameter = slot.entry.parameter
        if parameter.dtype == self.flat_grad.dtype:
            return parameter.detach()
        part = self._engine.parts(slot).get("weight")
        whole = self.flat_grad.new_empty(parameter.numel())
        if part is not None:
            whole[part.start : part.stop].copy_(part.read())
        for index in range(self.mesh.dp.size):
            for start, stop in self._engine.share(slot, index):
                broadcast_(whole[start:stop], self.mesh.dp, source=index)
        return whole.view(parameter.shape)

    @property
    def num_updates(self) -> int:
        """Updates that the state has seen, for bias corrections."""
        return self._engine.updater.num_updates

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Begin as if nothing had been updated yet. Collectives: as `gather`."""
        for store in self._engine.updater.stores.values():
            store.zero_()
        self.set_updates(0)

    def set_updates(self, count: int) -> None:
        """Tell the rule how many updates the restored state has seen; refresh the parameters. Collectives: as `gather`."""
        self._engine.updater.set_updates(count)
        self._engine.refresh()


def _make_engine(buffers: FlatBuffers, mesh: Mesh, options: OptimizerOptions) -> Engine:
    if options.engine == "deepspeed":
        from parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(buffers, mesh, options)
    return TorchEngine(buffers, mesh, options)
