"""Whole runs with the other engine and other rules: the same run as with ours, and each goes on from the other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import distill
from tests.commands.tiny_run import STEPS, Inputs, call, largest_difference, losses, metrics, start

pytestmark = pytest.mark.slow
OTHERS = ("optimizer.engine=deepspeed", "optimizer.name=adam")


def _run(inputs: Inputs, folder: Path, *overrides: str, num_ranks: int | None = None) -> Path:
    done = start("launch.distill", inputs.settings(folder, *overrides), num_ranks=num_ranks).end(
        timeout_s=280
    )
    assert done.code == 0, done.err
    return folder


@pytest.mark.timeout(900)
def test_either_engine_makes_the_same_run_and_goes_on_from_the_other(inputs: Inputs, tmp_path: Path) -> None:
    ours = _run(inputs, tmp_path / "ours", OTHERS[1], num_ranks=2)
    theirs = _run(inputs, tmp_path / "theirs", *OTHERS, num_ranks=2)
    assert largest_difference(losses(theirs), losses(ours)) < 1e-4
    middle = "checkpoints/step-00000010"
    for source, name, overrides in ((ours, "theirs alone", OTHERS), (theirs, "ours alone", OTHERS[1:])):
        again = _run(inputs, tmp_path / name, *overrides, f"checkpoint.resume={source / middle}")
        assert [line["step"] for line in metrics(again)] == list(range(11, STEPS + 1))
        assert largest_difference(losses(again), losses(ours)[10:]) < 1e-4


def test_state_of_another_rule_ends_the_run_with_a_sentence(inputs: Inputs, tmp_path: Path) -> None:
    assert call(distill.COMMAND, inputs.settings(tmp_path / "adamw")).code == 0
    source = tmp_path / "adamw" / "checkpoints" / "step-00000010"
    settings = inputs.settings(tmp_path / "sgd", "optimizer.name=sgd", f"checkpoint.resume={source}")
    done = call(distill.COMMAND, settings)
    assert done.code == 2 and len(done.errors) == 1, done.err
    assert "it holds the state of another rule: exp_avg, exp_avg_sq, not momentum_buffer" in done.errors[0]
