"""Runs that are stopped, killed or find what a killed one left, and come to the same end."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill.metrics import RunLog
from launch import distill
from parallel.checkpoint import Saver
from tests.commands.tiny_run import (
    STEPS,
    Done,
    Inputs,
    call,
    largest_difference,
    losses,
    metrics,
    read_lines,
    same_weights,
    start,
)

MANY = 30
"""Steps of a run that a signal has to catch in the middle."""


def stopped_after(done: Done, run_dir: Path) -> int:
    """Return the step after which a run says that it stopped; its files must agree."""
    said = [line for line in done.out.splitlines() if line.startswith("stopped after")]
    assert len(said) == 1, done.out + done.err
    found = re.fullmatch(r"stopped after step (\d+) of \d+; the same command goes on from there", said[0])
    assert found is not None, said
    step = int(found[1])
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, step + 1))
    assert (run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    assert not (run_dir / "student").exists()
    return step


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Assert that two runs have the same steps, losses and judgements, and the same student, bit for bit."""
    assert [line["step"] for line in metrics(ours)] == [line["step"] for line in metrics(theirs)]
    assert losses(ours) == losses(theirs)
    assert [line["tokens"] for line in metrics(ours)] == [line["tokens"] for line in metrics(theirs)]
    assert read_lines(ours / "evaluations.jsonl") == read_lines(theirs / "evaluations.jsonl")
    assert same_weights(ours / "student", theirs / "student")


def wait_for(file: Path) -> None:
    """Wait for a file that a run writes beside its steps."""
    deadline = time.monotonic() + 60
    while not file.is_file():
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of MANY steps on one rank."""
    folder = tmp_path_factory.mktemp("long") / "run"
    assert call(distill.COMMAND, inputs.settings(folder, f"train.steps={MANY}")).code == 0
    return folder


def wandb_steps(run_dir: Path) -> list[int]:
    """Return the steps of training in the offline runs below a folder, read back by wandb itself."""
    steps = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        histories = [
            record["history"] for record in map(json.loads, shown.splitlines()) if "history" in record
        ]
        steps += [item["item"]["_step"] for item in histories if "loss/total" in item["item"]]
    return steps


@pytest.mark.slow
def test_ctrl_c_with_two_stages(inputs: Inputs, long: Path, tmp_path: Path) -> None:
    """Also the proof that two stages have the trajectory of one rank, and that rank 0 alone writes to wandb."""
    arguments = inputs.settings(tmp_path / "run", f"train.steps={MANY}", "mesh.pp=2", "log.wandb=offline")
    first = start("launch.distill", arguments, num_ranks=2)
    first.until("step  3/")
    first.ctrl_c()
    done = first.end()
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert "stopping after the step under way; Ctrl-C again ends at once" in done.err
    step = stopped_after(done, tmp_path / "run")
    assert 3 <= step < MANY, "the signal came too late to show anything"
    assert wandb_steps(tmp_path / "run") == list(range(1, step + 1)), (
        "wandb holds back 32 KiB until it is closed"
    )
    again = start("launch.distill", arguments, num_ranks=2).end()
    assert again.code == 0 and f"going on after step {step} of {MANY}" in again.out, again.err
    assert largest_difference(losses(tmp_path / "run"), losses(long)) < 1e-5
    assert wandb_steps(tmp_path / "run") == list(range(1, MANY + 1))
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2, "one writer each time"


@pytest.mark.slow
def test_sigterm_to_the_launcher(inputs: Inputs, long: Path, tmp_path: Path) -> None:
    arguments = inputs.settings(tmp_path, f"train.steps={MANY}")
    run = start("launch.distill", arguments, num_ranks=1)
    run.until("step  3/")
    run.process.send_signal(signal.SIGTERM)
    done = run.end()
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert 3 <= stopped_after(done, tmp_path) < MANY
    assert call(distill.COMMAND, arguments).code == 0
    assert_same_run(tmp_path, long)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(inputs: Inputs, long: Path, tmp_path: Path) -> None:
    arguments = inputs.settings(tmp_path, f"train.steps={MANY}")
    run = start("launch.distill", arguments)
    run.until("step  8/")
    wait_for(tmp_path / "checkpoints" / "step-00000005" / "manifest.json")
    run.kill()
    assert run.end().code == -signal.SIGKILL
    done = call(distill.COMMAND, arguments)
    assert done.code == 0
    found = re.search(rf"going on after step (\d+) of {MANY}", done.out)
    assert found is not None and int(found[1]) % 5 == 0 and 5 <= int(found[1]) < MANY
    assert_same_run(tmp_path, long)


def interrupt(monkeypatch: pytest.MonkeyPatch, place: str, *, call_number: int = 1) -> None:
    """Let a function of the project end the run at its n-th call, as a kill would, except that files are closed."""
    module, _, name = place.rpartition(".")
    target = RunLog if module.endswith("RunLog") else importlib.import_module(module)
    original = getattr(target, name)
    calls = []

    def stand_in(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == call_number:
            raise SystemExit(f"killed in {name}")
        return original(*given, **named)

    monkeypatch.setattr(target, name, stand_in)


@pytest.mark.parametrize(
    ("place", "call_number"),
    [
        ("distill.cut_files.save_file", 1),  # the weights of the pruned student
        pytest.param("distill.judging.evaluate", 1, marks=pytest.mark.slow),  # the student's first judgement
        ("parallel.checkpoint.write_shards", 2),  # the second checkpoint
        pytest.param("distill.train.write_timeline", 1, marks=pytest.mark.slow),  # after the last judgement
        ("distill.deploy.export.copy_companions", 1),  # half of the student is written
        ("distill.metrics.RunLog.finish", 1),  # everything but the summary
    ],
)
def test_whatever_a_run_was_doing_when_it_ended(
    place: str,
    call_number: int,
    inputs: Inputs,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, place, call_number=call_number)
        call(distill.COMMAND, inputs.settings(tmp_path))
    done = call(distill.COMMAND, inputs.settings(tmp_path))
    assert done.code == 0, done.err
    assert_same_run(tmp_path, reference)
    assert (tmp_path / "summary.json").is_file()


def test_no_checkpoint_is_ahead_of_the_log(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, save, seen = RunLog._write_step, Saver.save, []

    def write_slowly(*given: Any) -> None:
        time.sleep(0.2)
        write(*given)

    def look_and_save(self: Saver, step: int, extras: dict[str, Any]) -> None:
        seen.append((step, [line["step"] for line in metrics(tmp_path)]))
        save(self, step, extras)

    monkeypatch.setattr(RunLog, "_write_step", write_slowly)
    monkeypatch.setattr(Saver, "save", look_and_save)
    assert call(distill.COMMAND, inputs.settings(tmp_path)).code == 0
    assert len(seen) > 1 and all(written == list(range(1, step + 1)) for step, written in seen)


def test_half_of_a_student_or_a_checkpoint_is_not_taken_for_a_whole(
    inputs: Inputs, reference: Path, tmp_path: Path
) -> None:
    half = tmp_path / ".building-abc" / "pruned"
    shutil.copytree(reference / "pruned", half)
    (half / "model.safetensors").write_bytes(b"half of it")
    last = f"step-{STEPS:08d}"
    shutil.copyfile(reference / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(reference / "checkpoints" / last, tmp_path / "checkpoints" / f"{last}.partial")
    shutil.copytree(reference / "checkpoints" / last, tmp_path / "checkpoints" / "step-00000002")
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert call(distill.COMMAND, inputs.settings(tmp_path)).code == 0
    assert_same_run(tmp_path, reference)


def test_a_damaged_checkpoint_is_passed_over(inputs: Inputs, reference: Path, tmp_path: Path) -> None:
    """By itself; named, it is a mistake, and so are checkpoints of which none is sound."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    last, before = (run / "checkpoints" / f"step-{step:08d}" for step in (STEPS, STEPS - 2))
    (file,) = last.glob("stage-*")
    file.write_bytes(file.read_bytes()[:-100])
    done = call(distill.COMMAND, inputs.settings(run, f"checkpoint.resume={last}"))
    assert done.code == 2 and len(done.errors) == 1 and done.err.count("\n") == 1
    assert done.err.startswith(f"error: checkpoint.resume={last}: {file} has ")
    assert "bytes, its checkpoint says" in done.err
    done = call(distill.COMMAND, inputs.settings(run))
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("passed over")]
    assert len(lines) == 1 and lines[0].startswith(f"passed over {last.name}: {file} has ")
    assert lines[0].endswith(f", set aside as {last.name}.damaged")
    assert f"going on after step {STEPS - 2} of {STEPS}" in done.out
    assert_same_run(run, reference)
    assert (run / "checkpoints" / f"{last.name}.damaged" / file.name).is_file()
    (run / "summary.json").unlink()
    for folder in (run / "checkpoints").glob("step-*[0-9]"):
        (folder / "student" / "config.json").write_bytes(b"")
    done = call(distill.COMMAND, inputs.settings(run))
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"checkpoint.resume=auto: no checkpoint in {run / 'checkpoints'} is sound (" in done.err
    assert before.is_dir() and len(metrics(run)) == STEPS, "nothing is lost"


def test_a_student_pruned_for_other_settings_is_not_taken(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, "distill.session.load_student")
        call(distill.COMMAND, inputs.settings(tmp_path, "student.prune.num_layers=2"))
    assert (tmp_path / "pruned").is_dir() and not (tmp_path / "metrics.jsonl").exists()
    done = call(distill.COMMAND, inputs.settings(tmp_path))
    assert done.code == 2 and len(done.errors) == 1
    assert f"run.dir={tmp_path} holds a run with student.prune.num_layers=2, this one has" in done.err


def test_a_checkpoint_of_another_run_only_begins_this_one(
    inputs: Inputs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = reference / "checkpoints" / f"step-{STEPS - 2:08d}"
    arguments = inputs.settings(tmp_path, f"checkpoint.resume={begin}")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, "distill.results.export_student")
        call(distill.COMMAND, arguments)
    done = call(distill.COMMAND, arguments)
    assert done.code == 0 and f"going on after step {STEPS} of {STEPS}" in done.out
    assert losses(tmp_path) == losses(reference)[-2:]
    assert "| teacher " in done.out and "| pruned + distilled |" in done.out
    assert "| pruned |" not in done.out, "what it began with had been trained"
    assert json.loads((tmp_path / "summary.json").read_text())["gap_closed"] is None
    assert same_weights(tmp_path / "student", reference / "student")


def test_the_command_that_named_a_checkpoint_goes_on_from_newer_ones(
    inputs: Inputs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    begin = run / "checkpoints" / f"step-{STEPS - 2:08d}"
    arguments = inputs.settings(run, f"checkpoint.resume={begin}", f"train.steps={STEPS + 1}")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        interrupt(patch, "distill.results.export_student")
        call(distill.COMMAND, arguments)
    assert not (run / "summary.json").exists(), "it has not come to its end"
    done = call(distill.COMMAND, arguments)
    assert done.code == 0 and f"going on after step {STEPS + 1} of {STEPS + 1}" in done.out, done.err
    assert "dropped" not in done.out


def test_a_checkpoint_brings_its_student_along(inputs: Inputs, reference: Path, tmp_path: Path) -> None:
    """What the student was cut to is the checkpoint's to say, also in a folder that has nothing else."""
    before = f"step-{STEPS - 2:08d}"
    alone = shutil.copytree(reference / "checkpoints" / before, tmp_path / before)
    arguments = inputs.settings(tmp_path / "run", f"checkpoint.resume={alone}")
    done = call(distill.COMMAND, arguments)
    assert done.code == 0, done.err
    assert "scoring" not in done.out and "those measured before" not in done.out, "it was not cut again"
    assert losses(tmp_path / "run") == losses(reference)[-2:]
    assert same_weights(tmp_path / "run" / "student", reference / "student")
    for name in ("pruning/kept.safetensors", "pruning/provenance.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "run" / "student" / name).read_bytes() == (
            reference / "student" / name
        ).read_bytes()
    other = inputs.settings(tmp_path / "other", f"checkpoint.resume={alone}", "student.prune.num_layers=2")
    done = call(distill.COMMAND, other)
    assert done.code == 2 and done.err == (
        f"error: {alone} belongs to another student: student.prune.num_layers=3 there, 2 here; use the same, or "
        "checkpoint.resume=none\n"
    )
    assert not (tmp_path / "other" / "pruned").exists(), "it was seen before anything was cut"


@pytest.mark.slow
def test_a_second_ctrl_c_while_saving_keeps_the_checkpoint_before(
    inputs: Inputs, long: Path, tmp_path: Path
) -> None:
    arguments = inputs.settings(tmp_path, f"train.steps={MANY}")
    run = start("tests.commands.slow_distill", arguments, num_ranks=1)
    run.until("saving")
    run.until("step  6/")
    run.ctrl_c()
    run.until("saving")
    time.sleep(1.5)
    run.ctrl_c()
    done = run.end()
    assert done.code == 128 + signal.SIGINT and "Traceback" not in done.err, done.err
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*[0-9]")] == ["step-00000005"]
    again = call(distill.COMMAND, arguments)
    assert again.code == 0 and f"going on after step 5 of {MANY}" in again.out
    assert_same_run(tmp_path, long)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mesh.pp=2", "mesh.dp=2", "mesh.tp=2"])
def test_stopped_layouts_end_bit_for_bit_as_uninterrupted(
    layout: str, inputs: Inputs, tmp_path: Path
) -> None:
    many = f"train.steps={MANY}"
    whole = start("launch.distill", inputs.settings(tmp_path / "whole", many, layout), num_ranks=2).end()
    assert whole.code == 0, whole.err
    arguments = inputs.settings(tmp_path / "cut", many, layout)
    run = start("launch.distill", arguments, num_ranks=2)
    run.until("step  7/")
    run.process.send_signal(signal.SIGTERM)
    assert run.end().code == 0
    assert start("launch.distill", arguments, num_ranks=2).end().code == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
