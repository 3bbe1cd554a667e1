"""Benchmark `zero`: masters and AdamW's state cut over the replicas, against every replica with all of them.

Each rank has the parameters of some Llama layers and gradients that were just summed up; measured is the end of a step, from
the first reduction to the gathered parameters. Sides are our own stage 1 and DeepSpeed's, and as the peer our stage 0,
which all-reduces and steps everything everywhere; they take turns in the same processes on gloo, one thread each. Seconds
are the median of the counted turns, the slowest rank's. Bytes are those of masters and state that the fullest rank
holds, and at their peak with what a step allocates beside them.

Options: `dp` ([2, 4]), `dtype` (bfloat16), `layers` (3), `hidden` (576), `turns` (5; the first does not count), `engines`
([torch, deepspeed]).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distill.config import ConfigError
from distill.convert import either
from launch.benchmarks._crew import run_jobs, say
from launch.benchmarks._options import read_options
from parallel.mesh import Mesh
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.update_rules import OptimizerOptions
from parallel.weights import Entry

PEER = "replicas with everything"
_ENGINES = ("torch", "deepspeed")
_DTYPES = ("bfloat16", "float32")
_MEMORY_ABOVE, _TIME_BOUND = 0.05, 1.2
_LIMIT_S = 600.0


@dataclass(frozen=True)
class Job:
    """What all ranks measure."""

    dp: tuple[int, ...] = (2, 4)
    dtype: str = "bfloat16"
    layers: int = 3
    hidden: int = 576
    turns: int = 5
    engines: tuple[str, ...] = _ENGINES

    @property
    def sides(self) -> dict[str, OptimizerOptions]:
        """Name -> who updates; the peer first."""
        sides = {PEER: OptimizerOptions(zero_stage=0)}
        return sides | {engine: OptimizerOptions(engine=engine) for engine in self.engines}


@dataclass
class Result:
    """What one rank saw of a side."""

    seconds: list[float] = field(default_factory=list)
    """The slowest rank's, by turn."""
    held_bytes: int = 0
    """Of masters and state."""
    peak_bytes: int = 0
    """With what a step allocates."""
    num_parameters: int = 0
    check: float = 0.0
    """Of the parameters after the turns: all sides must have made the same."""


def begin() -> Callable[[Job], dict[str, Result]]:
    """Return what measures a job on this rank."""
    return measure


def measure(job: Job) -> dict[str, Result]:
    """Take steps with each side in turns; return what this rank saw. Collectives: those of the steps."""
    mesh = Mesh.create(pp=1, dp=dist.get_world_size(), tp=1)
    optimizers = {name: _optimizer(job, mesh, options) for name, options in job.sides.items()}
    results = {name: Result() for name in optimizers}
    for turn in range(job.turns):
        for name, optimizer in optimizers.items():
            _fill(optimizer, turn)
            results[name].seconds.append(_timed(optimizer, turn))
    for name, optimizer in optimizers.items():
        _fill(optimizer, job.turns)
        temporary_bytes = _temporary_bytes(lambda its_own=optimizer: _step(its_own, job.turns))
        results[name].held_bytes = optimizer.state_bytes
        results[name].peak_bytes = optimizer.state_bytes + temporary_bytes
        values = [slot.entry.parameter.detach().double() for slot in optimizer.slots]
        results[name].num_parameters = sum(value.numel() for value in values)
        results[name].check = sum(value.sum().item() for value in values)
    return results


def _optimizer(job: Job, mesh: Mesh, options: OptimizerOptions) -> StageOptimizer:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (8 * job.hidden // 3, job.hidden), (job.hidden, job.hidden)
    entries = [
        Entry(
            f"{layer}.{number}",
            nn.Parameter(_random(shape, generator, job.dtype)),
            None,
            mesh.tp,
            layer=layer,
        )
        for layer in range(job.layers)
        for number, shape in enumerate((*[narrow] * 4, *[wide] * 3, (job.hidden,), (job.hidden,)))
    ]
    return StageOptimizer([entries], mesh, options, LearningRate(1e-3, 0, 10**6))


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: str) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def _fill(optimizer: StageOptimizer, turn: int) -> None:
    """Leave gradients that differ between replicas."""
    generator = torch.Generator().manual_seed(1000 * turn + optimizer.mesh.dp.rank)
    optimizer.zero_grad()
    for slot in optimizer.slots:
        parameter = slot.entry.parameter
        parameter.main_grad.add_(torch.randn(parameter.shape, generator=generator))


def _step(optimizer: StageOptimizer, turn: int) -> None:
    optimizer.reduce(0)
    optimizer.step(turn, optimizer.norm())
    optimizer.gather()


def _timed(optimizer: StageOptimizer, turn: int) -> float:
    dist.barrier()
    start_s = time.perf_counter()
    _step(optimizer, turn)
    elapsed = torch.tensor(time.perf_counter() - start_s)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def _temporary_bytes(work: Callable[[], None]) -> int:
    """Return the most bytes of tensors that are there at once while `work` runs, above those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes, initial=0))


def run(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rows of bytes and seconds for each dp and engine.

    Raises:
        ConfigError: an option that is unknown or out of range.
    """
    job = _read(options)
    rows: list[dict[str, Any]] = []
    for dp in job.dp:
        for _, results in run_jobs([job], size=dp, begin=begin, limit_s=lambda _: _LIMIT_S):
            if isinstance(results, str):
                say(f"dp {dp}: {results}")
                continue
            rows += _rows(job, dp, results)
    return rows


def _rows(job: Job, dp: int, ranks: list[dict[str, Result]]) -> Iterator[dict[str, Any]]:
    checks = {name: result.check for name, result in ranks[0].items()}
    scale = max(map(abs, checks.values()))
    assert all(abs(value - checks[PEER]) < 1e-3 * scale for value in checks.values()), (
        f"sides differ: {checks}"
    )
    held = {name: max(rank[name].held_bytes for rank in ranks) for name in checks}
    peak = {name: max(rank[name].peak_bytes for rank in ranks) for name in checks}
    seconds = {name: statistics.median(ranks[0][name].seconds[1:]) for name in checks}
    millions = ranks[0][PEER].num_parameters / 1e6
    for engine in job.engines:
        case = f"{engine}, dp {dp}, {millions:.1f} M parameters, {job.dtype}, AdamW: "
        yield _row(case + "masters and state, bytes a rank", held, engine, 1 / dp + _MEMORY_ABOVE)
        yield _row(
            case + "the same at its peak, with what a step allocates", peak, engine, 1 / dp + _MEMORY_ABOVE
        )
        yield _row(case + "reduce, step and gather, s", seconds, engine, _TIME_BOUND)


def _row(case: str, figures: Mapping[str, float], engine: str, bound: float) -> dict[str, Any]:
    ours, peer = figures[engine], figures[PEER]
    return {"case": case, "ours": ours, "peer": peer, "peer_name": PEER, "ratio": ours / peer, "bound": bound}


def _read(options: Mapping[str, Any]) -> Job:
    """The options over the defaults, checked."""
    job = read_options(Job, options, least={"dp": 2, "layers": 1, "hidden": 3, "turns": 2})
    for name, value, known in (
        *(("engines", engine, _ENGINES) for engine in job.engines),
        ("dtype", job.dtype, _DTYPES),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value}; use {either(known)}")
    return job
