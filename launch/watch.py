"""A watch on all ranks: nothing hangs, and why a run ends is told once.

A thread of each process says once a second that its rank lives and what it is doing (`launch.board`). Decides:

- A run hangs when a rank has been waiting for almost `train.timeout_s`, and no rank at all has got further for as long. A
  rank may take hours over something that others wait for, if it makes marks of progress (`parallel.activity`). One rank tells
  what each was doing, before `train.timeout_s` is over, and all leave.
- A rank that fails tells why, and all others leave. One whose connection broke may be the victim of another: it gives
  that one the time to speak, and then names the rank that gives no sign of life.
- They leave by `os._exit`, because an ordinary exit can hang in a collective that will never complete; before, what is
  buffered is saved. A process whose interpreter is stuck is ended by a timer outside the interpreter.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from distill.config import ConfigError
from distill.failures import RunFailed
from launch.board import Board
from launch.environment import FAILURE, USER_ERROR
from launch.verdict import gone_message, hang_message
from parallel.activity import Activity

BEAT_S = 1.0
"""Between two signs of life."""
SIGNS_S = 2.5
"""How long ranks are watched for a sign of life."""
SPEAKS_S = 3.0
"""How long a rank lets another speak: rank 0 about a user's mistake, the one that broke a connection about its failure."""
FAREWELL_S = 5.0
"""How long a rank has to leave by itself when the run is over: to close its logs."""
BUFFERS_S = 5.0
"""How long saving what is buffered may take at the very end."""
STUCK_S = 30.0
"""How much longer than `train.timeout_s` an interpreter, or a store that does not answer, may hold up the watch."""
_COMPUTES = 0.01
"""Share of a processor from which on a process counts as computing: little, for the machine may be busy."""
COMPUTES_S = 10.0
"""Over how long that is measured, at most: the system counts in hundredths of a second."""
_NETWORK = ("gloo", "pt_")
"""Beginnings of the names of threads that turn round while nothing comes."""
_BROKEN = ("connection", "broken pipe", "timed out", "socket", "remote process", "nccl")
"""Words of errors that the end of another rank may have caused."""


def end_later(seconds: float) -> None:
    """Let a timer outside the interpreter end this process, unless it is set anew before."""
    faulthandler.dump_traceback_later(seconds, exit=True)


class Watch:
    """This process's part of the watch, from when the ranks have met.

    Args:
        activity: what this process is doing.
        timeout_s: `train.timeout_s`.
        save_buffers: called before the process leaves against its will.
        leave: ends the process with an exit code.
        arm: sets a timer that ends the process after so many seconds, unless it is set anew, whatever the interpreter does.
    """

    def __init__(
        self,
        board: Board,
        activity: Activity,
        *,
        timeout_s: float,
        save_buffers: Callable[[], None],
        leave: Callable[[int], object] = os._exit,
        arm: Callable[[float], object] = end_later,
    ) -> None:
        self._board, self._activity = board, activity
        self._timeout_s, self._save_buffers, self._exit = timeout_s, save_buffers, leave
        self._arm = arm
        self._beat_s = min(BEAT_S, timeout_s / 4)
        # Looking for signs of life takes its time, and the beat that sees the limit may be late by one.
        self._patience_s = timeout_s - min(SIGNS_S + 2 * self._beat_s, timeout_s / 4)
        self._beaten_s = self._moved_s = self._counted_s = self._beat_before_s = time.monotonic()
        self._armed_s = -STUCK_S
        self._cpu_s, self._moves = 0.0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def end_by_mistake(self, error: ConfigError, *, speaks_first: bool) -> NoReturn:
        """Tell a user's mistake, unless the rank that speaks first (rank 0) does, and end this process."""
        if not speaks_first:
            self._await_the_end(SPEAKS_S)
        self._tell(f"error: {error}", USER_ERROR)

    def end_by_failure(self, error: Exception) -> NoReturn:
        """Tell why this rank fails, unless another has told why the run does, and end this process."""
        words = f"failed: {error}" if isinstance(error, RunFailed) else self._with_trace(error)
        if _may_be_a_victim(error):
            self._await_the_end(SPEAKS_S)
            self._tell(lambda: self._gone() or words, FAILURE)
        self._tell(words, FAILURE)

    def _with_trace(self, error: Exception) -> str:
        return f"{self._board.place} failed:\n{''.join(traceback.format_exception(error))}"

    def _gone(self) -> str | None:
        return gone_message(self._board.reports(self._activity.look(), watch_s=SIGNS_S))

    def _tell(self, message: str | Callable[[], str], code: int) -> NoReturn:
        """Tell why the run ends if no other does, and leave when it is told."""
        try:
            if self._board.has_the_word():
                text = message if isinstance(message, str) else message()
                print(text.rstrip("\n"), file=sys.stderr, flush=True)
                self._board.end(code)
            else:
                self._await_the_end(SIGNS_S + FAREWELL_S)
        except RuntimeError:
            # Without the store nobody else can tell it.
            print(message if isinstance(message, str) else self._lost(), file=sys.stderr, flush=True)
        self._leave(code)

    def _await_the_end(self, at_most_s: float) -> None:
        """Wait until the run is over; leave then, otherwise return."""
        deadline_s = time.monotonic() + at_most_s
        while time.monotonic() < deadline_s:
            if (code := self._board.end_code()) is not None:
                self._leave(code)
            time.sleep(0.05)

    def _run(self) -> None:
        try:
            while not self._closed.wait(self._beat_s):
                self._look_after_itself()
                self._beat()
        except RuntimeError:
            if not self._closed.is_set():
                print(self._lost(), file=sys.stderr, flush=True)
                self._leave(FAILURE)

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beat_before_s > max(self._patience_s / 2, 4 * self._beat_s):
            # The whole process stood still, as in a job that is suspended: what it has not done meanwhile says nothing.
            self._moved_s = now_s
        self._beat_before_s = now_s
        moves = self._board.beat(self._activity.look(), moved=self._has_moved(now_s))
        if moves != self._moves:
            self._moves, self._moved_s = moves, now_s
        if (code := self._board.end_code()) is not None:
            self._closed.wait(FAREWELL_S)
            self._leave(code)
        if min(self._activity.waited_s(now_s), now_s - self._moved_s) >= self._patience_s:
            self._tell(self._hang, FAILURE)

    def _hang(self) -> str:
        reports = self._board.reports(self._activity.look(), watch_s=SIGNS_S)
        return hang_message(reports, time.monotonic() - self._moved_s, self._timeout_s)

    def _has_moved(self, now_s: float) -> bool:
        """Whether this process has got further since the beat before."""
        moved = self._activity.last_mark_s > self._beaten_s
        self._beaten_s = now_s
        if now_s - self._counted_s >= min(COMPUTES_S, self._timeout_s / 4):
            cpu_s = _computed_s()
            used = (cpu_s - self._cpu_s) / (now_s - self._counted_s)
            moved = moved or (used > _COMPUTES and self._activity.computes)
            self._cpu_s, self._counted_s = cpu_s, now_s
        return moved

    def _look_after_itself(self) -> None:
        """Set the timer that ends the process should this thread not run any more."""
        if time.monotonic() - self._armed_s > STUCK_S / 3:
            self._arm(self._timeout_s + STUCK_S)
            self._armed_s = time.monotonic()

    def _lost(self) -> str:
        doing = self._activity.look().doing
        return f"{self._board.place} has lost the store by which the ranks met (its machine, or the launcher there), in {doing}"

    def _leave(self, code: int) -> NoReturn:
        """End this process now, whatever its threads and collectives are doing."""
        saving = threading.Thread(target=self._save_buffers, daemon=True)
        saving.start()
        saving.join(BUFFERS_S)
        sys.stdout.flush()
        sys.stderr.flush()
        self._exit(code)
        raise AssertionError("a process that has left goes on")


def _computed_s() -> float:
    """Return the processor time that this process has used for work: not that of the calling thread, nor of the network's."""
    if sys.platform != "linux":
        return time.process_time() - time.thread_time()
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            # The thread has just ended.
            continue
        if int(task.name) != threading.get_native_id() and not name.startswith(_NETWORK):
            user, system = rest.split()[11:13]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def _may_be_a_victim(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, looks as if another rank had gone."""
    while error is not None:
        if isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in _BROKEN):
            return True
        error = error.__cause__ or error.__context__
    return False
