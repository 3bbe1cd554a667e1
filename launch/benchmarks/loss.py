"""Benchmark `loss`: the chunked distillation loss against the naive one, on one process and one thread.

Naive is what one would write first: the logits of both models for all tokens, `F.cross_entropy`, `F.kl_div` of
`log_softmax` and `softmax`, autograd. Both sides get the same hidden states and heads, and end with the gradients
of the student's hidden state and head weight, the latter added to a buffer that was there before (as in every
micro-batch but a run's first). That loss and gradients agree is checked.

Each side has a process of its own. Time is the median of calls, the two sides taking turns. Memory is a process's
peak above what it held when inputs and gradient buffer existed. Reads /proc, so Linux only.

Options: `vocab` ([49152, 151936]), `tokens` (1024), `hidden` (576), `temperature` (2.0), `alpha` (0.3), `dtype`
(float32), `repeats` (3).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from distill.config import ConfigError
from distill.convert import either
from distill.head import Head
from distill.losses import fused_distillation_loss
from launch.benchmarks._options import read_options

_PEER = "whole logits, F.kl_div + cross-entropy"
_TIME_BOUND, _MEMORY_BOUND = 1.0, 0.1
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class _Options:
    """The options."""

    vocab: tuple[int, ...] = (49152, 151936)
    tokens: int = 1024
    hidden: int = 576
    temperature: float = 2.0
    alpha: float = 0.3
    dtype: str = "float32"
    repeats: int = 3


class _Problem(NamedTuple):
    """One vocabulary's inputs."""

    vocab: int
    options: _Options

    def tensors(self) -> dict[str, Tensor]:
        """Return hidden states and heads of both models, and labels."""
        generator = torch.Generator().manual_seed(0)
        tokens, hidden = self.options.tokens, self.options.hidden

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(getattr(torch, self.options.dtype))

        return {
            "student": draw(tokens, hidden),
            "teacher": draw(tokens, hidden),
            "student_weight": draw(self.vocab, hidden).mul_(0.05),
            "teacher_weight": draw(self.vocab, hidden).mul_(0.05),
            "labels": torch.randint(0, self.vocab, (tokens,), generator=generator),
        }


class _Ours:
    """The loss as the pipeline's last stage calls it."""

    def __init__(self, problem: _Problem) -> None:
        self.options, self.tensors = problem.options, problem.tensors()
        weight = self.tensors["student_weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.grad_weight = torch.zeros_like(weight, dtype=wide).fill_(0)

    def __call__(self) -> tuple[Tensor, Tensor]:
        options, t = self.options, self.tensors
        result = fused_distillation_loss(
            t["student"],
            Head(t["student_weight"]),
            t["teacher"],
            Head(t["teacher_weight"]),
            t["labels"],
            temperature=options.temperature,
            alpha=options.alpha,
            num_valid_tokens=options.tokens,
            grad_weight_out_VD=self.grad_weight,
        )
        return result.total(options.alpha), result.grad_hidden_TD


class _Naive:
    """The formula in torch's own operations."""

    def __init__(self, problem: _Problem) -> None:
        self.options, self.tensors = problem.options, problem.tensors()
        self.tensors["student"].requires_grad_()
        weight = self.tensors["student_weight"].requires_grad_()
        self.grad_weight = weight.grad = torch.zeros_like(weight).fill_(0)

    def __call__(self) -> tuple[Tensor, Tensor]:
        options, t = self.options, self.tensors
        wide = torch.promote_types(t["student"].dtype, torch.float32)
        student = F.linear(t["student"], t["student_weight"]).to(wide)
        with torch.no_grad():
            teacher = F.linear(t["teacher"], t["teacher_weight"]).to(wide)
        hard = F.cross_entropy(student, t["labels"])
        log_q = F.log_softmax(student / options.temperature, dim=-1)
        p = F.softmax(teacher / options.temperature, dim=-1)
        soft = F.kl_div(log_q, p, reduction="batchmean") * options.temperature**2
        loss = options.alpha * hard + (1 - options.alpha) * soft
        t["student"].grad = None
        loss.backward()
        return loss.detach(), t["student"].grad


def status_bytes(field: str) -> int:
    """Return a size from this process's /proc status, such as VmRSS or VmHWM (the peak since `forget_peak`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Start the peak of memory anew: VmHWM is then that of what follows."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _serve(side: type[_Ours | _Naive], problem: _Problem, pipe: Connection) -> None:
    """Run one call for each message; answer with its seconds, its peak bytes, and what it computed."""
    torch.set_num_threads(1)
    call = side(problem)
    base_bytes = status_bytes("VmRSS")
    while pipe.recv():
        call.grad_weight.zero_()
        forget_peak()
        start_s = time.perf_counter()
        loss, grad_hidden = call()
        elapsed_s = time.perf_counter() - start_s
        peak_bytes = status_bytes("VmHWM") - base_bytes
        pipe.send(
            (elapsed_s, peak_bytes, [x.double().norm().item() for x in (loss, grad_hidden, call.grad_weight)])
        )


def _compare(problem: _Problem) -> list[dict[str, Any]]:
    options = problem.options
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for side in (_Ours, _Naive):
        pipe, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(side, problem, theirs), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    answers: list[list[tuple[float, int, list[float]]]] = [[], []]
    for _ in range(1 + options.repeats):
        for pipe, received in zip(pipes, answers, strict=True):
            pipe.send(True)
            received.append(pipe.recv())
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    ours, naive = answers[0][-1][2], answers[1][-1][2]
    for found, expected in zip(ours, naive, strict=True):
        assert abs(found - expected) <= _TOLERANCE[options.dtype] * abs(expected), (ours, naive)
    # The first call pays for the libraries' own buffers: it counts as memory, not as time.
    seconds = [statistics.median(answer[0] for answer in received[1:]) for received in answers]
    peaks = [max(answer[1] for answer in received) for received in answers]
    case = f"V {problem.vocab}, {options.tokens} tokens, hidden {options.hidden}, T {options.temperature:g}, {options.dtype}"
    return [
        {
            "case": f"{case}: {what}",
            "ours": mine,
            "peer": peer,
            "peer_name": _PEER,
            "ratio": mine / peer,
            "bound": bound,
        }
        for what, (mine, peer), bound in (
            ("s", seconds, _TIME_BOUND),
            ("peak bytes above inputs and gradients", peaks, _MEMORY_BOUND),
        )
    ]


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for time and one for memory, for each vocabulary size.

    Args:
        options: as in the module's docstring.
    Raises:
        ConfigError: an unknown option or dtype, or a number out of range.
    """
    least = {"vocab": 2, "tokens": 1, "hidden": 1, "repeats": 1}
    chosen = read_options(_Options, options, least=least)
    if chosen.dtype not in _TOLERANCE:
        raise ConfigError(f"dtype={chosen.dtype}; use {either(list(_TOLERANCE))}")
    return [row for vocab in chosen.vocab for row in _compare(_Problem(vocab, chosen))]
