"""Ctrl-C and SIGTERM as requests to stop.

Decides: the first signal asks the run to end after its step, with a checkpoint and exit code 0: it has done as it was told. Slurm
and Kubernetes preempt by SIGTERM and start the same command again, which goes on; whether a run came to its end is `finished` in
its summary.json. A second signal ends the process at once (128 + the signal, as a shell says it), and when the step
takes so long that torchrun is about to kill the process, what is buffered is saved. Commands that take no steps end at the
first signal. A thread reads the signals through
Python's wake-up descriptor, because a handler proper does not run while the main thread waits inside a collective. Must be
installed from the main thread.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType

from distill.stop import Stop
from launch.environment import shutdown_s

SAVE_AFTER_S = shutdown_s() * 2 / 3
"""When what is buffered is saved, after a signal: before torchrun ends the process."""
SAME_SIGNAL_S = 1.0
"""Signals this close together are one: a batch system tells torchrun and its workers, and torchrun tells them again."""


def listen(stop: Stop, *, announces: bool, waits: bool = True) -> None:
    """Turn SIGINT and SIGTERM of this process into requests on `stop`.

    Args:
        announces: whether this process tells the user (rank 0 does).
        waits: whether somebody looks at the request; else the first signal ends the process.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_to_thread)
    target, arguments = (_watch, (reader, stop, announces)) if waits else (_end, (reader, stop))
    threading.Thread(target=target, args=arguments, daemon=True, name="signals").start()


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: a Python handler must exist for the wake-up descriptor to be written."""


def _end(reader: int, stop: Stop) -> None:
    number = os.read(reader, 1)[0]
    stop.save_buffers()
    os._exit(128 + number)


def _watch(reader: int, stop: Stop, announces: bool) -> None:
    number = os.read(reader, 1)[0]
    first_s = time.monotonic()
    stop.request()
    # SIGTERM comes from no terminal: from a batch system, or from torchrun because another rank has ended.
    if announces and number == signal.SIGINT:
        print("\nstopping after the step under way; Ctrl-C again ends at once", file=sys.stderr, flush=True)
    left_s: float | None = SAVE_AFTER_S
    while True:
        readable, _, _ = select.select([reader], [], [], left_s)
        if not readable:
            stop.save_buffers()
            left_s = None
            continue
        number = os.read(reader, 1)[0]
        elapsed_s = time.monotonic() - first_s
        if elapsed_s > SAME_SIGNAL_S:
            stop.save_buffers()
            os._exit(128 + number)
        if left_s is not None:
            left_s = SAVE_AFTER_S - elapsed_s
