from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from distill.annealing import Ramp, Stages
from distill.companions import SETTINGS_FILE, companions, read_settings
from distill.config import Config, Hidden, Loss, Run
from parallel.checkpoint_manifest import CheckpointError, CheckpointOutOfReach


@pytest.mark.parametrize(
    "temperature",
    [3.0, Ramp("linear", 4.0, 1.0), Ramp("cosine", 4.0, 1.0), Stages("steps", {0: 4.0, 100: 2.0})],
)
def test_settings_come_back_as_they_were(temperature: float | Ramp | Stages, tmp_path: Path) -> None:
    loss = Loss(temperature=temperature, alpha=Stages("steps", {0: 1.0}), hidden=Hidden(weight=temperature))
    config = Config(loss=loss, run=Run(dir=str(tmp_path / "run")))
    files = companions(config, tmp_path)
    (tmp_path / SETTINGS_FILE).write_bytes(files[SETTINGS_FILE])
    assert read_settings(tmp_path) == config


@pytest.mark.parametrize("body", ["", "[]", '{"0": 4}', json.dumps({"loss": {"temperature": {"0": 4}}})])
def test_settings_that_are_none_are_told(body: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text(body)
    with pytest.raises(CheckpointError, match=f"{SETTINGS_FILE} cannot be read: "):
        read_settings(tmp_path)


def test_settings_that_the_system_refuses_are_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="settings.json cannot be read: it is not there") as caught:
        read_settings(tmp_path)
    assert not isinstance(caught.value, CheckpointOutOfReach)

    def refuse(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(self))

    (tmp_path / SETTINGS_FILE).write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointOutOfReach, match="settings.json cannot be read: Input/output error"):
        read_settings(tmp_path)
