"""What torchrun tells a process, and what the process tells the system when it ends.

Decides the exit codes. Assumes torchrun's variable names; without them the process is a world of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

FAILURE, USER_ERROR = 1, 2
"""Exit codes: something broke; the user asked for something that cannot be."""

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""torchrun's variable for the seconds between the signal that it passes on and the end of processes that have not left."""


_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_alone() -> dict[str, str]:
    """Return the environment without torchrun's words, for a program of one process that would take them for its own."""
    kin = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {
        name: value for name, value in os.environ.items() if name not in _PLACE and not name.startswith(kin)
    }


def shutdown_s() -> float:
    """Return the seconds that a process has after a signal."""
    return float(os.environ.get(SHUTDOWN, "30"))


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def from_environment() -> World:
        """Return the place that torchrun wrote into the environment, or that of a single process."""

        def read(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return World(
            rank=read("RANK", 0),
            size=read("WORLD_SIZE", 1),
            local_rank=read("LOCAL_RANK", 0),
            local_size=read("LOCAL_WORLD_SIZE", 1),
        )
