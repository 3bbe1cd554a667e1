"""Benchmark `step`: a distillation step on one process against TRL's trainers, in the same run.

All sides load the same teacher and student folders, take the same rows in the same micro-batches, minimise the forward
KL to the teacher alone (TRL's trainers have no hard term), clip to norm 1, and step fused AdamW; one thread each. The
sides take turns, a step each; that their first losses agree is checked. The peers:

- `TRL GKDTrainer`: off-policy (lmbda 0, beta 0), the trainer for this task. Its loss has no temperature, so both run at 1.
- `TRL DistillationTrainer`: chunked loss. It only trains on what the student generates, so it is given the rows in place
  of the generation (`_trl_peer.py`).

The option `recompute` says what backward computes again: `full` every layer, on both sides, as TRL does by default
(`gradient_checkpointing`); `selective` here all but the linears, while TRL keeps all activations; `none` nothing.

Time is seconds a token (median step over tokens fed), without data loading. Memory is a process's peak during a step,
less what it held before the models and less the bytes of both models' weights and the student's two moments: gradients,
activations, and the loss. The first step is not counted. Reads /proc, so Linux only.

TRL lives in a virtual environment of its own, `.venv-trl`, made here when it is missing.

Options: `teacher`, `student` (folders; by default random ones: SmolLM2-135M's shape, and the same with 0.6 of its FFN
channels), `rows` (4) in a step, `microbatch` (4), `seq_len` (512), `recompute` (["full"]), `dtype`
(float32), `steps` (3), `threads` (1), `trainers` (["gkd", "distillation"]).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from transformers import AutoConfig

from distill.config import Config, ConfigError, Pipeline, Train
from distill.convert import either
from distill.loading import DTYPES
from launch.benchmarks._inputs import check_losses, load_step, microbatches, model_folders, soft_config
from launch.benchmarks._options import read_options
from launch.benchmarks.loss import forget_peak, status_bytes
from parallel.mesh import Mesh
from parallel.model import build_meta_model
from parallel.recompute import Recompute

_ROOT = Path(__file__).resolve().parents[2]
_VENV = _ROOT / ".venv-trl"
_TORCH = "2.13.0"
_PACKAGES = ("trl==1.16.0", "accelerate==1.15.0", "transformers==5.23.0", "datasets==5.2.0")
_PEERS = {"gkd": "TRL GKDTrainer", "distillation": "TRL DistillationTrainer"}
_TIME_BOUND, _MEMORY_BOUND = 0.9, 0.4


@dataclass(frozen=True)
class _Options:
    """The options."""

    teacher: str = ""
    student: str = ""
    rows: int = 4
    microbatch: int = 4
    seq_len: int = 512
    recompute: tuple[str, ...] = ("full",)
    dtype: str = "float32"
    steps: int = 3
    threads: int = 1
    trainers: tuple[str, ...] = tuple(_PEERS)


@dataclass(frozen=True)
class _Job:
    """What every side is told."""

    teacher: str
    student: str
    data: str
    rows: int
    microbatch: int
    seq_len: int
    dtype: str
    steps: int
    threads: int
    recompute: str = ""
    temperature: float = 1.0
    lr: float = 1e-4
    trainer: str = ""


class _Ours:
    """This project's step in a process of its own."""

    def __init__(self, job: _Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def step(self) -> dict[str, float]:
        """Run one step; return its seconds, peak bytes above the process's start, and loss."""
        self._pipe.send(True)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


class _Trl:
    """One of TRL's trainers in TRL's environment."""

    def __init__(self, job: _Job) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [_VENV / "bin" / "python", Path(__file__).with_name("_trl_peer.py"), json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def step(self) -> dict[str, float]:
        """Run one step; return its seconds, peak bytes above the process's start, and loss."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"TRL ended early:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()


def _serve(job: _Job, pipe: Connection) -> None:
    torch.set_num_threads(job.threads)
    base_bytes = status_bytes("VmRSS")
    batch = microbatches(load_file(job.data)["rows"], job.microbatch)
    step, _ = load_step(_config(job), Mesh.single(), lambda step: batch)
    for number in range(job.steps):
        try:
            pipe.recv()
        except EOFError:
            return
        forget_peak()
        start_s = time.perf_counter()
        stats = step(number)
        elapsed_s = time.perf_counter() - start_s
        pipe.send(
            {"seconds": elapsed_s, "peak_bytes": status_bytes("VmHWM") - base_bytes, "loss": stats.total}
        )


def _config(job: _Job) -> Config:
    return soft_config(
        job.teacher,
        job.student,
        temperature=job.temperature,
        seq_len=job.seq_len,
        train=Train(
            global_batch_size=job.rows,
            microbatch_size=job.microbatch,
            steps=job.steps,
            dtype=job.dtype,
            recompute=job.recompute,
        ),
        lr=job.lr,
        pipeline=Pipeline(teacher="inline"),
    )


def _make_venv() -> None:
    """Install TRL into `.venv-trl`, torch first and alone, unless it is there in the versions wanted."""
    stamp, wanted = _VENV / "installed", " ".join((_TORCH, *_PACKAGES))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"making {_VENV.name} with {', '.join(_PACKAGES)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", _VENV], check=True)
    # The environment is no part of the repository.
    (_VENV / ".gitignore").write_text("*\n", encoding="utf-8")
    pip = [_VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    # The CPU build, where an index offers it, spares gigabytes.
    if subprocess.run([*pip, f"torch=={_TORCH}+cpu"], check=False).returncode:
        subprocess.run([*pip, f"torch=={_TORCH}"], check=True)
    subprocess.run([*pip, "--constraint", _ROOT / "constraints.txt", *_PACKAGES], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def _prepare(chosen: _Options, folder: Path) -> _Job:
    """Write the models that were not named, and the rows."""
    teacher, student = model_folders(chosen.teacher, chosen.student, folder)
    vocab_size = AutoConfig.from_pretrained(student).vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocab_size, (chosen.rows, chosen.seq_len), generator=generator)
    save_file({"rows": rows}, folder / "rows.safetensors")
    return _Job(
        teacher=teacher,
        student=student,
        data=str(folder / "rows.safetensors"),
        rows=chosen.rows,
        microbatch=chosen.microbatch,
        seq_len=chosen.seq_len,
        dtype=chosen.dtype,
        # One more than is counted, to warm up.
        steps=chosen.steps + 1,
        threads=chosen.threads,
    )


def _state_bytes(job: _Job) -> int:
    """Return the bytes of both models' weights and the student's two moments."""
    teacher, student = (
        sum(
            parameter.numel()
            for parameter in build_meta_model(AutoConfig.from_pretrained(folder)).parameters()
        )
        for folder in (job.teacher, job.student)
    )
    return (teacher + 3 * student) * DTYPES[job.dtype].itemsize


def _rows(job: _Job, answers: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    check_losses({name: [given[0]["loss"]] for name, given in answers.items()})
    tokens, state_bytes = job.rows * job.seq_len, _state_bytes(job)
    seconds = {
        name: statistics.median(answer["seconds"] for answer in given[1:]) / tokens
        for name, given in answers.items()
    }
    above = {
        name: max(answer["peak_bytes"] for answer in given[1:]) - state_bytes
        for name, given in answers.items()
    }
    case = f"{job.rows} x {job.seq_len} tokens by {job.microbatch}, T {job.temperature:g}, {job.dtype}"
    case += f", recompute {job.recompute}"
    figures = (
        ("s a token", seconds, _TIME_BOUND),
        ("peak bytes above weights and moments", above, _MEMORY_BOUND),
    )
    return [
        {
            "case": f"{case}: {what}",
            "ours": by_side["ours"],
            "peer": by_side[trainer],
            "peer_name": _PEERS[trainer],
            "ratio": by_side["ours"] / by_side[trainer],
            "bound": bound,
        }
        for trainer in answers
        if trainer != "ours"
        for what, by_side, bound in figures
    ]


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for time and one for memory, for each of TRL's trainers.

    Args:
        options: as in the module's docstring.
    Raises:
        ConfigError: an unknown option, trainer, dtype or way to recompute, a number out of range, or rows that the
            micro-batches do not divide.
    """
    chosen = _read(options)
    _make_venv()
    with tempfile.TemporaryDirectory() as folder:
        job = _prepare(chosen, Path(folder))
        return [
            row
            for recompute in chosen.recompute
            for row in _compare(replace(job, recompute=recompute), chosen.trainers)
        ]


def _read(options: dict[str, Any]) -> _Options:
    least = {"rows": 1, "microbatch": 1, "seq_len": 2, "steps": 1, "threads": 1}
    chosen = read_options(_Options, options, least=least)
    for name, given, known in (
        ("trainers", chosen.trainers, _PEERS),
        ("recompute", chosen.recompute, get_args(Recompute)),
        ("dtype", (chosen.dtype,), DTYPES),
    ):
        for value in given:
            if value not in known:
                raise ConfigError(f"{name}={value}; use {either(known)}")
    if chosen.rows % chosen.microbatch:
        raise ConfigError(f"microbatch={chosen.microbatch} does not divide rows={chosen.rows}")
    return chosen


def _compare(job: _Job, trainers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Let all sides take their steps in turn; return their rows."""
    with ExitStack() as stack:
        sides: dict[str, _Ours | _Trl] = {"ours": _Ours(job)}
        stack.callback(sides["ours"].close)
        for trainer in trainers:
            sides[trainer] = _Trl(replace(job, trainer=trainer))
            stack.callback(sides[trainer].close)
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(job.steps):
            for name, side in sides.items():
                answers[name].append(side.step())
        return _rows(job, answers)
