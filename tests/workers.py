"""Run a function on N gloo processes, quickly, for tests.

Decides: the worker processes live as long as the test session (importing torch and transformers costs seconds on two
cores), each call makes a fresh process group over a file store, and a call that overruns its time kills the workers,
so that a deadlock in one test cannot reach the next. They end with the session, killed or not. Does not capture
output: a worker's stderr is the session's.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from launch.benchmarks._crew import end_with_parent


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    end_with_parent()
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        fn, args, store, rank, world_size, timeout_s = job
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            try:
                result = fn(*args)
            finally:
                dist.destroy_process_group()
            pipe.send((True, result))
        except BaseException:  # noqa: BLE001 (the worker must report anything, SystemExit of a command included)
            pipe.send((False, traceback.format_exc()))


class WorkerError(AssertionError):
    """A rank of a distributed test failed; the message holds its traceback."""


class _Pool:
    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []

    def grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def kill(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers.clear()


_pool = _Pool()
atexit.register(_pool.kill)


def run_distributed(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call top-level `fn(*args)` on `world_size` gloo ranks and return the results by rank.

    Args:
        world_size: number of processes; the default process group is initialised when `fn` starts.
        fn: importable function; `args` and the result are pickled, so return plain tensors, numbers and strings.
        timeout_s: seconds for the whole call.
    Raises:
        WorkerError: a rank raised (its traceback is shown) or the time ran out.
    """
    _pool.grow(world_size)
    folder = tempfile.mkdtemp(prefix="reflux-test-")
    store = os.path.join(folder, "store")
    pipes = [pipe for _, pipe in _pool.workers[:world_size]]
    for rank, pipe in enumerate(pipes):
        pipe.send((fn, args, store, rank, world_size, timeout_s))
    results: list[Any] = [None] * world_size
    failures: list[str] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting:
        # Once a rank has failed its peers hang in a collective: give them a moment to say more, no longer.
        ready = wait(waiting, timeout=2 if failures else max(0.0, deadline - time.monotonic()))
        if not ready:
            failures += [f"rank {rank}: no answer" for rank in waiting.values()]
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if ok:
                results[rank] = value
            else:
                failures.append(f"rank {rank}:\n{value}")
    if failures:
        _pool.kill()
        raise WorkerError("\n".join(failures))
    return results
