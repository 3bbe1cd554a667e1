"""The command line of the export: what must be given, what is refused before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distill.config import ConfigError
from launch import export
from launch.command import run_alone
from parallel.checkpoint_manifest import CheckpointOutOfReach


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=b"], "checkpoint=FOLDER must be given; python -m launch.export checkpoint="),
        (["checkpoint=a"], "out=FOLDER must be given"),
        (["checkpoint=3", "out=b"], "checkpoint=FOLDER must be given"),
        (["checkpoint=a", "out=b", "train.steps=3"], "there is no key train.steps here; use checkpoint, out, and"),
        (["checkpoint=a", "out=b", "export.low_rang=merged"], "there is no key export.low_rang; did you mean export.low_rank"),
        (["checkpoint=a", "out=b", "export.low_rank=dense"], "export.low_rank=dense is not known; use merged or factored"),
        (["checkpoint"], "the argument checkpoint is not an override"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export.export(arguments)
    assert message in str(caught.value)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    export.export(["--help"])
    assert "python -m launch.export checkpoint=" in capsys.readouterr().out


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    arguments = [f"checkpoint={tmp_path}", f"out={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=f"checkpoint={tmp_path}: {tmp_path} is no checkpoint"):
        export.export(arguments)
    with pytest.raises(ConfigError, match=f"out={tmp_path} exists already"):
        export.export([f"checkpoint={tmp_path}", f"out={tmp_path}"])


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device", "b/file")

    monkeypatch.setattr("distill.deploy.from_checkpoint.export_checkpoint", fail)
    with pytest.raises(SystemExit) as caught:
        export.export(["checkpoint=a", "out=b"])
    assert caught.value.code == 1
    assert (
        capsys.readouterr().err
        == "failed: out=b could not be written: [Errno 28] No space left on device: 'b/file'\n"
    )


def test_a_checkpoint_out_of_reach_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object) -> None:
        raise CheckpointOutOfReach("a/manifest.json cannot be read: Stale file handle")

    monkeypatch.setattr("distill.deploy.from_checkpoint.verify", fail)
    monkeypatch.setattr(sys, "argv", ["export", "checkpoint=a", f"out={tmp_path / 'out'}"])
    assert run_alone(export.export) == 1
    told = "failed: checkpoint=a: a/manifest.json cannot be read: Stale file handle\n"
    assert capsys.readouterr().err == told
