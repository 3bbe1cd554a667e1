"""Where a run goes on: which checkpoint, and what is wrong with one, told as a mistake or as what may pass."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from distill import resume
from distill.config import Checkpoint, Config, ConfigError, Run
from distill.failures import RunFailed
from distill.resume import bring_student, find_checkpoint, take_over
from distill.rounds import Progress, lineage_of
from distill.runfolder import check_run_folder, write_config
from parallel.checkpoint_folders import folder_of
from parallel.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointOutOfReach,
    Manifest,
    write_manifest,
)
from parallel.mesh import Mesh
from tests.workers import run_distributed

MESH = Mesh.single()


def settings(folder: Path, choice: object = "auto") -> Config:
    return Config(run=Run(dir=str(folder)), checkpoint=Checkpoint(resume=str(choice)))


def write(folder: Path, step: int, **progress: int) -> Path:
    """Write a checkpoint without tensors."""
    place = folder_of(folder, step)
    place.mkdir(parents=True)
    extras = asdict(Progress(step=step, **{"round_step": step, **progress}))
    write_manifest(Manifest(step, step, {"mesh.pp": 1}, {}, {}, extras), place)
    return place


def test_a_run_goes_on_from_its_own_when_the_one_it_began_with_has_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = write(run / "checkpoints", 12)
    for gone in (tmp_path / "other" / "step-00000010", run / "checkpoints" / "step-00000002"):
        config = settings(run, gone)
        write_config(config)
        check_run_folder(config)
        found, progress = find_checkpoint(config, MESH)
        assert (found, progress.step) == (own, 12)


def test_own_checkpoints_of_which_none_is_sound_are_told_with_what_was_asked_for(tmp_path: Path) -> None:
    run, other = tmp_path / "run", write(tmp_path / "other", 10)
    (write(run / "checkpoints", 12) / MANIFEST).write_text("{}")
    write_config(settings(run, other))
    with pytest.raises(ConfigError, match=f"^checkpoint.resume={other}: no checkpoint in .* is sound"):
        find_checkpoint(settings(run, other), MESH)


@pytest.mark.parametrize(
    ("error", "told", "words"),
    [
        (CheckpointOutOfReach, RunFailed, "^a.safetensors is gone; the same command tries again; a checkpoint that"),
        (CheckpointError, ConfigError, "^checkpoint.resume=auto: a.safetensors is gone$"),
    ],
)  # fmt: skip
def test_what_is_found_while_it_is_restored_is_told_as_what_it_is(
    error: type[Exception],
    told: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise error("a.safetensors is gone")

    monkeypatch.setattr(resume.checkpoint, "restore", fail)
    session = SimpleNamespace(step=SimpleNamespace(optimizer=None, mesh=MESH))
    with pytest.raises(told, match=words):
        take_over(tmp_path, settings(tmp_path), session, begins=False, recut=False)  # type: ignore[arg-type]


def _told_of_a_student(folder: Path) -> str:
    """Return what this rank is told when the first cannot read the settings beside a student."""
    config = settings(folder / "run")

    def fail(found: Path) -> Config:
        raise CheckpointOutOfReach(f"{found} cannot be read")

    with mock.patch.object(resume, "read_settings", fail), pytest.raises(RunFailed) as caught:
        bring_student(folder, config, lineage_of([config], 0), Mesh.create(pp=1, dp=2, tp=1))
    return str(caught.value)


def test_a_student_out_of_reach_is_told_on_every_rank(tmp_path: Path) -> None:
    first, second = run_distributed(2, _told_of_a_student, tmp_path)
    assert first == second and first.startswith(f"{tmp_path} cannot be read; the same command tries again")
