"""Joining the processes of a run, and ending all of them when one fails.

Decides: gloo between CPUs and NCCL between GPUs; the ranks watch each other from when they have met (`launch.watch`), and the
process groups' own limits are out of the way. Assumes torchrun's environment when there is more than one process.
Beside `parallel/`, the launcher and the benchmarks the only file that imports `torch.distributed`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distill.config import Config, ConfigError
from distill.failures import RunFailed
from distill.stop import Stop
from launch.board import Board
from launch.environment import FAILURE, World
from launch.meeting import Absent, meet
from launch.watch import Watch
from parallel.activity import Activity
from parallel.mesh import PATIENCE, Mesh, coordinates_of
from parallel.pipeline.executor import ActionFailed

_DRIVER = Path("/proc/driver/nvidia/version")
_WITHOUT_CUDA = "there is a GPU here, but torch was installed without CUDA: bash launch/install.sh on a machine with a GPU mends that"


def choose_device(name: str, world: World) -> torch.device:
    """Return where this rank computes.

    Args:
        name: `run.device`.
    Raises:
        ConfigError: GPUs are asked for and this machine has fewer than it has ranks.
    """
    num_gpus = torch.cuda.device_count()
    if name != "cpu" and num_gpus >= world.local_size:
        # Each message, sum and lane is to be on its way without another before it in the same queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        return torch.device("cuda", world.local_rank)
    hidden = torch.version.cuda is None and _DRIVER.exists()
    if name == "cuda":
        raise ConfigError(
            f"run.device=cuda needs a GPU for each of the {world.local_size} processes on this machine, which has "
            f"{num_gpus}; use cpu or auto, or start fewer processes"
            + (f" ({_WITHOUT_CUDA})" if hidden else "")
        )
    if name == "auto" and hidden and world.rank == 0:
        print(f"note: the CPU is used; {_WITHOUT_CUDA}")
    if name == "auto" and num_gpus > 0 and world.rank == 0:
        print(f"note: {world.local_size} processes share {num_gpus} GPU on this machine, so the CPU is used")
    return torch.device("cpu")


@contextmanager
def joined(config: Config, world: World, stop: Stop) -> Iterator[Mesh]:
    """Give the mesh of all ranks while the block runs.

    With several processes an exception out of the block ends the process: a `ConfigError` with exit code 2, another
    one with 1. With one process there is no group and exceptions pass.

    Args:
        config: checked settings, `mesh.dp` filled in.
        stop: holds what must be saved before the process leaves.
    Raises:
        ConfigError: `run.device` cannot be had.
        RunFailed: in a single process, its GPU's memory ran out.
    Collectives: initialises and destroys the default process group.
    """
    device = choose_device(config.run.device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        mesh = Mesh.single(device)
        with _memory_told(mesh):
            yield mesh
        return
    timeout = timedelta(seconds=config.train.timeout_s)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    places = _places(config, size)
    try:
        name = meet(
            store, places, rank=rank, timeout_s=config.train.timeout_s, stopped=lambda: stop.requested
        )
    except Absent as error:
        print(
            f"failed: {error}" if str(error) else "",
            file=sys.stderr,
            end="\n" if str(error) else "",
            flush=True,
        )
        os._exit(FAILURE)
    activity = Activity(asynchronous=device.type == "cuda")
    watch = Watch(
        Board(dist.PrefixStore(f"{name}/board", store.clone()), places, rank=rank),
        activity,
        timeout_s=config.train.timeout_s,
        save_buffers=stop.save_buffers,
    )
    store.set_timeout(PATIENCE)
    groups_store = dist.PrefixStore(f"{name}/groups", store)
    try:
        mesh = _connect(config, groups_store, rank, size, device, activity)
        with _memory_told(mesh):
            yield mesh
    except ConfigError as error:
        watch.end_by_mistake(error, speaks_first=rank == 0)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
        watch.end_by_failure(error)
    watch.close()
    dist.destroy_process_group()


@contextmanager
def _memory_told(mesh: Mesh) -> Iterator[None]:
    """Turn the error of a GPU whose memory has run out in the block into a line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        where = f" in {error.action}" if isinstance(error, ActionFailed) else ""
        raise RunFailed(
            f"{mesh.describe()}: GPU memory ran out{where}; use a smaller train.microbatch_size, train.recompute=full, or more "
            "mesh.pp or mesh.tp"
        ) from error


def _connect(
    config: Config, store: dist.Store, rank: int, size: int, device: torch.device, activity: Activity
) -> Mesh:
    """Make the process groups of all ranks."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with activity.waiting("all ranks to come", range(size)):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    shape = config.mesh
    return Mesh.create(pp=shape.pp, dp=shape.dp, tp=shape.tp, device=device, activity=activity)


def _places(config: Config, size: int) -> list[str]:
    """Return every rank's place, as words."""
    places = (coordinates_of(rank, dp=config.mesh.dp, tp=config.mesh.tp) for rank in range(size))
    return [f"rank {rank} (pp {at.pp}, dp {at.dp}, tp {at.tp})" for rank, at in enumerate(places)]
