"""The engine `deepspeed`: DeepSpeed's ZeRO optimizer under our tensor and pipeline layout. The only file that imports it.

Decides that DeepSpeed reduces gradients over dp, cuts masters and state over the replicas, updates and gathers; its engine,
which would own the loop, is not used. Its parameters are the runs of our flat buffers, one group that decays and one that
does not, each padded so that every replica's partition is whole blocks of `ALIGNED` elements. Gradients stay summed in
our flat buffer over all micro-batches, in the main dtype, and DeepSpeed takes them once a step, after every backward: so any
schedule goes, stage 2 included (there it reduces to owners where stage 1 sums everywhere), but stage 2 frees no
gradient of ours. Norm and clipping are ours, since its float32 norm of a long run is off by up to 1e-3.

Stage 3 is not offered: it gathers parameters in hooks of every forward, which would put collectives of replicas between
the messages of a pipeline (it hangs), and our parameters are views.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.buckets import ALIGNED, Bucket, Run, Slot, runs
from parallel.collectives import all_reduce_, waiting
from parallel.flat import FlatBuffers
from parallel.flat_state import Part, PlainStore
from parallel.mesh import Mesh
from parallel.torch_engine import square_sum
from parallel.update_rules import OptimizerOptions, Range, make_updater

_BUCKET_NUMEL = 12_500_000
"""Elements that DeepSpeed reduces in one piece: 50 MB."""


class _Placed(NamedTuple):
    """A run in the flat buffer of one of DeepSpeed's groups; 0 is the one that does not decay."""

    run: Run | None
    """None for padding."""
    parameter: nn.Parameter
    group: int
    start: int

    @property
    def stop(self) -> int:
        """End of the run."""
        return self.start + self.parameter.numel()


class DeepSpeedEngine:
    """Reduces gradients, and updates and gathers parameters, of one rank's stages.

    Args:
        buffers: parameters, which move into DeepSpeed's memory, and gradients.
        mesh: axes of the reductions.
        options: the rule; `zero_stage` is 1 or 2.
    Collectives: where dp is 1, those of making groups of one rank.
    """

    reduces_early = False

    def __init__(self, buffers: FlatBuffers, mesh: Mesh, options: OptimizerOptions) -> None:
        self._buffers, self._axes = buffers, mesh.gradients
        self._placed = [*_place(buffers, mesh, decays=False), *_place(buffers, mesh, decays=True)]
        self._zero = _zero_optimizer(self._placed, buffers.main_dtype, mesh, options)
        buffers.move(self._view)
        self._masters = dict(zip(self._groups, self._zero.single_partition_of_fp32_groups, strict=True))
        begins = accumulate((master.numel() for master in self._masters.values()), initial=0)
        self._begins = dict(zip(self._groups, begins, strict=False))
        ranges = [
            Range(master, bool(group), slice(self._begins[group], self._begins[group] + master.numel()))
            for group, master in self._masters.items()
        ]
        self.updater = make_updater(options, ranges, sum(map(Tensor.numel, self._masters.values())))
        self._zero.optimizer = self.updater.optimizer

    @property
    def _groups(self) -> list[int]:
        return sorted({each.group for each in self._placed})

    def _view(self, slot: Slot) -> Tensor:
        """Return the parameter in DeepSpeed's memory."""
        placed = self._of(slot)
        start = slot.start - placed.run.start
        return placed.parameter.data[start : start + slot.stop - slot.start]

    def _of(self, slot: Slot) -> _Placed:
        return next(
            each
            for each in self._placed
            if each.run is not None and each.run.start <= slot.start < each.run.stop
        )

    def reduce(self, bucket: Bucket) -> None:
        """Do nothing: DeepSpeed reduces all at once, in `norm`."""

    @torch.no_grad()
    def norm(self, mask: Tensor | None) -> Tensor:
        """Sum gradients of tied buckets over the tie, and all over dp; return the global L2 norm (0-dim float64).

        Args:
            mask: True for entries of the flat buffers whose gradients are cleared before.
        Collectives: all-reduces over the gradients' tie; DeepSpeed's reductions over their dp; one over their dp and model.
        """
        self._forget_gradients()
        gradients = self._buffers.flat_grad
        for bucket in self._buffers.buckets:
            if bucket.is_tied:
                all_reduce_(gradients[bucket.start : bucket.stop], self._axes.tie)
        if mask is not None:
            gradients.masked_fill_(mask, 0)
        for each in self._placed:
            if each.run is None:
                flat = torch.zeros_like(each.parameter, dtype=gradients.dtype)
            else:
                flat = gradients[each.run.start : each.run.stop]
            _give(each.parameter, flat, self._zero)
        self._zero.setup_buckets()
        with waiting("DeepSpeed's reductions", self._axes.dp):
            self._zero.reduce_gradients()
        if self._zero.cpu_offload:
            # Copies from a GPU are under way, and DeepSpeed waits for them in its own step only.
            self._zero._wait_for_offload_copies()
        squares = torch.zeros((), dtype=torch.float64, device=gradients.device)
        for placed, gradient in self._owned_gradients():
            if placed.run is not None and placed.run.is_counted:
                squares += square_sum(gradient)
        all_reduce_(squares, self._axes.dp)
        all_reduce_(squares, self._axes.model)
        norm = squares.sqrt()
        self._zero.scaled_global_norm = lambda: norm
        return norm

    def _forget_gradients(self) -> None:
        """Drop the gradients of a step that was skipped: DeepSpeed does so in its own step alone, and adds to what is there."""
        for number in range(len(self._groups)):
            self._zero.averaged_gradients[number] = None
            self._zero.all_grad_tensors[number] = None
        self._zero.micro_step_id = -1

    def _owned_gradients(self) -> Iterator[tuple[_Placed, Tensor]]:
        """Yield the reduced gradients of this replica's partitions, run by run."""
        of = {id(each.parameter): each for each in self._placed}
        for number, group in enumerate(self._groups):
            parameters = self._zero.params_in_partition[number]
            if self._zero.cpu_offload:
                flat = self._masters[group].grad
                for parameter in parameters:
                    _, _, start, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
                    yield of[id(parameter)], flat[start : start + numel]
                continue
            found = (
                each for each in self._zero.averaged_gradients[number] if not hasattr(each, "_zero_padding")
            )
            for parameter, gradient in zip(parameters, found, strict=True):
                yield of[id(parameter)], gradient.view(-1)

    @torch.no_grad()
    def update(self, rate: float, clip_factor: float) -> None:
        """Update the owned masters by their gradients times `clip_factor`, and gather. Collectives: all-gathers over dp."""
        if clip_factor != 1:
            for _, gradient in self._owned_gradients():
                gradient.mul_(clip_factor)
        self.updater.set_rate(rate)
        with waiting("DeepSpeed's update and gather", self._axes.dp):
            self._zero.step()
        self.updater.num_updates += 1

    def gather(self) -> None:
        """Do nothing: DeepSpeed gathers at the end of its step."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring restored masters into the parameters of all replicas. Collectives: all-gathers over dp."""
        self._zero.update_lp_params()

    @property
    def state_bytes(self) -> int:
        """Bytes of masters and state."""
        masters = sum(master.nbytes for master in self._masters.values())
        return masters + sum(store.nbytes for store in self.updater.stores.values())

    def parts(self, slot: Slot) -> dict[str, Part]:
        """Return what this rank has of a parameter's master (`weight`) and state, by kind; nothing if it owns none of it."""
        group = self._of(slot).group
        found: dict[str, Part] = {}
        for start, stop in self.share(slot, self._axes.dp.rank):
            at = self._start(slot) + start - self._axes.dp.rank * self._masters[group].numel()
            found["weight"] = Part(start, stop, PlainStore(self._masters[group].detach()), at)
            for kind, store in self.updater.stores.items():
                found[kind] = Part(start, stop, store, self._begins[group] + at)
        return found

    def share(self, slot: Slot, index: int) -> Iterator[tuple[int, int]]:
        """Yield the entries [start, stop) of a parameter that a replica owns: none or one range."""
        size, first = self._masters[self._of(slot).group].numel(), self._start(slot)
        start = max(index * size, first)
        stop = min((index + 1) * size, first + slot.stop - slot.start)
        if start < stop:
            yield start - first, stop - first

    def _start(self, slot: Slot) -> int:
        """Return where a parameter begins in its group's flat buffer."""
        placed = self._of(slot)
        return placed.start + slot.start - placed.run.start


def _place(buffers: FlatBuffers, mesh: Mesh, *, decays: bool) -> Iterator[_Placed]:
    """Yield the runs that decay, or those that do not, one after the other, and padding to whole partitions."""
    at = 0
    for run in runs(buffers.chunks, mesh.tp):
        if run.decays == decays:
            yield _Placed(run, nn.Parameter(buffers.flat[run.start : run.stop]), int(decays), at)
            at += run.stop - run.start
    padding = -at % (ALIGNED * mesh.gradients.dp.size)
    if padding:
        yield _Placed(None, nn.Parameter(buffers.flat.new_zeros(padding)), int(decays), at)


def _give(parameter: nn.Parameter, gradient: Tensor, zero: Any) -> None:
    """Put a gradient where DeepSpeed looks for it."""
    if zero.use_grad_accum_attribute:
        parameter.grad_accum = gradient
    else:
        parameter.grad = gradient


def _zero_optimizer(
    placed: Sequence[_Placed], main_dtype: torch.dtype, mesh: Mesh, options: OptimizerOptions
) -> Any:
    """Return DeepSpeed's optimizer of stages 1 and 2 over the runs; its own rule is replaced afterwards."""
    _prepare(mesh.device)
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    groups = [{"params": [each.parameter for each in placed if each.group == group]} for group in range(2)]
    where = DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=mesh.device.type == "cuda")
    with torch.enable_grad():
        zero = _with_masters_in(main_dtype, DeepSpeedZeroOptimizer)(
            torch.optim.SGD([group for group in groups if group["params"]], lr=0.0),
            {each.parameter: f"run {number}" for number, each in enumerate(placed)},
            NoopTimer(),
            {},
            verbose=False,
            contiguous_gradients=options.zero_stage == 2,
            reduce_bucket_size=_BUCKET_NUMEL,
            use_multi_rank_bucket_allreduce=False,
            dp_process_group=mesh.gradients.dp.group or _group_of_one(),
            reduce_scatter=False,
            offload_optimizer_config=where if options.offload else None,
            gradient_accumulation_dtype=main_dtype,
            communication_data_type=main_dtype,
            gradient_average=False,
            partition_grads=options.zero_stage == 2,
            check_grad_overflow=False,
        )
    # Its constructor refuses this in float64, though gloo and NCCL reduce that to owners as well as float32.
    zero.reduce_scatter = options.zero_stage == 2
    return zero


def _with_masters_in(main_dtype: torch.dtype, zero_optimizer: type) -> type:
    """Return DeepSpeed's optimizer with masters in the main dtype: its own are float32, whatever the parameters are."""

    class WithMasters(zero_optimizer):
        def _configure_master_weights(self, **settings: Any) -> torch.dtype:
            super()._configure_master_weights(**settings)
            return main_dtype

    return WithMasters


def _prepare(device: torch.device) -> None:
    """Import DeepSpeed quietly for a device, over the process groups that there are."""
    import deepspeed.accelerator
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.accelerator import cpu_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Shared memory between ranks is for inference; its extension would be compiled here, in 90 seconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu" and deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        deepspeed.accelerator.set_accelerator(cpu_accelerator.CPU_Accelerator())
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.comm.init_distributed(verbose=False, dist_init_required=False)


def _group_of_one() -> dist.ProcessGroup:
    """Return the group of this rank alone; every rank makes every group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]
