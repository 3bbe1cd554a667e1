"""torchrun without its reports: `python -m launch.torchrun` takes torchrun's arguments.

Decides: the ranks say why they end, so torchrun's own log and traceback are left out, and the exit code is that of the
first rank that failed (torchrun's is always 1); after a signal it is 128 + the signal, as in a shell. A rank that a
signal ended could say nothing, so that is told here. Each process gets one thread unless OMP_NUM_THREADS says
otherwise, as under torchrun. After a signal they have two minutes for the step under way and its checkpoint, unless
TORCH_ELASTIC_SHUTDOWN_TIMEOUT or --shutdown-timeout says otherwise (torchrun: 30 s). Apart from that they are
started and ended as by `torchrun`, which works for every command too.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from launch.environment import SHUTDOWN


def run() -> int:
    """Run torchrun's command line; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(SHUTDOWN, "120")
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        print(f"rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run())
