from __future__ import annotations

import pytest
from torch.distributed.launcher.api import LaunchConfig

from launch.environment import SHUTDOWN, World, environment_alone, shutdown_s


def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(rank=0, size=1, local_rank=0, local_size=1)


def test_a_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert World.from_environment() == World(rank=5, size=8, local_rank=1, local_size=4)


def test_a_program_of_its_own_hears_nothing_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME")
    for name in (*words, "RANKING"):
        monkeypatch.setenv(name, "1")
    alone = environment_alone()
    assert not set(words) & set(alone) and alone["RANKING"] == "1" and "PATH" in alone


def test_the_time_to_leave_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHUTDOWN, raising=False)
    assert shutdown_s() == LaunchConfig(1, 1, 1).shutdown_timeout
    monkeypatch.setenv(SHUTDOWN, "7")
    assert shutdown_s() == LaunchConfig(1, 1, 1).shutdown_timeout == 7
