"""The command `launch.distill` with something that goes wrong in it: `faulty_distill FAULT key=value ...`.

FAULT is JSON: `what` (`hang`, `freeze`, `raise`, `kill`, `nan`, `full`; `vanish`, with a file's `path`), `where` (below),
`rank`, `step` (from 1, of the round),
`action` (`1B0`, for `action`), `call` (which call of the place counts, from 1). After a restart nothing goes wrong any more.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.command import run_command
from launch.distill import COMMAND

PLACES = {
    "load": "distill.session.load_teacher",
    "prune": "distill.session.prune_teacher",
    "evaluate": "distill.judging.evaluate",
    "save": "parallel.checkpoint.write_shards",
    "export": "distill.train.export_round",
    "log": "distill.train.step_metrics",
}
MARK = os.environ["REFLUX_FAULT_MARK"]
"""File that gets the time of the fault."""
RANK = int(os.environ.get("RANK", "0"))


def happen(what: str, path: str = "") -> None:
    """Let it go wrong, after noting when."""
    Path(MARK).write_text(str(time.time()))
    if what == "hang":
        time.sleep(3600)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif what == "vanish":
        Path(path).unlink()
    else:
        raise RuntimeError("the disk is on fire")


def at_place(place: str, call: int, what: str, path: str) -> None:
    """Let the n-th call of a function go wrong before it begins."""
    module, _, name = PLACES[place].rpartition(".")
    home = importlib.import_module(module)
    original, calls = getattr(home, name), []

    def stand_in(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            happen(what, path)
        return original(*given, **named)

    setattr(home, name, stand_in)


def in_step(fault: dict[str, Any]) -> None:
    """Let an action of a step go wrong, or let the teacher's output be NaN in some."""
    from distill.step import DistillationStep
    from parallel.pipeline.executor import Executor

    call, do, loss = DistillationStep.__call__, Executor._do, DistillationStep._loss
    now = {"step": 0}

    def counted(self: Any, step: int, **how: Any) -> Any:
        now["step"] = step + 1
        try:
            return call(self, step, **how)
        finally:
            now["step"] = 0

    def checked(self: Any, entry: Any, its_number: Any) -> Any:
        if now["step"] == fault["step"] and str(entry.action) == fault["action"]:
            return do(self, entry._replace(handler=lambda _: happen(fault["what"])), its_number)
        return do(self, entry, its_number)

    def spoilt(self: Any, student: Any, microbatch: int) -> Any:
        if now["step"] in fault["steps"]:
            self._signals[microbatch].fill_(math.nan)
        return loss(self, student, microbatch)

    DistillationStep.__call__ = counted
    if fault["what"] == "nan":
        DistillationStep._loss = spoilt
    else:
        Executor._do = checked


def arm(fault: dict[str, Any]) -> Callable[[], None] | None:
    """Put the fault into this process."""
    if RANK != fault["rank"] or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    if fault["where"] == "start":
        return lambda: happen(fault["what"])
    if fault["where"] == "action":
        in_step(fault)
    else:
        at_place(fault["where"], fault.get("call", 1), fault["what"], fault.get("path", ""))
    return None


if __name__ == "__main__":
    first = arm(json.loads(sys.argv[1]))
    if first is not None:
        first()
    sys.exit(run_command(COMMAND, sys.argv[2:]))
