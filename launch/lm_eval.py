"""Judge a model folder by tasks of EleutherAI's lm_eval, which is optional.

Decides that lm_eval runs as a process of its own, once for each entry of `evaluate.lm_eval`: it may then be of any version
with this command line (0.4.13 is tested), and what it sets stays with it. It runs in the task's own folder, so that a task
names its data by a path from there, and outside torchrun's world, on one device; it does not outlive this process. Assumes that the student fits there, and
that no rank waits for this one meanwhile. Does not judge whether a task makes sense.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import ConfigError
from distill.stop import Stop
from launch.environment import environment_alone

Figures = dict[str, float]
_LOOK_S = 0.2
"""Between two looks at whether to stop."""


def judge_folder(
    model: Path, tasks: Sequence[str], stop: Stop, *, dtype: str, device: str, trust_remote_code: bool = False
) -> dict[str, Figures]:
    """Return what lm_eval finds for a model, by entry of `evaluate.lm_eval`; fewer of them after a request to stop.

    Args:
        model: a Hugging Face folder.
        tasks: names, .yaml files or folders of them, checked by `distill.judging_checks`.
        stop: ends lm_eval too.
        dtype: in which lm_eval loads the model.
        device: `cpu` or `cuda`.
        trust_remote_code: run the code in the folder also where it is not what our export writes.
    Returns:
        For each entry its figures, `lm_eval/TASK/METRIC`.
    Raises:
        ConfigError: lm_eval does not know the task, or fails; the model needs code that nobody trusts.
    """
    trusts = may_run_code(model, trust_remote_code=trust_remote_code)
    if device == "cuda":
        _free_memory()
    found = {}
    for task in tasks:
        print(f"lm_eval judges {model} by {task} ...", flush=True)
        figures = _judge(model, task, stop, dtype=dtype, device=device, trusts=trusts)
        if figures is None:
            print(f"stopped while lm_eval judged by {task}; the same command judges by it again", flush=True)
            break
        found[task] = figures
    return found


def _free_memory() -> None:
    """Give what this process keeps of its GPU's memory back, for the program that comes."""
    import torch

    # Models are in cycles.
    gc.collect()
    torch.cuda.empty_cache()


def may_run_code(model: Path, *, trust_remote_code: bool) -> bool:
    """Return whether lm_eval may run the code in a model's folder.

    Raises:
        ConfigError: it may not, and the model needs it.
    """
    # Imported late: it needs torch.
    from distill.deploy.own_code import has_own_code, needs_code

    trusts = trust_remote_code or has_own_code(model)
    if not trusts and needs_code(model):
        raise ConfigError(
            f"evaluate.lm_eval: {model} comes with Python code that is not what this version writes, and without it it would be "
            "another model; teacher.trust_remote_code=true runs it"
        )
    return trusts


def with_figures(rows: Sequence[Mapping[str, Any]], judged: int, figures: Figures) -> list[dict[str, Any]]:
    """Return rows of a table with columns for figures that only row `judged` has."""
    blank = dict.fromkeys(figures)
    return [{**row, **(figures if index == judged else blank)} for index, row in enumerate(rows)]


def _judge(model: Path, task: str, stop: Stop, *, dtype: str, device: str, trusts: bool) -> Figures | None:
    """Return what lm_eval finds by one task; None if it was stopped."""
    place = Path(task).expanduser()
    is_local = place.is_file() or place.is_dir()
    with tempfile.TemporaryDirectory(prefix="reflux-lm-eval-") as workspace:
        settings = {
            "model": "hf",
            "model_args": {
                "pretrained": str(model.resolve()),
                "dtype": dtype,
                **({"trust_remote_code": True} if trusts else {}),
            },
            "tasks": [str(place.resolve()) if is_local else task],
            "device": device,
            "output_path": str(Path(workspace) / "results.json"),
        }
        # JSON is YAML, which the option asks for.
        file = Path(workspace) / "settings.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")
        done = _run(
            [sys.executable, "-m", "lm_eval", "run", "--config", str(file)],
            stop,
            cwd=(place if place.is_dir() else place.parent) if is_local else None,
            env=environment_alone(),
        )
        if done is None:
            return None
        results = sorted(Path(workspace).glob("results_*.json"))
        if done.returncode != 0 or not results:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise ConfigError(
                f"evaluate.lm_eval={task}: lm_eval failed ({lines[-1].strip() if lines else 'it says nothing'}); "
                f"look with {sys.executable} -m lm_eval run --tasks {task} --model_args pretrained={model}"
            )
        return _figures(json.loads(results[-1].read_text(encoding="utf-8"))["results"])


def _run(command: Sequence[str], stop: Stop, **options: Any) -> subprocess.CompletedProcess[str] | None:
    """Run a program to its end; None if it was ended by a request to stop.

    It is ended with this process too, where that leaves by a signal or against its will.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # In a session of its own Ctrl-C reaches it through `stop` only, and all that it has started is found.
    with subprocess.Popen(command, start_new_session=True, **pipes, **options) as process:
        stop.call_before_kill(partial(_end, process))
        try:
            while not stop.requested:
                with suppress(subprocess.TimeoutExpired):
                    out, err = process.communicate(timeout=_LOOK_S)
                    return subprocess.CompletedProcess(command, process.returncode, out, err)
        finally:
            _end(process)
    return None


def _end(process: subprocess.Popen[str]) -> None:
    """End a program that has not ended, and what it has started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _figures(results: Mapping[str, Mapping[str, Any]]) -> Figures:
    """Return the numbers of lm_eval's `results`; `METRIC,FILTER` loses a filter that does nothing."""
    return {
        f"lm_eval/{task}/{name.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if "," in name and isinstance(value, (int, float))
    }
