"""wandb that fails, hangs or is not there; what it gets when all is well is in `test_metrics.py`."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill import dashboard
from distill.config import Config, Log, MeshShape, Run, Train
from distill.metrics import RunLog
from tests.distill.test_metrics import numbers


class Fake:
    """Stands in for a wandb run."""

    id, summary = "abc", {}

    def __init__(self, trouble: Any = None) -> None:
        self.trouble, self.logged, self.ends = trouble, [], []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.trouble is not None and step == 2:
            self.trouble()
        self.logged.append(step)

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


def config_in(folder: Path, mode: str) -> Config:
    mesh = MeshShape(pp=1, dp=1, tp=1)
    return Config(mesh=mesh, run=Run(dir=str(folder)), log=Log(wandb=mode), train=Train(global_batch_size=4))


def run_of(folder: Path, mode: str, *, steps: int = 4) -> list[int]:
    """Log a run and return the steps in `metrics.jsonl`."""
    with RunLog(config_in(folder, mode), writes=True) as log:
        for step in range(1, steps + 1):
            log.step(numbers(step), total_steps=steps)
        log.finish({"table": []})
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_online_without_a_server_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    modes, fake = [], Fake()

    def init(mode: str, **settings: Any) -> Fake:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.UsageError("No API key configured.\nUse wandb login.")
        return fake

    monkeypatch.setattr(wandb, "init", init)
    assert run_of(tmp_path, "online") == [1, 2, 3, 4]
    assert modes == ["online", "offline"] and fake.logged[:4] == [1, 2, 3, 4] and fake.ends == [0]
    err = capsys.readouterr().err
    assert err == "warning: log.wandb=online did not start (No API key configured.); it goes on offline\n"


def test_wandb_that_does_not_work_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def init(**settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", init)
    assert run_of(tmp_path, "online") == [1, 2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].endswith("No space left on device); the run goes on without")


def test_a_log_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise BrokenPipeError("the service is dead")

    fake = Fake(fail)
    monkeypatch.setattr("wandb.init", lambda **settings: fake)
    assert run_of(tmp_path, "online") == [1, 2, 3, 4]
    assert fake.logged == [1] and fake.ends == []
    err = capsys.readouterr().err
    assert err == "warning: wandb takes no more numbers (the service is dead); metrics.jsonl has them all\n"


def test_a_log_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    monkeypatch.setattr("wandb.init", lambda **settings: Fake(lambda: gate.wait(60)))
    monkeypatch.setattr(dashboard, "_OPEN_S", 0.1)
    monkeypatch.setattr(dashboard, "_FINISH_S", 0.1)
    monkeypatch.setattr(dashboard, "_PATIENCE_S", 0.1)
    begin_s = time.monotonic()
    with RunLog(config_in(tmp_path, "online"), writes=True) as log:
        for step in (1, 2, 3):
            log.step(numbers(step), total_steps=3)
        log.flush()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert time.monotonic() - begin_s < 20
    gate.set()
    assert "warning: wandb did not come to an end" in capsys.readouterr().err


def test_the_end_waits_for_less_than_the_other_ranks_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    monkeypatch.setattr("wandb.init", lambda **settings: Fake(lambda: gate.wait(60)))
    config = config_in(tmp_path, "online")
    with RunLog(replace(config, train=replace(config.train, timeout_s=0.5)), writes=True) as log:
        for step in (1, 2):
            log.step(numbers(step), total_steps=2)
    gate.set()
    assert "warning: wandb did not come to an end in 0.25 s" in capsys.readouterr().err


def test_opening_holds_nothing_up_and_nothing_is_lost_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, fake = threading.Event(), Fake()

    def init(**settings: Any) -> Fake:
        assert gate.wait(60)
        return fake

    monkeypatch.setattr("wandb.init", init)
    with RunLog(config_in(tmp_path, "online"), writes=True) as log:
        for step in (1, 2, 3):
            log.step(numbers(step), total_steps=3)
        log.flush()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3 and not fake.logged
        gate.set()
        log.finish({"table": []})
    assert fake.logged[:3] == [1, 2, 3] and fake.ends == [0]


@pytest.mark.slow
def test_the_real_wandb_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboard, "_OPEN_S", 10)
    # A port where nobody listens, and a key that looks like one.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert run_of(tmp_path, "online") == [1, 2, 3, 4]
    assert "it goes on offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_the_real_wandb_whose_process_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_s = time.monotonic()
    with RunLog(config_in(tmp_path, "offline"), writes=True) as log:
        log.step(numbers(1), total_steps=40)
        log.flush()
        time.sleep(1)
        for pid in _children("wandb-core"):
            os.kill(pid, 9)
        for step in range(2, 41):
            log.step(numbers(step), total_steps=40)
            time.sleep(0.05)
        log.finish({"table": []})
    assert time.monotonic() - begin_s < 120
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40
    assert "warning: wandb" in capsys.readouterr().err


def _children(name: str) -> list[int]:
    """Return the processes of this name that this one has started, itself or through others."""
    found, parents = [], {os.getpid()}
    stats = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:
                continue
            comm, _, rest = text.partition("(")[2].rpartition(")")
            stats.append((int(folder.name), comm, int(rest.split()[1])))
    for _ in range(4):
        parents |= {pid for pid, _, parent in stats if parent in parents}
    found = [pid for pid, comm, _ in stats if pid in parents and name in comm]
    assert found, [each for each in stats if "wandb" in each[1]]
    return found
