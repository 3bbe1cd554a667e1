"""Judge a student beside its teacher on the held-out text.

Decides nothing: the work is `distill.session`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from distill.config import Config
from distill.stop import Stop
from launch.command import Command, run_command
from launch.report import table

if TYPE_CHECKING:
    from parallel.mesh import Mesh


def evaluate(config: Config, mesh: Mesh, stop: Stop) -> None:
    """Evaluate, and print one row for each model."""
    from distill.session import judge_models

    rows = judge_models(config, mesh)
    if mesh.world.is_first:
        print(table(rows), flush=True)


COMMAND = Command(
    usage="python -m launch.evaluate student.model=FOLDER [KEY=VALUE ...]",
    about="perplexity on the held-out text and agreement with the teacher's first choice",
    run=evaluate,
    needs=("teacher.model", "student.model", "data.path"),
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
