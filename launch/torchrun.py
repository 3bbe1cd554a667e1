"""torchrun without its reports: `python -m launch.torchrun` takes torchrun's arguments.

Decides: the ranks say why they end, so torchrun's own log and traceback are left out. A rank that a signal ended could say
nothing, so that is told here. Exit codes: that of the first rank that failed (torchrun's is always 1), 1 for one that was
killed; after SIGTERM or Ctrl-C 0 when every rank has saved and left, otherwise 128 + the signal, as in a shell. So 0 is "as it
should be" for a batch system, which preempts by SIGTERM and starts the same command again; whether the run came to its end
is `finished` in its summary.json:

    python -m launch.torchrun ... && { grep -q '"finished": true' runs/mine/summary.json || scontrol requeue $SLURM_JOB_ID; }

With --max-restarts N all ranks start again when one has failed, and go on from the newest checkpoint; not after a user's mistake
(exit code 2), which would only be made again, and not after a signal. Each process gets one thread unless OMP_NUM_THREADS says
otherwise, as under torchrun. After a signal they have two minutes for the step under way and its checkpoint, unless
TORCH_ELASTIC_SHUTDOWN_TIMEOUT or --shutdown-timeout says otherwise (torchrun: 30 s). Apart from that they are
started and ended as by `torchrun`, which works for every command too.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api
from torch.distributed.run import main

from launch.environment import FAILURE, SHUTDOWN, USER_ERROR

_AFTER_FAILURE_S = 30
"""For the other ranks to end after one has failed."""


def agent_class(exit_codes: list[int | None]) -> type[LocalElasticAgent]:
    """Return torchrun's agent with what this launcher decides about restarts.

    Args:
        exit_codes: filled with those of the ranks of this machine, when they have been told to end.
    """

    class Agent(LocalElasticAgent):
        _has_failed = False

        def _monitor_workers(self, *given: Any) -> Any:
            result = super()._monitor_workers(*given)
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self._has_failed = bool(codes)
            if USER_ERROR in codes.values():
                self._remaining_restarts = 0
            if codes and self._remaining_restarts:
                _tell_killed(codes)
            return result

        def _restart_workers(self, *given: Any) -> None:
            most = self._worker_group.spec.max_restarts
            number = most - self._remaining_restarts
            print(f"all ranks start again, {number} of at most {most} times", file=sys.stderr, flush=True)
            super()._restart_workers(*given)

        def _stop_workers(self, worker_group: Any) -> None:
            # Ranks that are well, as when a machine joins, have the time to save; beside one that has failed they only leave.
            self._shutdown(timeout=_AFTER_FAILURE_S if self._has_failed else self._shutdown_timeout)

        def _shutdown(self, *given: Any, **named: Any) -> None:
            super()._shutdown(*given, **named)
            if self._pcontext is not None:
                handlers = self._pcontext.subprocess_handlers.values()
                exit_codes[:] = [handler.proc.poll() for handler in handlers]

    return Agent


def run() -> int:
    """Run torchrun's command line; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(SHUTDOWN, "120")
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    exit_codes: list[int | None] = []
    # The only way in: torchrun's main names the class itself.
    api.LocalElasticAgent = agent_class(exit_codes)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _tell_killed({rank: failure.exitcode})
        return failure.exitcode if failure.exitcode > 0 else FAILURE
    except SignalException as error:
        saved = bool(exit_codes) and all(code == 0 for code in exit_codes)
        return 0 if saved else 128 + int(error.sigval)
    return 0


def _tell_killed(codes: dict[int, int]) -> None:
    """Name the ranks that a signal ended; the others have spoken for themselves."""
    killed = {rank: code for rank, code in codes.items() if code < 0}
    # When a rank has failed the others get a SIGTERM.
    first = {rank: code for rank, code in killed.items() if code != -signal.SIGTERM} or killed
    for rank, code in first.items():
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        print(f"rank {rank} was ended by {name}{hint}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run())
