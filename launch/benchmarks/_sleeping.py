"""Stages that sleep, under our schedules and under torch's: what the processes of the benchmark `schedule` do.

Decides how a run of an engine is timed (`Session`), and what its stages are. Their parts take given times and compute next
to nothing, but messages are real, and so is the all-reduce at the end of a step.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.benchmarks._schedule_cases import OURS, Case, Job
from launch.benchmarks._torch_pipelining import ENGINES, TorchPipeline
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.course import Course, look_ahead_steps
from parallel.pipeline.executor import Executor, Handler
from parallel.pipeline.p2p import Links, Message

_HIDDEN = (1, 1024)


class Result(NamedTuple):
    """What a rank measured: seconds from step to step, and of a message (the same on all ranks)."""

    steps_s: list[float]
    latency_s: float


class _SleepingRank:
    """The handlers of one rank whose actions sleep and pass tensors on.

    A tensor holds the number of its micro-batch, to which each stage adds one: so it is seen that the right one came.
    """

    def __init__(self, case: Case, virtual_stages: int, links: Links, mesh: Mesh) -> None:
        self._links, self._mesh = links, mesh
        self._stage_s = case.forward_s / virtual_stages
        self._slice_s = case.r * case.forward_s / case.num_slices
        self._last_slice = case.num_slices - 1
        self._last_stage = case.pp * virtual_stages - 1
        self._targets: set[int] = set()

    def handlers(self) -> dict[Kind, Handler]:
        """Return what to do for each kind."""
        return {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.W: self._weights,
            Kind.K: self._teach,
            Kind.REDUCE: lambda action: None,
            Kind.NORM: self._norm,
            Kind.STEP: lambda action: None,
            Kind.GATHER: lambda action: None,
        }

    def _forward(self, action: Action) -> None:
        stage, _, microbatch, _ = action
        x = self._input(Kind.F, stage, microbatch, first=stage == 0, hops=stage)
        time.sleep(self._stage_s)
        if stage < self._last_stage:
            self._links.put(Kind.F, stage, microbatch, x + 1)

    def _backward(self, action: Action) -> None:
        stage, _, microbatch, _ = action
        is_last = stage == self._last_stage
        grad = self._input(Kind.B, stage, microbatch, first=is_last, hops=self._last_stage - stage)
        if is_last:
            self._targets.remove(microbatch)
        time.sleep(self._stage_s)
        if stage:
            self._links.put(Kind.B, stage, microbatch, grad + 1)

    def _weights(self, action: Action) -> None:
        stage, _, microbatch, _ = action
        time.sleep(self._stage_s)
        if stage:
            self._links.release(Kind.F, stage, microbatch)
        if stage < self._last_stage:
            self._links.release(Kind.B, stage, microbatch)

    def _teach(self, action: Action) -> None:
        rank, _, microbatch, piece = action
        time.sleep(self._slice_s)
        if (piece or 0) < self._last_slice:
            return
        x = self._input(Kind.K, rank, microbatch, first=rank == 0, hops=rank)
        if self._mesh.pp.is_last:
            self._targets.add(microbatch)
        else:
            self._links.put(Kind.K, rank, microbatch, x + 1)
        if rank:
            self._links.release(Kind.K, rank, microbatch)

    def _input(self, kind: Kind, stage: int, microbatch: int, *, first: bool, hops: int) -> Tensor:
        if first:
            return torch.full(_HIDDEN, float(microbatch))
        x = self._links.take(kind, stage, microbatch)
        assert x[0, 0].item() == microbatch + hops, (kind, stage, microbatch, x[0, 0])
        return x

    def _norm(self, action: Action) -> None:
        if action.stage == self._mesh.pp.rank:
            all_reduce_(torch.zeros(1), self._mesh.gradients.model)


class Session:
    """One process: its place, and the channels that its runs share."""

    def __init__(self) -> None:
        self._mesh = Mesh.create(pp=dist.get_world_size(), dp=1, tp=1)
        self._links: dict[int, tuple[Links, float]] = {}

    def __call__(self, job: Job) -> Result:
        """Run an engine for a few steps."""
        ends_s: list[float] = []
        latency_s = 0.0
        if job.engine in OURS:
            links, latency_s = self._channels(OURS[job.engine].virtual_stages)
            for _ in self._ours(job, links, latency_s):
                ends_s.append(time.perf_counter())
            assert links.is_empty
        else:
            step = self._peer(job)
            for _ in range(job.steps + 1):
                step()
                ends_s.append(time.perf_counter())
        ends_s = ends_s[: job.steps + 1]
        return Result([end - start for start, end in itertools.pairwise(ends_s)], latency_s)

    def _channels(self, virtual_stages: int) -> tuple[Links, float]:
        """Links and their latency; the engines' runs use the same ones."""
        if virtual_stages not in self._links:
            message = Message(_HIDDEN, torch.float32)
            messages = dict.fromkeys((Kind.F, Kind.B, Kind.K), message)
            links = Links(self._mesh, messages, num_stages=self._mesh.pp.size * virtual_stages)
            self._links[virtual_stages] = links, links.measure_latency()
        return self._links[virtual_stages]

    def _ours(self, job: Job, links: Links, latency_s: float) -> Iterator[None]:
        case, ours, rank = job.case, OURS[job.engine], self._mesh.pp.rank
        plan = case.plan(job.engine, latency_s)
        # The steps that drain the look-ahead are shorter than a steady one, and not counted.
        course = Course(plan, num_steps=1 + job.steps + look_ahead_steps(plan))
        work = _SleepingRank(case, ours.virtual_stages, links, self._mesh)
        executor = Executor(work.handlers(), links, rank=rank, place=self._mesh.describe())
        for step in range(course.num_steps):
            for part, first_microbatch in course.of(step):
                executor.run(part, first_microbatch=first_microbatch)
            yield
        executor.close()

    def _peer(self, job: Job) -> Callable[[], None]:
        case, size, rank = job.case, self._mesh.pp.size, self._mesh.pp.rank
        virtual_stages = ENGINES[job.engine].virtual_stages
        stage_s = case.forward_s / virtual_stages

        def chunks(*seconds: float) -> list[SleepingStage]:
            return [
                SleepingStage(*seconds, is_first=rank + chunk * size == 0) for chunk in range(virtual_stages)
            ]

        pipeline = TorchPipeline(
            job.engine,
            teacher=chunks(case.r * stage_s, 0.0, 0.0),
            student=chunks(stage_s, stage_s, stage_s),
            num_microbatches=case.m,
            loss=lambda output, target: (output - target).square().mean(),
            hidden=torch.zeros(_HIDDEN),
        )
        inputs = torch.ones(case.m * _HIDDEN[0], _HIDDEN[1])

        def step() -> None:
            pipeline.step(inputs)
            all_reduce_(torch.zeros(1), self._mesh.gradients.model)

        return step


class _Delayed(torch.autograd.Function):
    """The identity, whose backward takes a time: that of a stage's gradient with respect to its input, or to its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


class SleepingStage(nn.Module):
    """A stage that scales its input and takes its time over it.

    Args:
        forward_s, input_s, weight_s: seconds of forward and of the gradients with respect to input and weights.
        is_first: the input is data; the first stage then owes its input's gradient to an embedding of its own.
    """

    def __init__(self, forward_s: float, input_s: float, weight_s: float, *, is_first: bool) -> None:
        super().__init__()
        self._seconds = forward_s, input_s, weight_s
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Parameter(torch.zeros(())) if is_first else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * scale` after `forward_s`."""
        forward_s, input_s, weight_s = self._seconds
        time.sleep(forward_s)
        if self.embedding is not None:
            x = x + self.embedding
        return _Delayed.apply(x, input_s) * _Delayed.apply(self.scale, weight_s)
