"""Real runs that are small enough for tests: inputs made without a network, and the commands run on them.

A command runs either as a user starts it (`start`, processes of its own) or through its `run_command` in this process
(`call`), which saves the seconds of the imports and is the same code from the command line on. Both compute with one thread,
so that their results may be compared bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.command import Command, run_command
from tests.distill.tiny_tokenizer import TOKENS, tiny_tokenizer
from tests.families import save_tiny, tiny_config

ROOT = Path(__file__).parents[2]
STEPS = 12
SEQ_LEN = 32
CONTRACT_NAMES = (
    "step",
    "round",
    "tokens",
    "loss/total",
    "loss/hard",
    "loss/soft",
    "loss/hidden",
    "loss/temperature",
    "loss/alpha",
    "optim/grad_norm",
    "optim/lr",
    "optim/skipped_steps",
    "time/step_s",
    "throughput/tokens_per_s",
    "pipeline/bubble_fraction",
    "pipeline/planned_bubble_fraction",
    "pipeline/planned_step_s",
    "memory/peak_bytes",
)
LOSSES = ("loss/total", "loss/hard", "loss/soft", "optim/grad_norm")
_TEXT = "the cat the dog runs over a hill and sees 12 trees in the cold morning while rain falls"


@dataclass(frozen=True)
class Inputs:
    """What the runs of a test session read."""

    folder: Path
    teacher: Path
    """Untied."""
    tied: Path
    corpus: Path

    def settings(self, run_dir: Path, *overrides: str) -> list[str]:
        """Return the command line of a small float32 run that prunes layers, channels and heads; overrides come last."""
        return [
            f"teacher.model={self.teacher}",
            f"data.path={self.corpus}",
            f"data.cache_dir={self.folder / 'cache'}",
            f"data.seq_len={SEQ_LEN}",
            f"run.dir={run_dir}",
            "run.device=cpu",
            f"train.steps={STEPS}",
            "train.dtype=float32",
            "train.global_batch_size=4",
            "train.timeout_s=60",
            "student.prune.num_layers=3",
            "student.prune.intermediate_size=32",
            "student.prune.num_key_value_heads=2",
            "student.prune.calibration_rows=8",
            "evaluate.rows=8",
            "checkpoint.every=5",
            "log.wandb=disabled",
            *overrides,
        ]


def make_inputs(folder: Path) -> Inputs:
    """Write two teachers (untied, tied) with a tokenizer, and a corpus."""
    for name, tied in (("teacher", False), ("tied", True)):
        config = tiny_config("qwen3", vocab_size=len(TOKENS), tie_word_embeddings=tied)
        save_tiny(folder / name, config, dtype=torch.float32)
        tiny_tokenizer().save_pretrained(folder / name)
    rng, words = random.Random(0), _TEXT.split()

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, 12)))

    texts = [". ".join(sentence() for _ in range(rng.randint(1, 6))) for _ in range(40)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Inputs(folder, folder / "teacher", folder / "tied", corpus)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that tell a user's mistake."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def call(command: Command, arguments: list[str]) -> Done:
    """Run a command of one rank in this process, and put signals and threads back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    num_threads = torch.get_num_threads()
    out, err = io.StringIO(), io.StringIO()
    begin_s = time.monotonic()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command(command, arguments)
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        code = ended.code
    finally:
        torch.set_num_threads(num_threads)
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(code, out.getvalue(), err.getvalue(), time.monotonic() - begin_s)


class Started:
    """A command in a session of its own, as a terminal's job is; its output can be waited for."""

    def __init__(self, arguments: list[str]) -> None:
        self._begin_s = time.monotonic()
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, beginning: str) -> None:
        """Read stdout up to the line with this beginning."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError(f"no line {beginning!r} in\n{''.join(self._lines)}\n{self._end().err}")

    def ctrl_c(self) -> None:
        """Do what a terminal does: signal every process of the job."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, *, timeout_s: float = 100) -> Done:
        """Wait for the end; kill every process of the job if it does not come."""
        try:
            return self._end(timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """Kill every process of the job, those that the launcher moved to sessions of their own included."""
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end(self, *, timeout_s: float = 30) -> Done:
        out, err = self.process.communicate(timeout=timeout_s)
        return Done(
            self.process.returncode, "".join(self._lines) + out, err, time.monotonic() - self._begin_s
        )


def _descendants(pid: int) -> Iterator[int]:
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    for child, parent in pairs:
        if parent == pid:
            yield child
            yield from _descendants(child)


def start(module: str, arguments: list[str], *, num_ranks: int | None = None) -> Started:
    """Start `python -m MODULE`, under the project's launcher when `num_ranks` is given."""
    launcher = ["-m", "launch.torchrun", "--nproc-per-node", str(num_ranks)] if num_ranks else []
    return Started([*launcher, "-m", module, *arguments])


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`."""
    return read_lines(run_dir / "metrics.jsonl")


def losses(run_dir: Path) -> list[list[float]]:
    """Return losses and gradient norm of each step."""
    return [[line[name] for name in LOSSES] for line in metrics(run_dir)]


def largest_difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Return the largest relative difference of two runs' losses, step by step."""
    assert len(ours) == len(theirs) > 0
    return max(
        abs(a - b) / abs(b)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model folder."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_weights(ours: Path, theirs: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    one, other = weights(ours), weights(theirs)
    return (
        bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    )


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and content of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
