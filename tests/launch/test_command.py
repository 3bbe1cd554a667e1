from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import Config, ConfigError
from launch import distill, evaluate, prune
from launch.command import RANK_0_SPEAKS_S, Command, run_command

READY = ["teacher=embedded", "data=pydoc", "log.wandb=disabled"]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Put the signal handling of this process back, which a command takes over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    yield
    signal.set_wakeup_fd(descriptor)
    for number, handler in before.items():
        signal.signal(number, handler)


def command(run: Any = lambda config, mesh, stop: None, **more: Any) -> Command:
    return Command(usage="python -m launch.something", about="does something", run=run, **more)


def test_a_command_gets_checked_settings_and_a_mesh() -> None:
    seen = []
    assert run_command(command(lambda *given: seen.append(given)), READY) == 0
    ((config, mesh, stop),) = seen
    assert config.mesh.dp == 1 and mesh.world.size == 1 and not stop.requested


def test_help_and_settings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    never = command(run=None, check=None)
    assert run_command(never, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("python -m launch.something: does something\n")
    assert run_command(never, ["experiment=quickstart", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["dir"] == "runs/quickstart"


def refuse(config: Config) -> None:
    raise ConfigError("run.dir=x is taken; use another one")


def fail(*given: Any) -> None:
    raise ConfigError("data.path=x holds no text; use another one")


@pytest.mark.parametrize(
    ("arguments", "given", "line"),
    [
        (["train.stepz=3"], {}, "error: there is no key train.stepz; did you mean train.steps?"),
        (["mesh.tp=2"], {}, "error: mesh.pp=1 x mesh.tp=2 = 2 does not divide the number of processes, 1; start"),
        (["teacher.model=null"], {}, "error: teacher.model=null must be given; use a hub id"),
        ([], {"check": refuse}, "error: run.dir=x is taken; use another one"),
        ([], {"run": fail}, "error: data.path=x holds no text; use another one"),
        (["run.device=cuda"], {}, "error: run.device=cuda needs a GPU for each of the 1 processes on this machine"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    given: dict[str, Any],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run_command(command(**given), [*READY, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(line) and shown.err.count("\n") == 1 and shown.out == ""


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(command(), ["--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_another_rank_lets_rank_0_tell_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends rank 0 too when another rank leaves first, perhaps before rank 0 has told anything."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    monkeypatch.setattr(time, "sleep", lambda seconds: said.append((seconds, capsys.readouterr().err)))
    assert run_command(command(), ["train.stepz=3"]) == 2
    assert said == [(RANK_0_SPEAKS_S, "")], "it waits, and has said nothing yet"
    assert capsys.readouterr().err.startswith("error: there is no key train.stepz"), (
        "it alone saw the mistake"
    )


def test_a_bug_is_not_taken_for_a_mistake() -> None:
    def bug(*given: Any) -> None:
        raise KeyError("no one expected this")

    with pytest.raises(KeyError):
        run_command(command(bug), READY)


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys; from launch.distill import COMMAND; from launch.command import run_command; "
        "code = run_command(COMMAND, ['train.stepz=3']); print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 False False\n"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for one in (distill.COMMAND, prune.COMMAND, evaluate.COMMAND):
        assert run_command(one, ["--help"]) == 0
        assert one.about in capsys.readouterr().out
    (tmp_path / "student").mkdir()
    assert run_command(prune.COMMAND, [*READY, f"run.dir={tmp_path}"]) == 2
    assert "already holds a student; use another run.dir" in capsys.readouterr().err
    assert run_command(evaluate.COMMAND, []) == 2
    assert "teacher.model=null must be given; use a hub id, a folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("loss: {alpha: 0.9}\n")
    assert run_command(distill.COMMAND, [*READY, f"run.dir={tmp_path}"]) == 2
    assert f"error: run.dir={tmp_path} holds a run with " in capsys.readouterr().err
