"""Train the students of the study, each a run of `launch.distill`: `python docs/study/run.py [NAME ...]`.

Needs the corpus of `docs/study/corpus.py` under cache/study. Without names all students are trained in the order of
`STUDENTS`, two at a time on one core each; one whose result is there is left alone, and one that was interrupted goes on. What a run needs lies in
cache/study/runs/NAME, what is told of it in docs/study/results/NAME.json; `docs/study/table.py` makes tables and curves
of these.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CACHE = Path("cache/study")
RESULTS = Path("docs/study/results")
CORES = 2
STEP = 4 * 256
"""Tokens of an optimizer step."""
LONG, SHORT = 196 * STEP, 98 * STEP
"""Tokens of a comparison that sets a default, and of any other."""

COMMON = {
    "teacher": "embedded",
    "data.path": "[" + ",".join(f"{CACHE}/{part}.jsonl" for part in ("anarchism", "python", "linux")) + "]",
    "data.seq_len": 256,
    "data.held_out_fraction": 0.02,
    "train.global_batch_size": 4,
    "train.microbatch_size": 4,
    "train.dtype": "float32",
    "optimizer.lr": 4e-4,
    "optimizer.warmup_steps": 4,
    "optimizer.schedule": "constant",
    "evaluate.rows": 32,
    "evaluate.every": 49,
    "checkpoint.every": 49,
    "checkpoint.keep": 1,
    "log.wandb": "disabled",
    "train.tokens": SHORT,
    "train.timeout_s": 86_400,
}
"""A constant learning rate, so that a run's level after 100k tokens is that of a run of 100k tokens; a long
timeout, so that a study may be suspended while the machine does something else."""

WIDE = {"student.prune.intermediate_size": 896}
"""75 % of the teacher's parameters (101.3M of 134.5M): 896 of 1,536 feed-forward channels."""
HALF = {"student.prune.num_layers": 20, "student.prune.intermediate_size": 576}
"""49 % (65.9M): the best before training of the six that `student.prune.target_params=67.5M` finds."""
TWO_ROUNDS = (
    "[{student:{prune:{intermediate_size:896}}},{student:{prune:{num_layers:20,intermediate_size:576}}}]"
)
"""`WIDE`, then `HALF`, each for `train.tokens`."""
MOMENTS = (
    "[{{student:{{prune:{{intermediate_size:896}}}},train:{{tokens:40960}}}},"
    "{{student:{{prune:{{num_layers:20,intermediate_size:576}}}},train:{{tokens:20480}},optimizer:{{moments:{}}}}}]"
)
"""40 steps of `WIDE`, then 20 of `HALF`, with the moments cut by the weights' indices or without."""
AGAIN = {"train.seed": 1}
"""The same rows in another order; what is held out stays the same."""

STUDENTS: dict[str, dict[str, object]] = {
    "half": HALF | {"train.tokens": LONG},
    "half-hard": HALF | {"loss.alpha": 1, "train.tokens": LONG},
    "half-t1": HALF | {"loss.temperature": 1, "train.tokens": LONG},
    "half-t5": HALF | {"loss.temperature": 5, "train.tokens": LONG},
    "half-alpha0": HALF | {"loss.alpha": 0, "train.tokens": LONG},
    "half-alpha7": HALF | {"loss.alpha": 0.7, "train.tokens": LONG},
    "half-two-rounds": {"rounds": TWO_ROUNDS, "train.tokens": SHORT // 2},
    "half-l1": HALF | {"student.prune.method": "l1"},
    "half-random": HALF | {"student.prune.method": "random"},
    "half-hidden": HALF | {"loss.hidden.weight": 1, "loss.hidden.projection": "none"},
    # Beside the recipes' cut of 40 % of the feed-forward channels: 103.0M, factored to 83.0M (62 %).
    "low-rank": {"student.low_rank.ratio": 0.58},
    "low-rank-plain": {"student.low_rank.ratio": 0.58, "student.low_rank.whiten": "false"},
    "two-of-four": {
        "student.prune.pruning_ratio": 0,
        "student.sparsity.method": "wanda",
        "student.sparsity.pattern": "'2:4'",
    },
    "wide": WIDE,
    "wide-hard": WIDE | {"loss.alpha": 1},
    "half-again": HALF | AGAIN,
    "half-t1-again": HALF | AGAIN | {"loss.temperature": 1},
    "half-t5-again": HALF | AGAIN | {"loss.temperature": 5},
    "half-alpha0-again": HALF | AGAIN | {"loss.alpha": 0},
    "half-alpha7-again": HALF | AGAIN | {"loss.alpha": 0.7},
    "moments-kept": {"rounds": MOMENTS.format("keep")},
    "moments-reset": {"rounds": MOMENTS.format("reset")},
}
"""What each student's run sets beside `COMMON`; all else is the recipes' default (T = 2, alpha = 0.3)."""


def train(name: str) -> None:
    """Train one student, or go on with it, and write down what it came to."""
    if (RESULTS / f"{name}.json").exists():
        return
    folder = CACHE / "runs" / name
    settings = COMMON | STUDENTS[name] | {"run.dir": folder}
    command = [sys.executable, "-m", "launch.distill", *(f"{key}={value}" for key, value in settings.items())]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if not json.loads((folder / "summary.json").read_text()).get("finished"):
        raise SystemExit(f"{name} was stopped; the same command goes on from there")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result(name, folder)) + "\n")
    for large in ("checkpoints", "student", "pruned", "pruned-1", "round-0", "factored"):
        shutil.rmtree(folder / large, ignore_errors=True)
    print(f"{name}: done", flush=True)


def result(name: str, folder: Path) -> dict[str, Any]:
    """Return what the study tells of a finished run: its settings, its evaluations, and its losses step by step."""
    steps = _lines(folder / "metrics.jsonl")
    kept = ("tokens", "loss/hard", "loss/soft", "time/step_s")
    return {
        "settings": {key: str(value) for key, value in (COMMON | STUDENTS[name]).items()},
        "evaluations": _lines(folder / "evaluations.jsonl"),
        "steps": {key: [_short(line[key]) for line in steps] for key in kept},
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else round(value, 4)


def main() -> None:
    """Train the students named on the command line, or all."""
    names = queue.SimpleQueue[str]()
    for name in sys.argv[1:] or STUDENTS:
        names.put(name)

    def work() -> None:
        # The one that was stopped, or failed, lets no other begin on its core.
        with contextlib.suppress(queue.Empty):
            while True:
                train(names.get_nowait())

    with ThreadPoolExecutor(CORES) as crew:
        for core in [crew.submit(work) for _ in range(CORES)]:
            core.result()


if __name__ == "__main__":
    main()
