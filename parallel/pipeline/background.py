"""One thread beside the main one, for work that waits for other ranks while the main thread computes.

Decides: work is done in the order in which it was given; its result, or its error, is for whoever asks the future.
The thread is a daemon: a rank that fails must be able to leave although the thread still waits for the others (the
standard library's pools are joined at exit).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Background:
    """A worker thread; `close` lets it end after the work it has."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        # The number of threads decides the order of sums, and a new thread would take torch's default.
        arguments = (self._jobs, torch.get_num_threads())
        threading.Thread(target=_work, args=arguments, name=name, daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the thread, after what was given to it before."""
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    def close(self) -> None:
        """Let the thread end; more work may not be given."""
        self._jobs.put(None)

    def __del__(self) -> None:
        self.close()


def _work(jobs: queue.SimpleQueue[Any], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    while (job := jobs.get()) is not None:
        future, work = job
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks the future gets it)
            future.set_exception(error)
        # What the work holds must not live until the next one comes.
        del job, future, work
