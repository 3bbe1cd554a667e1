"""Where a run goes on: which checkpoint, and what is wrong with one, told as a mistake or as what may pass."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from distill import resume, train
from distill.config import Checkpoint, Config, ConfigError, Gate, Run, Train
from distill.failures import RunFailed
from distill.resume import Start, bring_student, find_checkpoint, leave_other_ways, take_over
from distill.rounds import Progress, lineage_of, rounds_of
from distill.runfolder import check_run_folder, write_config
from distill.stop import Stop
from parallel.checkpoint_folders import folder_of
from parallel.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointOutOfReach,
    Manifest,
    write_manifest,
)
from parallel.mesh import Mesh
from tests.commands.tiny_run import snapshot
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
        start = find_checkpoint(config, MESH)
        assert (start.found, start.progress.step) == (own, 12)


def test_nothing_is_changed_before_a_run_is_known_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by looking for a checkpoint nor by a mistake that the models show; then what is of another way goes."""
    root = tmp_path / "checkpoints"
    first, _, third = (write(root, step) for step in (2, 4, 6))
    write_config(settings(tmp_path))
    before = snapshot(tmp_path)

    def fail(*given: object) -> None:
        raise ConfigError("mesh.tp=3 does not divide num_attention_heads=4 of the teacher")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="mesh.tp=3"):
        patch.setattr(train, "find_models", fail)
        train.run(settings(tmp_path, first), MESH, Stop())
    assert snapshot(tmp_path) == before and capsys.readouterr().out == ""
    leave_other_ways(find_checkpoint(settings(tmp_path, first), MESH), [settings(tmp_path)])
    assert [path.name for path in root.iterdir()] == [first.name]
    told = [
        f"dropped step-0000000{step}: the run goes on from {first.name} on another way" for step in (4, 6)
    ]
    assert capsys.readouterr().out.splitlines() == told
    (write(root, 8) / MANIFEST).write_text("{}")
    leave_other_ways(find_checkpoint(settings(tmp_path), MESH), [settings(tmp_path)])
    assert sorted(path.name for path in root.iterdir()) == [first.name, "step-00000008.damaged"]
    assert ", set aside as step-00000008.damaged" in capsys.readouterr().out
    assert not third.exists()


def test_what_cannot_be_removed_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system", str(self))

    write(tmp_path / "checkpoints", 2)
    damaged = write(tmp_path / "checkpoints", 4)
    (damaged / MANIFEST).write_text("{}")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RunFailed, match=f"^{damaged} cannot be moved or removed \\(Read-only file system\\)"):
        leave_other_ways(find_checkpoint(settings(tmp_path), MESH), [settings(tmp_path)])


REPEATS = Gate(repeat_until=0.1, repeats=2)


@pytest.mark.parametrize(
    ("progress", "gate", "left"),
    [
        (Progress(step=3, round_step=3), Gate(), []),
        (Progress(step=4, round_step=4), Gate(), [1]),
        (Progress(step=4, round_step=4), REPEATS, []),
        (Progress(step=8, round_step=4, attempt=1), REPEATS, [1]),
        (Progress(step=5, round_step=1, round=1), Gate(), [1]),
        (Progress(step=8, round_step=4, round=1), Gate(), [1, 2]),
        (Progress(step=12, round_step=4, round=2), REPEATS, [1, 2]),
    ],
)
def test_cuts_of_another_way_go(progress: Progress, gate: Gate, left: list[int], tmp_path: Path) -> None:
    """Of four rounds of four steps, each with a cut of its own."""
    rounds = tuple({"student": {"prune": {"num_layers": 9 - index}}} for index in range(4))
    config = replace(settings(tmp_path), train=Train(steps=4), gate=gate, rounds=rounds)
    for index in range(1, 4):
        for name in (f"pruned-{index}", f"factored-{index}"):
            (tmp_path / name).mkdir()
    (tmp_path / "pruned").mkdir()
    leave_other_ways(Start(progress=progress), rounds_of(config))
    kept = [f"{name}-{index}" for name in ("factored", "pruned") for index in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["pruned", *kept])


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
