"""Whole runs with the hidden-state term: rounds with and without it, a student that is cut in between, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from distill.prune import load_kept
from launch import distill
from tests.commands.tiny_run import Inputs, call, largest_difference, metrics, start, weights

ROUNDS = (
    "rounds=[{},"
    "{loss:{hidden:{weight:1.0,every:1}},optimizer:{lr:1e-3}},"
    "{loss:{hidden:{weight:0.5,every:1}},optimizer:{lr:1e-6}},"
    "{student:{prune:{num_layers:2}},loss:{hidden:{weight:1.0,every:1}},optimizer:{lr:1e-6}},"
    "{student:{prune:{num_layers:2}},loss:{hidden:{weight:2.0,projection:none,kind:cosine}}}]"
)
SETTINGS = ("student.prune.hidden_size=24", "train.steps=3", "checkpoint.keep=9", ROUNDS)
WEIGHTS = (0.0, 1.0, 0.5, 1.0, 2.0)


def _projections(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if "hidden_proj" in name}  # noqa: SIM118
    return found


def _start(student: Path) -> torch.Tensor:
    """Return the projection that has each of the student's channels where the teacher has it."""
    start_ED = torch.zeros(32, 24)
    start_ED[load_kept(student)[0].hidden, torch.arange(24)] = 1.0
    return start_ED


def test_rounds_turn_the_term_on_go_on_with_it_and_cut(inputs: Inputs, tmp_path: Path) -> None:
    done = call(distill.COMMAND, inputs.settings(tmp_path, *SETTINGS))
    assert done.code == 0, done.err
    lines = metrics(tmp_path)
    assert [line["round"] for line in lines] == [number // 3 for number in range(15)]
    for line in lines:
        weight = WEIGHTS[line["round"]]
        assert (line["loss/hidden"] > 0) == (weight > 0)
        parts = 0.3 * line["loss/hard"] + 0.7 * line["loss/soft"] + weight * line["loss/hidden"]
        assert abs(line["loss/total"] - parts) < 1e-9
    checkpoints = [tmp_path / "checkpoints" / f"step-{3 * number:08d}" for number in range(1, 6)]
    off, first, second, cut, none = map(_projections, checkpoints)
    assert not off and not none
    assert first.keys() == second.keys() and len(first) == 3 * 3 and len(cut) == 2 * 3
    for layer in range(3):
        name = f"weight/hidden_projection.{layer}.weight"
        assert 1e-4 < (first[name] - _start(tmp_path / "round-1")).abs().max() < 1e-2
        assert (second[name] - first[name]).abs().max() < 1e-4, "the next round goes on with them"
        if layer < 2:
            assert (cut[name] - _start(tmp_path / "round-3")).abs().max() < 1e-4, "a cut begins anew"
    assert not any("hidden_projection" in name for name in weights(tmp_path / "student"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"]["loss/hidden"] == lines[-1]["loss/hidden"]


def test_mistakes_are_found_before_weights_are_read(inputs: Inputs, tmp_path: Path) -> None:
    for overrides, words in (
        (["loss.hidden.layers=[[3,0]]"], "loss.hidden.layers=[[3,0]] names a layer that the student does not have; use 0 to 2"),
        (["loss.hidden.layers=[[2,4]]"], "loss.hidden.layers=[[2,4]] names a layer that the teacher does not have; use 0 to 3"),
        (["loss.hidden.layers=[2,4]"], "loss.hidden.layers=[2,4] must be a list of entries that are each a list of 2"),
    ):  # fmt: skip
        done = call(distill.COMMAND, inputs.settings(tmp_path / "run", "loss.hidden.weight=1", *overrides))
        assert done.code == 2 and done.errors[0].startswith(f"error: {words}"), done.err


@pytest.mark.slow
def test_two_stages_stopped_with_the_teacher_ahead_go_on_like_one_rank(
    inputs: Inputs, tmp_path: Path
) -> None:
    """Ctrl-C comes while hidden states of the next step are under way."""
    term = ("train.steps=40", "loss.hidden.weight=1.0", "loss.hidden.layers=[[0,3],[1,1],[2,0]]")
    one = call(distill.COMMAND, inputs.settings(tmp_path / "one", *term))
    assert one.code == 0, one.err
    arguments = inputs.settings(tmp_path / "two", *term, "mesh.pp=2")
    first = start("launch.distill", arguments, num_ranks=2)
    first.until("step  6/")
    first.ctrl_c()
    done = first.end()
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert "plan: the teacher's next batch fills" in done.out
    assert 6 <= len(metrics(tmp_path / "two")) < 40, "the signal came too late to show anything"
    again = start("launch.distill", arguments, num_ranks=2).end(timeout_s=200)
    assert again.code == 0 and "going on after step" in again.out, again.err
    ours, theirs = (
        [
            [line[name] for name in ("loss/hidden", "loss/total", "optim/grad_norm")]
            for line in metrics(tmp_path / run)
        ]
        for run in ("two", "one")
    )
    assert largest_difference(ours, theirs) < 1e-4
