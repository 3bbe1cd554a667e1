"""A run whose teacher is NaN in some steps, and one whose weights are no longer finite when they are to be saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.step import DistillationStep
from launch import distill
from tests.commands.tiny_run import STEPS, Inputs, call, metrics, read_lines, same_weights, weights


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the teacher's output be NaN in these steps, counted from 1."""
    original = DistillationStep._loss

    def loss(self: DistillationStep, student: Any, microbatch: int) -> torch.Tensor:
        if self._now.step + 1 in steps:
            self._signals[microbatch].fill_(math.nan)
        return original(self, student, microbatch)

    monkeypatch.setattr(DistillationStep, "_loss", loss)


def test_steps_that_are_nan_are_skipped_and_the_rest_goes_on(
    inputs: Inputs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3, 4, 9})
    done = call(distill.COMMAND, inputs.settings(tmp_path, "checkpoint.every=2"))
    assert done.code == 0, done.err
    lines = metrics(tmp_path)
    assert [line["optim/skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert [line["step"] for line in lines if line["loss/total"] is None] == [3, 4, 9]
    assert [line["optim/lr"] for line in lines] == [line["optim/lr"] for line in metrics(reference)]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in metrics(reference)]
    assert done.out.count("changes nothing: its loss or gradients are not finite (") == 3
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "student").values())
    assert not same_weights(tmp_path / "student", reference / "student")
    assert len(read_lines(tmp_path / "evaluations.jsonl")) == 3


def test_the_run_ends_when_they_do_not_cease_and_goes_on_where_it_was_sound(
    inputs: Inputs, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs.settings(tmp_path, "train.max_skipped_steps=4", "checkpoint.every=2")
    with monkeypatch.context() as patch:
        spoil(patch, set(range(5, STEPS + 1)))
        done = call(distill.COMMAND, arguments)
    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(
        "failed: 4 steps in a row up to step 8 had a loss or gradients that are not finite"
    )
    assert "the checkpoint of step 4 is kept" in done.err
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    again = call(distill.COMMAND, arguments)
    assert again.code == 0 and "going on after step 4 of" in again.out
    assert same_weights(tmp_path / "student", reference / "student")


def test_weights_that_are_not_finite_are_not_saved(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DistillationStep.__call__

    def step(self: DistillationStep, number: int, **how: Any) -> Any:
        stats = original(self, number, **how)
        if number + 1 == 7:
            self.optimizer.state()[0][1]["weight"].change(lambda numbers: numbers * math.nan)
        return stats

    monkeypatch.setattr(DistillationStep, "__call__", step)
    done = call(distill.COMMAND, inputs.settings(tmp_path, "checkpoint.every=7"))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("failed: weights or moments are not finite after step 7")
    assert not list((tmp_path / "checkpoints").glob("step-*[0-9]"))
