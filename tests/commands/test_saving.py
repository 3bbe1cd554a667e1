"""Whole runs on a disk that refuses some of their checkpoints, and checkpoints in which something strange lies."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from distill import train
from launch import distill
from parallel import checkpoint
from parallel.optimizer import StageOptimizer
from tests.commands.test_resume import assert_same_run
from tests.commands.tiny_run import STEPS, Inputs, call, losses, metrics
from tests.parallel.forged import admit


def refuse(monkeypatch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """Let the checkpoints of some steps meet a full disk, when half of a file is written."""
    write = checkpoint.write_shards

    def stand_in(tensors: Any, shards: Any, path: Path, spans: Any) -> Any:
        if any(path.parent.name.startswith(f"step-{step:08d}") for step in steps):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(tensors, shards, path, spans)

    monkeypatch.setattr(checkpoint, "write_shards", stand_in)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_full_disk_costs_a_checkpoint_and_at_the_end_the_exit_code(
    inputs: Inputs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, (5, STEPS))
        done = call(distill.COMMAND, inputs.settings(tmp_path))
    warnings = [line for line in done.out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    for step, warning in zip((5, STEPS), warnings, strict=True):
        file = tmp_path / "checkpoints" / f"step-{step:08d}.partial" / "stage-000-tp-00.safetensors"
        assert warning.startswith(
            f"warning: the checkpoint of step {step} could not be written: rank 0 (pp 0, dp 0, tp 0): {file}: "
            "No space left on device"
        )
    assert warnings[0].endswith("; training goes on, the next one is tried as usual")
    assert names(tmp_path) == ["step-00000010"], "the one after is there, of the others no half"
    kept = tmp_path / "checkpoints" / "step-00000010"
    assert done.code == 1 and done.err.count("\n") == 1 and done.err.startswith("failed: "), done.err
    assert f"No space left on device; the same command begins from {kept}" in done.err
    assert losses(tmp_path) == losses(reference) and (tmp_path / "student").is_dir()
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
    again = call(distill.COMMAND, inputs.settings(tmp_path))
    assert again.code == 0 and f"going on after step 10 of {STEPS}" in again.out, again.err
    assert_same_run(tmp_path, reference)


def test_a_stop_that_cannot_be_saved_is_said(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree, calls = train.agree, itertools.count()
    # Asked before the first step, and after it.
    monkeypatch.setattr(train, "agree", lambda mesh, stop: (next(calls) > 0, agree(mesh, stop)[1]))
    refuse(monkeypatch, (1,))
    done = call(distill.COMMAND, inputs.settings(tmp_path))
    (line,) = [line for line in done.err.splitlines() if line.startswith(("failed: ", "error: "))]
    assert done.code == 1 and "stopped after" not in done.out
    assert line.startswith("failed: the checkpoint of step 1 could not be written: rank 0")
    assert line.endswith("No space left on device; the same command begins anew")
    assert names(tmp_path) == [] and len(metrics(tmp_path)) == 1


class _Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._proof,)


def test_nothing_is_unpickled(inputs: Inputs, reference: Path, tmp_path: Path) -> None:
    """What lies beside the files of the manifest is not looked at, and a pickle in place of one is refused."""
    run, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    planted = pickle.dumps(_Planted(proof))
    for name in (".metadata", "__0_0.distcp", "model.pt", "pytorch_model.bin", "stage-001-tp-00.safetensors"):
        (folder / name).write_bytes(planted)
    done = call(distill.COMMAND, inputs.settings(run))
    assert done.code == 0 and f"going on after step {STEPS} of {STEPS}" in done.out, done.err
    assert_same_run(run, reference)
    (run / "summary.json").unlink()
    (folder / "stage-000-tp-00.safetensors").write_bytes(planted)
    admit(folder, "stage-000-tp-00.safetensors")
    done = call(distill.COMMAND, inputs.settings(run))
    assert done.code == 2 and len(done.errors) == 1 and "cannot be read" in done.errors[0], done.err
    assert not proof.exists()
    pickle.loads(planted)
    assert proof.exists(), "the pickle would have shown itself"


def test_parameters_that_come_late_are_waited_for(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next step, judging, saving and what is exported: bf16 parameters are copies of their masters."""
    gather, calls = StageOptimizer.gather, itertools.count(1)

    def late(self: StageOptimizer) -> None:
        # The run's end has other things to do first.
        time.sleep(3 if next(calls) == 4 else 0.3)
        gather(self)

    arguments = ("train.dtype=bfloat16", "train.steps=4", "evaluate.every=2", "checkpoint.every=3")
    assert call(distill.COMMAND, inputs.settings(tmp_path / "prompt", *arguments)).code == 0
    monkeypatch.setattr(StageOptimizer, "gather", late)
    assert call(distill.COMMAND, inputs.settings(tmp_path / "late", *arguments)).code == 0
    assert_same_run(tmp_path / "late", tmp_path / "prompt")


def test_the_number_of_rows_in_a_microbatch_may_change(
    inputs: Inputs, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    for step in (STEPS, STEPS - 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    changed = ("train.microbatch_size=2", "pipeline.teacher=batch", "pipeline.schedule=gpipe")
    done = call(distill.COMMAND, inputs.settings(run, *changed))
    assert done.code == 0 and f"going on after step 5 of {STEPS}" in done.out, done.err
    for mine, theirs in zip(losses(run), losses(reference), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
