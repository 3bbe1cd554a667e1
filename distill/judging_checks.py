"""What models are judged by, as far as the settings and the disk show it: `evaluate.*` beyond single numbers.

Decides the sentence of every mistake there. Needs no torch; the questions themselves are read by `distill.choices`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from distill.config import ConfigError, Evaluate
from distill.convert import show
from distill.places import writable_file

INSTALL_LM_EVAL = ".venv/bin/pip install 'lm_eval[hf]==0.4.13'"


def check_judging(evaluate: Evaluate) -> None:
    """Check the files and tasks that models are judged by.

    Raises:
        ConfigError: the first mistake found.
    """
    if "{question}" not in evaluate.choices_template:
        raise ConfigError(
            f"evaluate.choices_template={evaluate.choices_template} has no place for the question; write {{question}} there"
        )
    _check_choices(evaluate.choices)
    _check_lm_eval(evaluate.lm_eval)
    writable_file("evaluate.out", evaluate.out)


def _check_choices(files: Sequence[str]) -> None:
    names: dict[str, str] = {}
    for file in files:
        if not Path(file).expanduser().is_file():
            raise ConfigError(f"evaluate.choices={file} does not exist; use a JSONL file of questions")
        name = Path(file).stem
        if name in names:
            raise ConfigError(
                f"evaluate.choices={file} would have the same name in the results as {names[name]}; rename one of them"
            )
        names[name] = file


def _check_lm_eval(tasks: Sequence[str]) -> None:
    for task in tasks:
        path = Path(task).expanduser()
        is_local = "/" in task or path.suffix == ".yaml" or path.is_dir()
        if is_local and not path.is_file() and not any(path.glob("*.yaml")):
            raise ConfigError(
                f"evaluate.lm_eval={task} does not exist or holds no task; use a .yaml file, a folder of them, or a name"
            )
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluate.lm_eval={show(tasks)} needs lm_eval, which is not installed; use {INSTALL_LM_EVAL}"
        )
