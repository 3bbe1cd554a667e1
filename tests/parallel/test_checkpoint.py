"""Checkpoints: bit for bit back, complete or absent, and every broken one named on every rank."""

from __future__ import annotations

import errno
import resource
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.step import DistillationStep
from parallel.checkpoint import Saver, read_together, restore
from parallel.checkpoint_files import CheckpointFiles, write_shards
from parallel.checkpoint_folders import complete_checkpoints, newest_sound
from parallel.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointOutOfReach,
    Manifest,
    read_manifest,
    write_manifest,
)
from parallel.hashed_files import FileRecord
from parallel.mesh import Mesh
from tests.equivalence.trajectory import (
    SINGLE,
    Case,
    make_step,
    mesh_of,
    save_models,
    save_now,
    state_of,
    train,
)
from tests.parallel.forged import edit_manifest, rewrite
from tests.workers import run_distributed

EXTRAS = {"tokens": 123, "prune_s": 0.25}
FILE = "stage-000-tp-00.safetensors"
OTHER = ("another student",)
TWO_RANKS = [
    replace(SINGLE, pp=2, student="tied"),
    replace(SINGLE, tp=2, student="tied", schedule="gpipe"),
    replace(SINGLE, dp=2, student="untied"),
    replace(SINGLE, pp=2, virtual_stages=2, student="deep", schedule="interleaved"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _latest(root: Path, mesh: Mesh) -> Path | None:
    sound, _ = newest_sound(root, mesh)
    return None if sound is None else sound.folder


def _differ(step: DistillationStep, expected: dict[str, torch.Tensor]) -> list[str]:
    state = state_of(step)
    assert state.keys() == expected.keys()
    return [name for name, value in state.items() if not torch.equal(value, expected[name])]


def _interrupted(cases: list[Case], folders: dict[str, str], root: Path) -> list[list[str]]:
    """Train four steps at once; two, save, restore into a fresh student, two more; return what differs."""
    results = []
    for number, case in enumerate(cases):
        mesh = mesh_of(case)
        uninterrupted, first, second = (make_step(case, folders, mesh) for _ in range(3))
        expected = train(uninterrupted, range(4))
        assert _latest(root / str(number), mesh) is None
        done = train(first, range(2))
        folder = save_now(root / str(number), 2, first.optimizer, mesh, extras=EXTRAS, keep=1)
        assert _latest(root / str(number), mesh) == folder
        saved = state_of(first)
        assert _differ(second, saved), "a fresh student must differ before"
        manifest = restore(folder, second.optimizer, mesh)
        assert (manifest.step, manifest.extras) == (2, EXTRAS)
        assert manifest.layout == {
            "mesh.pp": case.pp,
            "mesh.tp": case.tp,
            "pipeline.virtual_stages": case.virtual_stages,
        }
        assert second.optimizer.num_updates == 2
        differ = _differ(second, saved)
        done += train(second, range(2, 4))
        differ += [f"later {name}" for name in _differ(second, state_of(uninterrupted))]
        for each in (uninterrupted, first, second):
            each.close()
        for mine, other in zip(done, expected, strict=True):
            if (mine.total, mine.grad_norm) != (other.total, other.grad_norm):
                differ.append(f"{mine} against {other}")
        results.append(differ)
    return results


def test_an_interrupted_run_goes_on_bit_for_bit(folders: dict[str, str], tmp_path: Path) -> None:
    ranks = run_distributed(2, _interrupted, TWO_RANKS, folders, tmp_path)
    assert ranks == [[[], [], [], []]] * 2
    written = {
        number: {path.name for path in (tmp_path / number / "step-00000002").iterdir()} for number in "0123"
    }
    assert written["0"] == {MANIFEST, "stage-000-tp-00.safetensors", "stage-001-tp-00.safetensors"}
    assert written["1"] == {MANIFEST, "stage-000-tp-00.safetensors", "stage-000-tp-01.safetensors"}
    second = "stage-000-tp-00-dp-01.safetensors"
    assert written["2"] == {MANIFEST, FILE, second}, "each replica writes its part"
    assert written["3"] == written["0"], "one file a rank, whatever the number of its stages"
    tied = load_file(tmp_path / "0" / "step-00000002" / "stage-001-tp-00.safetensors")
    assert not any("embed_tokens" in name for name in tied), "one end of a tie writes"


@pytest.mark.slow
def test_four_ranks(folders: dict[str, str], tmp_path: Path) -> None:
    cases = [
        replace(SINGLE, pp=2, dp=2, num_microbatches=2),
        replace(SINGLE, pp=2, tp=2, num_microbatches=1),
    ]
    assert run_distributed(4, _interrupted, cases, folders, tmp_path) == [[[], []]] * 4
    assert len(list((tmp_path / "0" / "step-00000002").iterdir())) == 5
    assert len(list((tmp_path / "1" / "step-00000002").iterdir())) == 5


def test_bf16_parameters_follow_the_restored_master(folders: dict[str, str], tmp_path: Path) -> None:
    first, second = (make_step(SINGLE, folders, Mesh.single(), dtype=torch.bfloat16) for _ in range(2))
    train(first, range(2))
    restore(
        save_now(tmp_path, 2, first.optimizer, first.mesh, extras={}, keep=1), second.optimizer, second.mesh
    )
    assert not _differ(second, state_of(first))
    assert load_file(tmp_path / "step-00000002" / FILE)["weight/model.norm.weight"].dtype == torch.float32


@pytest.fixture(scope="module")
def step(folders: dict[str, str]) -> DistillationStep:
    """A single process after one step, so that no moment is zero."""
    step = make_step(SINGLE, folders, Mesh.single())
    train(step, range(1))
    return step


@pytest.fixture
def saved(step: DistillationStep, tmp_path: Path) -> Path:
    return save_now(tmp_path, 7, step.optimizer, step.mesh, extras=EXTRAS, keep=3)


def test_the_newest_complete_one_wins_and_the_oldest_go(step: DistillationStep, tmp_path: Path) -> None:
    root, mesh = tmp_path / "run" / "checkpoints", step.mesh
    assert _latest(root, mesh) is None and complete_checkpoints(root) == []

    def write(number: int, keep: int) -> Path:
        return save_now(root, number, step.optimizer, mesh, extras={}, keep=keep)

    for number in (2, 9, 10, 100):
        assert write(number, 3) == _latest(root, mesh) == root / f"step-{number:08d}"
    assert [path.name for path in complete_checkpoints(root)] == [
        f"step-{number:08d}" for number in (9, 10, 100)
    ]
    # Neither what a killed run left behind, nor a folder whose manifest never came.
    shutil.copytree(root / "step-00000100", root / "step-00000200.partial")
    shutil.copytree(root / "step-00000100", root / "step-00000300")
    (root / "step-00000300" / MANIFEST).unlink()
    assert _latest(root, mesh) == root / "step-00000100"
    write(200, 1)
    assert not list(root.glob("*.partial"))
    assert complete_checkpoints(root) == [root / "step-00000200"]
    assert read_manifest(root / "step-00000200").step == 200


def test_a_step_saved_again_replaces_the_old_one(step: DistillationStep, saved: Path) -> None:
    (saved / "left over").write_text("x")
    again = save_now(saved.parent, 7, step.optimizer, step.mesh, extras={"round": 1}, keep=3)
    assert again == saved and not (saved / "left over").exists()
    assert read_manifest(saved).extras == {"round": 1}


def test_nothing_is_complete_before_the_files_are_written(
    step: DistillationStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full costs the checkpoint; a mistake of the program ends the run."""

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a/file")

    save_now(tmp_path, 1, step.optimizer, step.mesh, extras={}, keep=1)
    with Saver(tmp_path, step.optimizer, step.mesh, keep=1) as saver:
        with monkeypatch.context() as patch:
            patch.setattr("parallel.checkpoint.write_shards", fail)
            saver.save(2, {})
            saver.wait()
        told = "the checkpoint of step 2 could not be written: rank 0 (pp 0, dp 0, tp 0): a/file: No space left on device"
        assert saver.failure == told and saver.newest is None and saver.check() == [told]
        assert saver.check() == []
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "the one before stays"
        saver.save(3, {})
        saver.wait()
        assert saver.failure is None and saver.check() == []
        assert saver.newest == _latest(tmp_path, step.mesh) == tmp_path / "step-00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    monkeypatch.setattr("parallel.checkpoint.write_shards", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_now(tmp_path, 4, step.optimizer, step.mesh, extras={}, keep=1)
    assert complete_checkpoints(tmp_path) == [tmp_path / "step-00000003"]


@pytest.mark.parametrize(
    ("file", "limit_bytes", "whole"),
    [(FILE, 1000, True), ("student/tokenizer.json", 1000, False), (MANIFEST, 300, False)],
)
def test_a_full_disk_is_met_at_every_file(
    file: str,
    limit_bytes: int,
    whole: bool,
    step: DistillationStep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors, companions, manifest: the system lets none grow beyond a limit."""
    if not whole:
        few = {"weight/a": torch.zeros(3)}
        monkeypatch.setattr(
            "parallel.checkpoint.write_shards",
            lambda tensors, shards, path, spans: write_shards(few, {}, path),
        )
    companions = {"student/tokenizer.json": b"x" * (100 if file == MANIFEST else 3000)}
    before = save_now(tmp_path, 1, step.optimizer, step.mesh, extras={}, keep=1)
    real = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Saver(tmp_path, step.optimizer, step.mesh, keep=1, companions=companions) as saver:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, real[1]))
        try:
            saver.save(5, {})
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, real)
        assert f"/step-00000005.partial/{file}: File too large" in (saver.failure or "")
    assert list(tmp_path.iterdir()) == [before], "the oldest goes only when the newest is complete"


def _fails_on_one(folders: dict[str, str], root: Path, failing: int, function: str) -> list[Any]:
    case = replace(SINGLE, pp=2)
    mesh = mesh_of(case)
    step = make_step(case, folders, mesh)
    save_now(root, 1, step.optimizer, mesh, extras={}, keep=2)
    with Saver(root, step.optimizer, mesh, keep=2) as saver, pytest.MonkeyPatch.context() as patch:

        def fail(*given: Any) -> None:
            path = next(each for each in given if isinstance(each, Path))
            (path if path.suffix == ".safetensors" else path / MANIFEST).write_bytes(b"half")
            raise OSError(errno.EIO, "Input/output error", str(path))

        if mesh.world.rank == failing:
            patch.setattr(f"parallel.checkpoint.{function}", fail)
        saver.save(2, {})
        train(step, range(1))
        saver.wait()
        told = [saver.failure, saver.check(), saver.newest]
        patch.undo()
        saver.save(3, {})
        saver.wait()
    return [*told, saver.failure, saver.newest, sorted(path.name for path in root.iterdir())]


def test_all_ranks_learn_that_one_could_not_write(folders: dict[str, str], tmp_path: Path) -> None:
    files = {
        (0, "write_shards"): "/stage-000-tp-00.safetensors",
        (1, "write_shards"): "/stage-001-tp-00.safetensors",
        (0, "write_manifest"): "",
    }
    for number, ((failing, function), file) in enumerate(files.items()):
        root = tmp_path / str(number)
        ranks = run_distributed(2, _fails_on_one, folders, root, failing, function)
        reason = (
            f"the checkpoint of step 2 could not be written: rank {failing} (pp {failing}, dp 0, tp 0): "
            f"{root}/step-00000002.partial{file}: Input/output error"
        )
        left = ["step-00000001", "step-00000003"]
        assert ranks == [[reason, [reason], None, None, root / "step-00000003", left]] * 2


def _held_back(patch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let files be written only when the second event is set; the first tells that one is to be written."""
    reached, go = threading.Event(), threading.Event()

    def wait_and_save(*given: Any) -> FileRecord:
        reached.set()
        assert go.wait(60)
        return write_shards(*given)

    patch.setattr("parallel.checkpoint.write_shards", wait_and_save)
    return reached, go


def test_training_goes_on_while_a_checkpoint_is_written(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = _held_back(monkeypatch)
    step = make_step(SINGLE, folders, Mesh.single())
    train(step, range(1))
    saved = state_of(step)
    with Saver(tmp_path, step.optimizer, step.mesh, keep=2) as saver:
        saver.save(1, EXTRAS)
        assert reached.wait(60)
        train(step, range(1, 2))
        assert _differ(step, saved) and complete_checkpoints(tmp_path) == []
        saver.check()
        go.set()
        # Waits for the one before, which is of the step at which it was asked for.
        saver.save(2, EXTRAS)
        assert tmp_path / "step-00000001" in complete_checkpoints(tmp_path)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    later = make_step(SINGLE, folders, Mesh.single())
    assert restore(tmp_path / "step-00000001", later.optimizer, later.mesh).step == 1
    assert not _differ(later, saved)


def test_a_run_that_fails_still_completes_its_checkpoint(
    step: DistillationStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = _held_back(monkeypatch)
    monkeypatch.setattr("parallel.background._CLOSE_S", 0.0)
    with pytest.raises(ArithmeticError), Saver(tmp_path, step.optimizer, step.mesh, keep=2) as saver:
        saver.save(1, EXTRAS)
        assert reached.wait(60)
        threading.Timer(0.2, go.set).start()
        raise ArithmeticError
    assert read_manifest(tmp_path / "step-00000001").step == 1


def test_a_run_that_fails_waits_for_no_other_for_ever(
    step: DistillationStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = _held_back(monkeypatch)
    monkeypatch.setattr("parallel.checkpoint._LAST_S", 0.1)
    with pytest.raises(ArithmeticError), Saver(tmp_path, step.optimizer, step.mesh, keep=2) as saver:
        saver.save(1, EXTRAS)
        assert reached.wait(60)
        raise ArithmeticError
    assert complete_checkpoints(tmp_path) == []
    go.set()


def _refused(step: DistillationStep, folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        restore(folder, step.optimizer, step.mesh)
    assert all(word in str(caught.value) for word in words), caught.value


def test_files_cut_short_or_gone_are_named(step: DistillationStep, saved: Path) -> None:
    file = saved / FILE
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        file.write_bytes(broken)
        _refused(step, saved, str(file), f"has {len(broken)} bytes", f"says {len(whole)}")
    file.write_bytes(b"\xff" * len(whole))
    _refused(step, saved, str(file), "cannot be read")
    file.unlink()
    _refused(step, saved, str(file), "has 0 bytes")
    file.write_bytes(whole)
    fields = (saved / MANIFEST).read_text()
    edit_manifest(saved, lambda manifest: {**manifest, "files": {}})
    _refused(step, saved, str(saved), "there is no tensor", *OTHER)
    (saved / MANIFEST).write_text(fields)
    assert restore(saved, step.optimizer, step.mesh).step == 7


def test_other_tensors_are_named(step: DistillationStep, saved: Path) -> None:
    name = "exp_avg/model.layers.1.mlp.up_proj.weight"
    original = shutil.copytree(saved, saved.with_name("original"))
    cases: list[tuple[Callable[[dict], dict], tuple[str, ...]]] = [
        (
            lambda tensors: {key: value for key, value in tensors.items() if key != name},
            (f"no tensor {name!r}", *OTHER),
        ),
        (lambda tensors: {**tensors, "weight/model.extra": torch.zeros(3)}, ("weight/model.extra", *OTHER)),
        (lambda tensors: {**tensors, name: tensors[name].t().contiguous()}, (name, "[32, 48]", "[48, 32]")),
        (lambda tensors: {**tensors, name: tensors[name].flatten()}, (name, "[1536]", "[48, 32]")),
    ]
    for change, words in cases:
        shutil.rmtree(saved)
        shutil.copytree(original, saved)
        rewrite(saved, FILE, change)
        _refused(step, saved, str(saved), *words)


def _one_broken_file(folders: dict[str, str], root: Path) -> list[str]:
    """Break what only rank 1 reads, in several ways; return what this rank is told each time."""
    case = replace(SINGLE, pp=2)
    mesh = mesh_of(case)
    step = make_step(case, folders, mesh)
    folder = save_now(root, 1, step.optimizer, mesh, extras={}, keep=1)
    file = "stage-001-tp-00.safetensors"
    changes: list[Callable[[dict], dict]] = [
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {**tensors, "weight/extra": torch.zeros(1)},
    ]
    told = []
    original = root / "original"
    if mesh.world.is_first:
        shutil.copytree(folder, original)
    for change in (*changes, None):
        torch.distributed.barrier()
        if mesh.world.is_first:
            shutil.copytree(original, folder, dirs_exist_ok=True)
            if change is None:
                size = (folder / file).stat().st_size
                (folder / file).write_bytes(b"\xff" * size)
            else:
                rewrite(folder, file, change)
        torch.distributed.barrier()
        with pytest.raises(CheckpointError) as caught:
            restore(folder, step.optimizer, mesh)
        told.append(str(caught.value))
    return told


def test_every_rank_learns_of_one_broken_file(folders: dict[str, str], tmp_path: Path) -> None:
    first, second = run_distributed(2, _one_broken_file, folders, tmp_path, timeout_s=60)
    assert first == second
    assert all(
        word in text
        for word, text in zip(("there is no tensor", "extra", "cannot be read"), first, strict=True)
    )


def test_a_disk_that_refuses_while_it_is_restored_is_no_damage(
    step: DistillationStep, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **rest: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("parallel.checkpoint_files.safe_open", refuse)
    with pytest.raises(CheckpointOutOfReach, match=f"^{saved}: .*{FILE} cannot be read: .*Input/output"):
        restore(saved, step.optimizer, step.mesh)


def _read_by_two(folder: Path) -> tuple[str, list[int]]:
    """Return what this rank is told when the second cannot read, and what both have found when they can."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)

    def fail(files: CheckpointFiles) -> int:
        if mesh.world.rank == 1:
            raise CheckpointOutOfReach("a file cannot be read")
        return len(files.names)

    with pytest.raises(CheckpointError) as caught:
        read_together(folder, mesh, fail)
    manifest, found = read_together(folder, mesh, lambda files: len(files.names) + mesh.world.rank)
    assert manifest.step == 3
    return f"{type(caught.value).__name__}: {caught.value}", found


def test_what_one_rank_cannot_read_is_told_on_every_rank(tmp_path: Path) -> None:
    record = write_shards({"weight/a": torch.ones(2)}, {}, tmp_path / FILE)
    write_manifest(Manifest(3, 3, {"mesh.pp": 1}, {FILE: record}, {}, {}), tmp_path)
    told = f"CheckpointOutOfReach: {tmp_path}: a file cannot be read"
    assert run_distributed(2, _read_by_two, tmp_path) == [(told, [1, 2])] * 2
