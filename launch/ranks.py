"""Joining the processes of a run, and ending all of them when one fails.

Decides: gloo between CPUs and NCCL between GPUs; one rank tells what went wrong and the others at most one line; a
failing rank leaves by `os._exit`, because an ordinary exit can hang in a collective that will never complete, and
torchrun or the closed connections then end its peers. Assumes torchrun's environment when there is more than one
process. Beside `parallel/` the only file that talks through `torch.distributed`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from distill.config import Config, ConfigError
from launch.environment import FAILURE, USER_ERROR, World
from parallel.mesh import Mesh, coordinates_of

RANK_0_SPEAKS_S = 3.0
"""How long a rank with a user's mistake waits for rank 0 to tell the same, before it tells it itself."""


def choose_device(name: str, world: World) -> torch.device:
    """Return where this rank computes.

    Args:
        name: `run.device`.
    Raises:
        ConfigError: GPUs are asked for and this machine has fewer than it has ranks.
    """
    num_gpus = torch.cuda.device_count()
    if name != "cpu" and num_gpus >= world.local_size:
        return torch.device("cuda", world.local_rank)
    if name == "cuda":
        raise ConfigError(
            f"run.device=cuda needs a GPU for each of the {world.local_size} processes on this machine, which has "
            f"{num_gpus}; use cpu or auto, or start fewer processes"
        )
    if name == "auto" and num_gpus > 0 and world.rank == 0:
        print(f"note: {world.local_size} processes share {num_gpus} GPU on this machine, so the CPU is used")
    return torch.device("cpu")


@contextmanager
def joined(config: Config, world: World) -> Iterator[Mesh]:
    """Give the mesh of all ranks while the block runs.

    With several processes an exception out of the block ends the process: a `ConfigError` with exit code 2, another
    one with 1. With one process there is no group and exceptions pass.

    Args:
        config: checked settings, `mesh.dp` filled in.
    Raises:
        ConfigError: `run.device` cannot be had.
    Collectives: initialises and destroys the default process group.
    """
    device = choose_device(config.run.device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        yield Mesh.single(device)
        return
    timeout = timedelta(seconds=config.train.timeout_s)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    backend = "nccl" if device.type == "cuda" else "gloo"
    groups_store = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups_store, rank=rank, world_size=size, timeout=timeout)
    shape = config.mesh
    here = coordinates_of(rank, dp=shape.dp, tp=shape.tp)
    try:
        yield Mesh.create(pp=shape.pp, dp=shape.dp, tp=shape.tp, device=device)
    except ConfigError as error:
        _leave(f"error: {error}" if _tells_mistake(store, rank) else "", USER_ERROR)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
        place = f"rank {rank} (pp {here.pp}, dp {here.dp}, tp {here.tp})"
        if _is_there(store, "mistake"):
            _leave("", USER_ERROR)
        if _is_first(store, "failure"):
            _leave(f"{place} failed:\n{traceback.format_exc()}", FAILURE)
        _leave(f"{place} ends as well: {type(error).__name__}: {str(error).partition(chr(10))[0]}", FAILURE)
    dist.destroy_process_group()


def _tells_mistake(store: dist.Store, rank: int) -> bool:
    """Whether this rank prints a user's mistake: rank 0 if it sees it in time, otherwise the first that does."""
    deadline_s = time.monotonic() + RANK_0_SPEAKS_S
    while rank != 0 and time.monotonic() < deadline_s:
        if _is_there(store, "mistake"):
            return False
        time.sleep(0.05)
    return _is_first(store, "mistake")


def _is_first(store: dist.Store, key: str) -> bool:
    """Whether no other rank asked this before; a rank that cannot reach the store counts as first."""
    try:
        return store.add(key, 1) == 1
    except dist.DistError:
        return True


def _is_there(store: dist.Store, key: str) -> bool:
    """Whether another rank has set the key; not, when the store cannot be reached."""
    try:
        return store.check([key])
    except dist.DistError:
        return False


def _leave(message: str, code: int) -> NoReturn:
    """End this process now, whatever its threads and collectives are doing."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
