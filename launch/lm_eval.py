"""Judge a model folder by tasks of EleutherAI's lm_eval, which is optional.

Decides that lm_eval runs as a process of its own, once for each entry of `evaluate.lm_eval`: it may then be of any version
with this command line (0.4.13 is tested), and what it sets stays with it. It runs in the task's own folder, so that a task
names its data by a path from there, and outside torchrun's world, on one device. Assumes that the student fits there, and
that no rank waits for this one meanwhile. Does not judge whether a task makes sense.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import ConfigError
from launch.environment import environment_alone

Figures = dict[str, float]


def judge_folder(
    model: Path, tasks: Sequence[str], *, dtype: str, device: str, trust_remote_code: bool = False
) -> dict[str, Figures]:
    """Return what lm_eval finds for a model, by entry of `evaluate.lm_eval`.

    Args:
        model: a Hugging Face folder.
        tasks: names, .yaml files or folders of them, checked by `distill.judging_checks`.
        dtype: in which lm_eval loads the model.
        device: `cpu` or `cuda`.
        trust_remote_code: run the code in the folder also where it is not what our export writes.
    Returns:
        For each entry its figures, `lm_eval/TASK/METRIC`.
    Raises:
        ConfigError: lm_eval does not know the task, or fails; the model needs code that nobody trusts.
    """
    trusts = may_run_code(model, trust_remote_code=trust_remote_code)
    found = {}
    for task in tasks:
        print(f"lm_eval judges {model} by {task} ...", flush=True)
        found[task] = _judge(model, task, dtype=dtype, device=device, trusts=trusts)
    return found


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


def _judge(model: Path, task: str, *, dtype: str, device: str, trusts: bool) -> Figures:
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
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--config", str(file)],
            cwd=(place if place.is_dir() else place.parent) if is_local else None,
            env=environment_alone(),
            capture_output=True,
            text=True,
            check=False,
        )
        results = sorted(Path(workspace).glob("results_*.json"))
        if done.returncode != 0 or not results:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise ConfigError(
                f"evaluate.lm_eval={task}: lm_eval failed ({lines[-1].strip() if lines else 'it says nothing'}); "
                f"look with {sys.executable} -m lm_eval run --tasks {task} --model_args pretrained={model}"
            )
        return _figures(json.loads(results[-1].read_text(encoding="utf-8"))["results"])


def _figures(results: Mapping[str, Mapping[str, Any]]) -> Figures:
    """Return the numbers of lm_eval's `results`; `METRIC,FILTER` loses a filter that does nothing."""
    return {
        f"lm_eval/{task}/{name.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if "," in name and isinstance(value, (int, float))
    }
