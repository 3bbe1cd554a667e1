"""Write a pruned student, a Hugging Face folder, with the scores that shaped it beside it; trains nothing.

Decides only that an existing student is not overwritten. The work is `distill.without_training`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import Config, ConfigError
from distill.places import check_writable
from distill.rounds import STUDENT_FOLDER
from distill.stop import Stop
from launch.command import Command, run_command

if TYPE_CHECKING:
    from parallel.mesh import Mesh


def prune(config: Config, mesh: Mesh, stop: Stop) -> None:
    """Prune, and say where the student is."""
    from distill.without_training import make_student

    folder = make_student(config, mesh)
    if mesh.world.is_first:
        print(f"student: {folder}", flush=True)


def _check(config: Config) -> None:
    check_writable("run.dir", config.run.dir or ".")
    if (Path(config.run.dir or ".") / STUDENT_FOLDER).exists():
        raise ConfigError(f"run.dir={config.run.dir} already holds a student; use another run.dir")
    if config.student.model is not None:
        raise ConfigError(
            f"student.model={config.student.model} is a ready student; use null to prune the teacher"
        )


COMMAND = Command(
    usage="python -m launch.prune [experiment=NAME] [KEY=VALUE ...]",
    about="write a student pruned out of its teacher to <run.dir>/student, without training it",
    run=prune,
    check=_check,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
