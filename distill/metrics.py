"""What a run tells: lines on the terminal, the files in the run's folder, and Weights & Biases.

Decides: rank 0 alone writes; the other ranks make a silent `RunLog` and call the same methods. Files and wandb are written
on a thread that yields to all else: a slow disk costs no step. `metrics.jsonl` gets one flushed line a step and
`evaluations.jsonl` one for each judged model; `flush` before a checkpoint, so that a kill loses no line up to it. wandb
holds back 32 KiB, so `close` must be reached, or `save_buffers` by `distill.stop.Stop.call_before_kill`. Steps are
counted from 1: line N is written after the N-th optimizer step. Assumes numbers already reduced over the ranks.
Imports wandb only when it is switched on.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill.config import Config
from distill.convert import config_to_dict
from distill.curve import draw_curve
from distill.dashboard import Dashboard
from distill.health import Health
from distill.line_file import LineFile
from distill.rounds import rounds_of
from distill.runfolder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    cut_lines,
    write_config,
    write_lines,
    write_summary,
)
from distill.step_metrics import StepMetrics, finite_or_none
from parallel.background import Background

CURVE_FILE = "curve.svg"
_DRAIN_S = 5.0
_JUDGEMENT = ("step", "round", "model")
"""What tells one line of `evaluations.jsonl` from another."""


class RunLog:
    """The open log of a run; use it as a context manager, so that it is closed whatever happens."""

    def __init__(
        self, config: Config, *, writes: bool, done_steps: int = 0, health: Health | None = None
    ) -> None:
        """Open the log, or go on with it after `done_steps` steps.

        Args:
            config: checked settings; `distill.runfolder.check_run_folder` has accepted `run.dir`.
            writes: whether this rank writes (rank 0 does).
            done_steps: steps that the checkpoint holds; later lines of a former run are dropped.
            health: is told of each step.
        """
        self._config, self._writes, self._health = config, writes, health
        self._folder = Path(config.run.dir or ".")
        self._recent_step_s: deque[float] = deque(maxlen=20)
        self._finishing = threading.Lock()
        self._beside: Background | None = None
        self._metrics: LineFile | None = None
        self._wandb: Dashboard | None = None
        self.steps: list[dict[str, Any]] = []
        """Lines of `metrics.jsonl` so far; empty on ranks that do not write."""
        self.evaluations: list[dict[str, Any]] = []
        """Lines of `evaluations.jsonl` so far; empty on ranks that do not write."""
        if not writes:
            return
        write_config(config)
        self.steps = cut_lines(self._folder / METRICS_FILE, last_step=done_steps)
        self.evaluations = cut_lines(self._folder / EVALUATIONS_FILE, last_step=done_steps)
        self._metrics = LineFile(self._folder / METRICS_FILE)
        if config.log.wandb != "disabled":
            self._wandb = Dashboard(config, self._folder)
        self._beside = Background("log", yields=True)

    def __enter__(self) -> Self:
        """Return the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log."""
        self.close(failed=kind is not None)

    @property
    def trained_s(self) -> float:
        """Seconds that the steps so far took, those before a resume included."""
        return sum(line["time/step_s"] or 0.0 for line in self.steps)

    def seconds_before(self, step: int) -> float:
        """Return the seconds that the first `step` steps took."""
        return sum(line["time/step_s"] or 0.0 for line in self.steps if line["step"] <= step)

    def level(self, model: str) -> float:
        """Return the first held-out loss of a model, nats per token; NaN where nothing is logged."""
        losses = (line["eval/loss"] for line in self.evaluations if line["model"] == model)
        return next(losses, math.nan)

    def say(self, text: str) -> None:
        """Print a line, on the rank that writes."""
        if self._writes:
            print(text, flush=True)

    def step(self, metrics: StepMetrics, *, total_steps: int) -> None:
        """Write one step.

        Args:
            total_steps: the step at which the run ends, for the line on the terminal.
        """
        if self._beside is None:
            return
        values = metrics.named()
        self.steps.append(values)
        if self._health is not None:
            self._health.step(values)
        self._beside.give(partial(self._write_step, values, metrics.step))
        self._recent_step_s.append(metrics.step_s)
        if metrics.step % self._config.log.every == 0 or metrics.step == total_steps:
            self.say(self._line(metrics, total_steps))

    def evaluation(
        self,
        *,
        step: int,
        round: int,
        model: str,
        parameters: int,
        values: Mapping[str, float | None],
        known: bool = False,
    ) -> None:
        """Write what a model reached on the held-out text.

        Args:
            step: optimizer steps done when it was judged.
            model: `teacher`, or `student`.
            parameters: of the model.
            values: `eval/loss` (nats per token) and whatever else was measured, by name; None for what is not defined.
            known: whether an earlier run has judged it.
        """
        if self._beside is None:
            return
        line = {"step": step, "round": round, "model": model, "parameters": parameters}
        line |= {name: finite_or_none(value) for name, value in values.items()}
        # A run that was killed between a judgement and the next checkpoint judges the same once more.
        others = [old for old in self.evaluations if any(old[key] != line[key] for key in _JUDGEMENT)]
        # Before a later round begins, what the one before came to has the same step, and wandb keeps one of a name.
        cut_anew = round > 0 and not any((old["round"], old["model"]) == (round, model) for old in others)
        self.evaluations = [*others, line]
        named = {f"{model}/{'cut/' if cut_anew else ''}{name}": line[name] for name in values}
        self._beside.give(partial(self._write_evaluations, self.evaluations, named, step))
        # By the teacher's entropy they are for the files.
        shown = "  ".join(
            _shown(name, value) for name, value in values.items() if not name.startswith("eval/entropy_")
        )
        when = ", judged before" if known else f" after step {step}"
        self.say(f"held-out text, {model}{when}: {shown}")

    def flush(self) -> None:
        """Wait until all that was given is in the files, as far as the disk takes it."""
        if self._beside is not None:
            self._beside.wait()

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json` and close.

        Args:
            results: what only the training knows: the table, sizes, tokens; laid over what is known here.
        Returns:
            The whole summary.
        """
        last = self.steps[-1] if self.steps else {}
        summary = {
            "metrics": last,
            "tokens": last.get("tokens", 0),
            "seconds": self.trained_s,
            "layout": _layout(self._config),
            "versions": versions(),
            **results,
        }
        if self._beside is not None:
            write_summary(self._folder, summary)
        self.close(summary=summary)
        return summary

    def close(self, *, failed: bool = False, summary: Mapping[str, Any] | None = None) -> None:
        """Draw `curve.svg`, close the files and finish the wandb run; what is called later changes nothing."""
        beside, self._beside = self._beside, None
        if beside is not None and self._metrics is not None:
            try:
                beside.wait()
                if self.evaluations:
                    write_lines(self._folder / EVALUATIONS_FILE, self.evaluations)
            finally:
                beside.close()
                self._metrics.close()
            kinds = [each.loss.kind for each in rounds_of(self._config)]
            draw_curve(self._folder / CURVE_FILE, self.steps, self.evaluations, kinds=kinds)
        self.save_buffers(failed=failed, summary=summary)

    def save_buffers(self, *, failed: bool = True, summary: Mapping[str, Any] | None = None) -> None:
        """Finish the wandb run, which alone holds back what it was given; later steps go to the files only.

        May be called from another thread while a step is stuck, before the process is killed.
        """
        beside = self._beside
        if beside is not None:
            # What was given before comes first, but a disk that hangs may not keep the process from leaving.
            wait([beside.submit(lambda: None)], _DRAIN_S)
        with self._finishing:
            run, self._wandb = self._wandb, None
        if run is not None:
            run.finish(summary or {}, failed=failed)

    def _write_step(self, values: Mapping[str, Any], step: int) -> None:
        assert self._metrics is not None
        with self._bearing(METRICS_FILE):
            self._metrics.write(values)
        self._to_wandb(values, step=step)

    def _write_evaluations(
        self, lines: Sequence[Mapping[str, Any]], newest: Mapping[str, Any], step: int
    ) -> None:
        with self._bearing(EVALUATIONS_FILE):
            write_lines(self._folder / EVALUATIONS_FILE, lines)
        self._to_wandb(newest, step=step)

    @contextmanager
    def _bearing(self, name: str) -> Iterator[None]:
        """Bear a disk that is full: the file is written with what comes next, at the latest when the log is closed."""
        try:
            yield
        except OSError as error:
            self.say(
                f"warning: {self._folder / name} could not be written: {error.strerror}; tried again with the next line"
            )

    def _line(self, metrics: StepMetrics, total_steps: int) -> str:
        width = len(str(total_steps))
        mean_s = sum(self._recent_step_s) / len(self._recent_step_s)
        left = duration(mean_s * max(0, total_steps - metrics.step))
        return (
            f"step {metrics.step:>{width}}/{total_steps}  loss {metrics.loss_total:.4f}  "
            f"(hard {metrics.loss_hard:.4f}, soft {metrics.loss_soft:.4f})  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  {left} left"
        )

    def _to_wandb(self, values: Mapping[str, Any], *, step: int) -> None:
        run = self._wandb
        if run is not None:
            run.log({name: value for name, value in values.items() if value is not None}, step=step)


def duration(seconds: float) -> str:
    """Return seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _layout(config: Config) -> dict[str, Any]:
    mesh = config.mesh
    return {
        "world_size": mesh.pp * mesh.dp * mesh.tp,
        **config_to_dict(mesh),
        "schedule": config.pipeline.schedule,
        "teacher": config.pipeline.teacher,
        "num_microbatches": config.num_microbatches,
    }


def _shown(name: str, value: float | None) -> str:
    """Return a figure for the line on the terminal: `loss 2.68`, `animals/accuracy 0.5`."""
    short = name.removeprefix("eval/").removeprefix("choices/")
    return f"{short} -" if value is None else f"{short} {value:.4g}"
