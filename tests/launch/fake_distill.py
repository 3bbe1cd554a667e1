"""The command `launch.distill` with a stand-in for the training: `torchrun tests/launch/fake_distill.py HOW [ARGUMENTS]`.

HOW says what the stand-in does: `steps` (a short loop that stops when asked), `mistake`, `crash` and `hang` (rank 1 alone, while
the others wait in a collective), `mistakes` (every rank).
"""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill.config import Config, ConfigError
from distill.metrics import RunLog, StepMetrics
from distill.stop import Stop
from launch.command import run_command
from launch.distill import COMMAND


def fake_run(how: str, config: Config, mesh: Any, stop: Stop) -> dict[str, Any]:
    """Do what a training would, as far as the face is concerned."""
    import torch

    from parallel.collectives import all_reduce_

    if how == "mistakes" or (how == "mistake" and mesh.world.rank == 1):
        raise ConfigError("data.path=empty.txt holds no text; use another one")
    if how == "crash" and mesh.world.rank == 1:
        raise RuntimeError("the disk is on fire")
    if how == "hang" and mesh.world.rank == 1:
        with mesh.activity.doing("the long sleep"):
            time.sleep(3600)
    if how in ("mistake", "crash", "hang"):
        all_reduce_(torch.ones(1), mesh.world)
    with RunLog(config, writes=mesh.world.rank == 0) as log:
        stop.call_before_kill(log.save_buffers)
        for step in range(1, config.train.steps + 1):
            time.sleep(0.05)
            numbers = StepMetrics(
                step=step,
                round=0,
                tokens=100 * step,
                loss_total=3.0,
                loss_hard=4.0,
                loss_soft=2.0,
                loss_hidden=0.0,
                loss_temperature=2.0,
                loss_alpha=0.3,
                grad_norm=1.0,
                lr=1e-4,
                skipped_steps=0,
                step_s=0.05,
                tokens_per_s=2000.0,
                bubble_fraction=0.1,
                planned_bubble_fraction=0.1,
                planned_step_s=0.05,
                peak_bytes=1000,
            )
            log.step(numbers, total_steps=config.train.steps)
            wants = torch.tensor([float(stop.requested)])
            all_reduce_(wants, mesh.world, op="max")
            if wants.item():
                log.say(f"stopped after step {step}; the same command goes on from there")
                return log.finish({"finished": False})
        return log.finish({"finished": True, "table": [{"model": "teacher", "perplexity": 14.6}]})


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    train = types.ModuleType("distill.train")
    train.run = lambda config, mesh, stop: fake_run(how, config, mesh, stop)  # type: ignore[attr-defined]
    sys.modules["distill.train"] = train
    sys.exit(run_command(COMMAND, arguments))
