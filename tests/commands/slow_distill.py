"""The command `launch.distill` with checkpoints that take long: each says `saving` and then waits three seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from launch.command import run_command
from launch.distill import COMMAND

SAVING_S = 3.0

if __name__ == "__main__":
    from parallel import checkpoint

    write_shards = checkpoint.write_shards

    def slowly(*given: Any) -> Any:
        """Let some time pass before the file is there."""
        print("saving", flush=True)
        time.sleep(SAVING_S)
        return write_shards(*given)

    checkpoint.write_shards = slowly
    sys.exit(run_command(COMMAND))
