"""The main job: prune a student out of its teacher, distil it, judge it, export it.

Decides only the order: check the run's folder, train, print the result. The work is `distill.train`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import Config
from distill.runfolder import check_run_folder
from distill.stop import Stop
from launch.command import Command, run_command
from launch.report import run_report

if TYPE_CHECKING:
    from parallel.mesh import Mesh


def distill(config: Config, mesh: Mesh, stop: Stop) -> None:
    """Train, and print the result from rank 0 when the run came to its end."""
    from distill.train import run

    summary = run(config, mesh, stop)
    if mesh.world.is_first and summary["finished"]:
        print(run_report(summary, Path(config.run.dir or ".")), flush=True)


COMMAND = Command(
    usage="torchrun --nproc-per-node N -m launch.distill [experiment=NAME] [KEY=VALUE ...]",
    about="prune a student out of its teacher, distil it, judge it, and export it as a Hugging Face folder",
    run=distill,
    check=check_run_folder,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
