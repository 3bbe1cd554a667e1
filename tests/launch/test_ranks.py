from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from distill.config import Config, ConfigError
from distill.failures import RunFailed
from distill.stop import Stop
from launch import ranks
from launch.environment import World
from launch.ranks import choose_device, joined
from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.executor import ActionFailed


@pytest.mark.parametrize(
    ("name", "num_gpus", "local_size", "device"),
    [
        ("auto", 0, 2, "cpu"),
        ("cpu", 4, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cuda", 4, 2, "cuda:1"),
        ("auto", 1, 2, "cpu"),
    ],
)
def test_devices(
    name: str, num_gpus: int, local_size: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    world = World(rank=1, size=local_size, local_rank=1, local_size=local_size)
    assert choose_device(name, world) == torch.device(device)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8", "a user's own stays"


def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    world = World(size=2, local_size=2)
    with pytest.raises(ConfigError, match="run.device=cuda needs a GPU for each of the 2 processes"):
        choose_device("cuda", world)
    choose_device("auto", world)
    assert capsys.readouterr().out == "note: 2 processes share 1 GPU on this machine, so the CPU is used\n"


def test_a_gpu_that_torch_cannot_use_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    choose_device("auto", World())
    assert not capsys.readouterr().out
    monkeypatch.setattr(ranks, "_DRIVER", tmp_path)
    choose_device("auto", World())
    assert capsys.readouterr().out.startswith(
        "note: the CPU is used; there is a GPU here, but torch was installed without"
    )
    with pytest.raises(ConfigError, match="which has 0; .* but torch was installed without CUDA"):
        choose_device("cuda", World())


@pytest.mark.parametrize(("action", "where"), [(None, ""), (Action(0, Kind.B, 3), " in 0B3")])
def test_memory_that_runs_out_is_one_line(action: Action | None, where: str) -> None:
    ran_out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RunFailed) as caught, joined(Config(), World(), Stop()):
        if action is None:
            raise ran_out
        raise ActionFailed("rank 0 failed at 0B3", action) from ran_out
    assert str(caught.value) == (
        f"rank 0 (pp 0, dp 0, tp 0): GPU memory ran out{where}; use a smaller train.microbatch_size, train.recompute=full, "
        "or more mesh.pp or mesh.tp"
    )
    with pytest.raises(ActionFailed), joined(Config(), World(), Stop()):
        raise ActionFailed("rank 0 failed at 0B3", action) from ValueError("another")
