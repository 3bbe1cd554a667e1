"""Train the students of the study, each a run of `launch.distill`: `python docs/study/run.py [NAME ...]`.

Needs the corpus of `docs/study/corpus.py` under cache/study. Without names all students are trained in the order of
`STUDENTS`; one that is done is left alone, and one that was interrupted goes on. What a run keeps lies in
cache/study/runs/NAME; `docs/study/table.py` makes the table and the curves of it. A student takes half an hour on two
cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path("cache/study")
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
    "train.dtype": "float32",
    "optimizer.lr": 4e-4,
    "optimizer.warmup_steps": 4,
    "optimizer.schedule": "constant",
    "mesh.pp": 2,
    "evaluate.rows": 32,
    "evaluate.every": 49,
    "checkpoint.every": 49,
    "checkpoint.keep": 1,
    "log.wandb": "disabled",
    "train.tokens": SHORT,
}
"""A constant learning rate, so that a run's level after 100k tokens is that of a run of 100k tokens."""

WIDE = {"student.prune.intermediate_size": 896}
"""75 % of the teacher's parameters (101.3M of 134.5M): 896 of 1,536 feed-forward channels."""
HALF = {"student.prune.num_layers": 20, "student.prune.intermediate_size": 576}
"""49 % (65.9M): the best before training of the six that `student.prune.target_params=67.5M` finds."""
TWO_ROUNDS = (
    "[{student:{prune:{intermediate_size:896}}},{student:{prune:{num_layers:20,intermediate_size:576}}}]"
)

STUDENTS: dict[str, dict[str, object]] = {
    "wide": WIDE | {"train.tokens": LONG},
    "half": HALF | {"train.tokens": LONG},
    "half-t1": HALF | {"loss.temperature": 1, "train.tokens": LONG},
    "half-t5": HALF | {"loss.temperature": 5, "train.tokens": LONG},
    "half-alpha0": HALF | {"loss.alpha": 0, "train.tokens": LONG},
    "half-alpha7": HALF | {"loss.alpha": 0.7, "train.tokens": LONG},
    "half-hard": HALF | {"loss.alpha": 1, "train.tokens": LONG},
    "half-two-rounds": {"rounds": TWO_ROUNDS},
    "half-l1": HALF | {"student.prune.method": "l1"},
    "half-random": HALF | {"student.prune.method": "random"},
    "half-hidden": HALF | {"loss.hidden.weight": 1, "loss.hidden.projection": "none"},
    "wide-hard": WIDE | {"loss.alpha": 1},
    "low-rank": {"student.low_rank.ratio": 0.58},
    "low-rank-plain": {"student.low_rank.ratio": 0.58, "student.low_rank.whiten": "false"},
    "two-of-four": {"student.sparsity.method": "wanda", "student.sparsity.pattern": "'2:4'"},
}
"""What each student's run sets beside `COMMON`; all else is the recipes' default (T = 2, alpha = 0.3)."""


def train(name: str) -> None:
    """Train one student, or go on with it."""
    folder = CACHE / "runs" / name
    if not (folder / "summary.json").exists():
        settings = COMMON | STUDENTS[name] | {"run.dir": folder}
        command = [sys.executable, "-m", "launch.torchrun", "--nproc-per-node", "2", "-m", "launch.distill"]
        command += [f"{key}={value}" for key, value in settings.items()]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    for large in ("checkpoints", "student", "pruned", "round-0"):
        shutil.rmtree(folder / large, ignore_errors=True)


def main() -> None:
    """Train the students named on the command line, or all."""
    for name in sys.argv[1:] or STUDENTS:
        train(name)
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
