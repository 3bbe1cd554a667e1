"""Threads beside the main one, for work that waits for other ranks or for a disk while the main thread computes.

Decides: work is done in the order in which it was given. Its result, or its error, is for whoever asks the future; of work
that nobody asks about, the error is raised when more is given, at `check` or at `wait`. The threads are daemons: a rank
that fails must be able to leave although a thread still waits for the others (the standard library's pools are joined at
exit without a limit).
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_LEAST_PRIORITY = 19
"""POSIX niceness."""
_CLOSE_S = 5.0
"""How long closing waits: longer than any sound work takes, shorter than a user's patience with a stuck one."""


class Background:
    """A worker thread; `close` lets it end after the work it has.

    Args:
        name: of the thread.
        yields: let the thread compute only while the machine has nothing better to do (Linux; elsewhere as any thread).
    """

    def __init__(self, name: str, *, yields: bool = False) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._unasked: deque[Future[None]] = deque()
        # The number of threads decides the order of sums, and a new thread would take torch's default.
        # And it would begin on the first GPU, where it then made a context.
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        arguments = (self._jobs, torch.get_num_threads(), yields, gpu)
        self._thread = threading.Thread(target=_work, args=arguments, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the thread, after what was given to it before."""
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    def give(self, work: Callable[[], None]) -> None:
        """Run `work` on the thread, after what was given to it before; raise what earlier such work raised."""
        self.check()
        self._unasked.append(self.submit(work))

    def check(self) -> None:
        """Raise what work given by `give` has raised so far."""
        while self._unasked and self._unasked[0].done():
            self._unasked.popleft().result()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all work given by `give` is done, and raise what it raised; after `timeout_s` wait no longer."""
        wait(self._unasked, timeout_s)
        self.check()

    def close(self) -> None:
        """Let the thread end after the work it has, and see it end if that is soon; more work may not be given.

        A thread that still lets go of torch's objects while the interpreter goes down aborts the process.
        """
        self._jobs.put(None)
        self._thread.join(_CLOSE_S)

    def __del__(self) -> None:
        self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Any], num_threads: int, yields: bool, gpu: int | None) -> None:
    torch.set_num_threads(num_threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    if yields and sys.platform == "linux":
        # Only on Linux is the niceness of a thread its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
    while (job := jobs.get()) is not None:
        future, work = job
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks the future gets it)
            future.set_exception(error)
        # What the work holds must not live until the next one comes.
        del job, future, work
