"""Judge a teacher, and a student beside it, on held-out text, by questions and by lm_eval's tasks.

Decides what is printed and written. The work is `distill.without_training`'s and, when all ranks are done, `launch.lm_eval`'s.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import Config
from distill.runfolder import write_whole
from distill.step_metrics import finite_or_none
from distill.stop import Stop
from launch.command import Command, run_command
from launch.lm_eval import judge_folder, may_run_code, with_figures
from launch.report import judged_table

if TYPE_CHECKING:
    from parallel.mesh import Mesh


def evaluate(config: Config, mesh: Mesh, stop: Stop) -> None:
    """Evaluate, and print one row for each model."""
    from distill.loading import first_rank_does
    from distill.metrics import versions
    from distill.without_training import judge_models

    if config.evaluate.lm_eval:
        # Before the models are judged.
        trust = config.teacher.trust_remote_code
        first_rank_does(mesh, lambda: may_run_code(_judged_by_tasks(config), trust_remote_code=trust))
    rows = judge_models(config, mesh)
    if not mesh.world.is_first:
        return
    try:
        rows = _by_lm_eval(config, mesh, stop, rows)
    finally:
        # What has been found is not lost when lm_eval fails.
        print(judged_table(rows), flush=True)
        if config.evaluate.out is not None:
            shown = [
                {
                    name: value if isinstance(value, str) else finite_or_none(value)
                    for name, value in row.items()
                }
                for row in rows
            ]
            text = json.dumps({"table": shown, "versions": versions()}, indent=2) + "\n"
            write_whole(Path(config.evaluate.out), text)


def _by_lm_eval(config: Config, mesh: Mesh, stop: Stop, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with lm_eval's figures for the last of them."""
    if not config.evaluate.lm_eval:
        return rows
    found = judge_folder(
        _judged_by_tasks(config),
        config.evaluate.lm_eval,
        stop,
        dtype=config.train.dtype,
        device=mesh.device.type,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    for figures in found.values():
        rows = with_figures(rows, len(rows) - 1, figures)
    return rows


def _judged_by_tasks(config: Config) -> Path:
    """Return the folder of the model that lm_eval judges: the student, or the teacher alone."""
    from distill.pretrained import resolve_model

    key = "teacher.model" if config.student.model is None else "student.model"
    return resolve_model(
        config.student.model or config.teacher.model,
        cache_dir=Path(config.data.cache_dir),
        trust_remote_code=config.teacher.trust_remote_code,
        key=key,
    )


COMMAND = Command(
    usage="python -m launch.evaluate teacher.model=NAME data.path=TEXT [student.model=FOLDER] [KEY=VALUE ...]",
    about="perplexity on held-out text, agreement with the teacher, multiple choice, lm_eval; for both models or the teacher alone",
    run=evaluate,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
