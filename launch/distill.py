"""The main job: prune a student out of its teacher, distil it, judge it, export it.

Decides only the order: check the run's folder, train, let lm_eval judge the student if asked for, print the result. The work is `distill.train`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import Config
from distill.runfolder import check_run_folder, write_summary
from distill.stop import Stop
from launch.command import Command, run_command
from launch.environment import FAILURE
from launch.lm_eval import judge_folder, with_figures
from launch.report import run_report

if TYPE_CHECKING:
    from parallel.mesh import Mesh


def distill(config: Config, mesh: Mesh, stop: Stop) -> None:
    """Train, and print the result from rank 0 when the run came to its end."""
    from distill.train import run

    summary = run(config, mesh, stop)
    if "failure" in summary:
        if mesh.world.is_first:
            print(f"failed: {summary['failure']}", file=sys.stderr, flush=True)
        # All ranks have agreed on it, so none of them waits for this one.
        raise SystemExit(FAILURE)
    if mesh.world.is_first and summary["finished"]:
        try:
            # Last of all, because no rank waits for this one any more.
            summary = _with_lm_eval(config, mesh, stop, summary)
        finally:
            print(run_report(summary, Path(config.run.dir or ".")), flush=True)


def _with_lm_eval(config: Config, mesh: Mesh, stop: Stop, summary: dict[str, Any]) -> dict[str, Any]:
    """Judge the finished student by the tasks that have not judged it yet; return the summary with what they found."""
    known = summary.get("lm_eval", {})
    missing = [task for task in config.evaluate.lm_eval if task not in known]
    if not missing:
        return summary
    found = judge_folder(
        Path(summary["student"]),
        missing,
        stop,
        dtype=config.train.dtype,
        device=mesh.device.type,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    table = summary["table"]
    for figures in found.values():
        table = with_figures(table, len(table) - 1, figures)
    summary = {**summary, "table": table, "lm_eval": {**known, **found}}
    write_summary(Path(config.run.dir or "."), summary)
    return summary


COMMAND = Command(
    usage="torchrun --nproc-per-node N -m launch.distill [experiment=NAME] [KEY=VALUE ...]",
    about="prune a student out of its teacher, distil it, judge it, and export it as a Hugging Face folder",
    run=distill,
    check=check_run_folder,
    stops_between_steps=True,
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND))
