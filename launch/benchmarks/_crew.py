"""Processes that run a benchmark's jobs together, one job after the other, and never outlive it.

Decides: a job that fails or overruns its time costs its own result only. Its processes are killed, since their peers would
wait for ever, and new ones take the next job. A parent that dies leaves no process behind either.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

Begin = Callable[[], Callable[[Any], Any]]
"""Called once on each process of a new group; returns what runs a job there."""

_START_S = 300.0


class CrewError(RuntimeError):
    """A job that did not come to its end; the message says why."""


@dataclass
class Crew:
    """The processes of one gloo group, by rank."""

    workers: list[tuple[BaseProcess, Connection]]

    @staticmethod
    @contextmanager
    def start(size: int, begin: Begin) -> Iterator[Crew]:
        """Start the processes, and end them whatever happens.

        Args:
            size: ranks of the group.
            begin: importable function, run on each of them.
        Raises:
            CrewError: they did not start.
        """
        context = multiprocessing.get_context("spawn")
        with ExitStack() as stack:
            store = stack.enter_context(tempfile.TemporaryDirectory()) + "/store"
            crew = Crew([])
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (begin, theirs, store, rank, size)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                stack.callback(_end, process, ours)
                process.start()
                theirs.close()
                crew.workers.append((process, ours))
            crew._answers(_START_S)
            yield crew

    def run(self, job: Any, limit_s: float) -> list[Any]:
        """Run a job on all ranks; return their results by rank.

        Raises:
            CrewError: a rank failed, or the time was over; the crew is of no use any more.
        """
        for _, pipe in self.workers:
            pipe.send(job)
        return self._answers(limit_s)

    def _answers(self, limit_s: float) -> list[Any]:
        deadline = time.monotonic() + limit_s
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers)}
        results: list[Any] = [None] * len(waiting)
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise CrewError(
                    f"no answer of rank {', '.join(map(str, waiting.values()))} in {limit_s:.0f} s"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    problem, results[rank] = pipe.recv()
                except EOFError:
                    problem = "the process ended"
                if problem:
                    raise CrewError(f"rank {rank}: {problem}")
        return results


def run_jobs(
    jobs: Sequence[Any], *, size: int, begin: Begin, limit_s: Callable[[Any], float]
) -> Iterator[tuple[Any, list[Any] | str]]:
    """Yield each job with its results by rank, or with the reason why it has none.

    Args:
        jobs: what `begin()(job)` takes on every rank, in this order.
        size: ranks.
        begin: see `Begin`; importable.
        limit_s: seconds that a job may take.
    """
    left = list(jobs)
    while left:
        with Crew.start(size, begin) as crew:
            while left:
                job = left.pop(0)
                try:
                    results = crew.run(job, limit_s(job))
                except CrewError as error:
                    yield job, str(error)
                    break
                yield job, results


def say(text: str) -> None:
    """Tell how far the benchmark is; its result is for stdout."""
    print(text, file=sys.stderr, flush=True)


def _end(process: BaseProcess, pipe: Connection) -> None:
    pipe.close()
    if process.pid is not None:
        process.kill()
        process.join()


def end_with_parent() -> None:
    """Let this spawned process end as soon as the one that spawned it has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(begin: Begin, pipe: Connection, store: str, rank: int, size: int) -> None:
    # An interrupt reaches the whole terminal; the parent answers it for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
    run: Callable[[Any], Any] | None = None
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        run = begin()
        pipe.send((None, None))
        while True:
            pipe.send((None, run(pipe.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException as error:  # noqa: BLE001 (the parent must hear of anything)
        traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {error}".splitlines()[0], None))
