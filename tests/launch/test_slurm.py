"""`launch/slurm.sbatch`: what it would start, taken apart; `tests/commands/test_schedulers.py` starts it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.launch.schedulers import ROOT, SBATCH, read_call, seconds, slurm_environment

OVERRIDES = ("teacher=embedded", "data=pydoc", "mesh.pp=2", "student.prune.target_params='70M'")


def test_it_starts_the_main_job_on_every_node(tmp_path: Path) -> None:
    environment = slurm_environment(tmp_path / "bin", srun='printf "%s\\0" "$@"', SLURM_JOB_NUM_NODES="4")
    done = subprocess.run(
        ["bash", SBATCH, *OVERRIDES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    call = read_call(done.stdout.split("\0")[:-1], world_size=8)
    assert call.module == "launch.distill"
    assert call.launcher == {
        "nnodes": "4",
        "nproc-per-node": "2",
        "rdzv-id": "4711",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "127.0.0.1:24711",
        "max-restarts": "3",
    }
    assert call.config.run.dir == "runs/reflux" and call.config.checkpoint.resume == "auto"
    assert call.config.mesh.dp == 4 and call.config.student.prune.target_params == "70M"


def test_the_time_after_sigterm_suffices() -> None:
    text = SBATCH.read_text()
    assert text.splitlines()[0].startswith("#!") and "#SBATCH --requeue" in text
    assert seconds("--signal=TERM@", text) > seconds("SHUTDOWN_TIMEOUT:-", text)
