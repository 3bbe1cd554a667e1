from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import ConfigError
from launch import estimate
from launch.plan import plan
from tests.families import save_tiny, tiny_config


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """Put the number of threads back, which measuring takes down to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), tiny_config("qwen3"), dtype=torch.float32)


def run(teacher: Path, folder: Path, *arguments: str) -> Any:
    out = folder / "plan.json"
    settings = ["data.seq_len=16", "train.dtype=float32", "train.global_batch_size=8", "run.device=cpu"]
    plan([f"teacher.model={teacher}", *settings, *arguments, f"plan.out={out}"])
    return json.loads(out.read_text())


def test_a_layout_from_models_alone(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(teacher, tmp_path, "mesh.pp=2", "student.prune.num_layers=3", "train.microbatch_size=2")
    assert sum(found["student_layers"]) == 3 and sum(found["teacher_layers"]) == 4
    assert all(len(found["costs"][name]) == 2 for name in ("forward", "backward", "teacher", "step_end"))
    assert found["num_microbatches"] == 4
    assert found["queue_bytes"] == found["queue_tensors"] * 2 * 16 * 32 * 4
    assert found["step_s"]["fill"] >= found["bound_s"] * 0.999
    shown = capsys.readouterr().out
    assert "Costs are measured on this machine (cpu, 1 thread; 2 x 16 tokens, float32)" in shown
    assert "Not in the figures: messages between stages" in shown


def test_the_state_of_the_fullest_rank(teacher: Path, tmp_path: Path) -> None:
    """Both models' weights, and for the student a gradient and two moments, in float32; all of it on one rank."""
    found = run(teacher, tmp_path, f"student.model={teacher}", "train.dtype=bfloat16")
    layer = 32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    both_ends = 2 * 97 * 32
    assert found["state_bytes"] == (4 * layer + both_ends) * (2 + 4 + 4 + 4 + 4 + 2)
    overrides = ("train.dtype=bfloat16", "mesh.dp=2", "optimizer.name=sgd")
    shared = run(teacher, tmp_path, f"student.model={teacher}", *overrides)
    assert shared["state_bytes"] == (4 * layer + both_ends) * (2 + 4 + (4 + 4) / 2 + 2)


def test_given_costs_win_and_are_told(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(teacher, tmp_path, "mesh.pp=2", "plan.costs.latency=0.5", "plan.costs.teacher=[10,20]")
    assert found["costs"]["teacher"] == [10, 20] and found["costs"]["latency"] == 0.5
    assert found["ideal_s"] == pytest.approx(8 * 20, rel=0.1)
    assert "these were given: plan.costs.latency, plan.costs.teacher." in capsys.readouterr().out


def test_every_layout_that_fits_the_models(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    measure = estimate.measure
    monkeypatch.setattr(
        estimate, "measure", lambda *args, **more: measured.append(args) or measure(*args, **more)
    )
    found = run(teacher, tmp_path, "plan.devices=8", "plan.costs.latency=0.001")
    layouts = {(row["pp"], row["dp"], row["tp"]) for row in found}
    assert layouts == {
        (pp, dp, tp) for pp in (1, 2, 4) for dp in (1, 2, 4, 8) for tp in (1, 2, 4) if pp * dp * tp == 8
    }
    assert (
        "Left out, pp 1 dp 1 tp 8: mesh.tp=8 does not divide num_key_value_heads=4" in capsys.readouterr().out
    )
    assert len(measured) < len(found), "once for each shape of the student"
    alone = next(row for row in found if (row["pp"], row["tp"]) == (1, 1))
    shared = next(row for row in found if (row["pp"], row["tp"]) == (1, 4))
    assert shared["costs"]["teacher"][0] > (2 * 4 + 1) * 0.001, (
        "two sums over tp a layer, one for the embedding"
    )
    assert alone["costs"]["teacher"][0] < 0.5


def test_mistakes_are_told_before_anything_is_measured(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure", None)
    for arguments, message in (
        (
            ["mesh.pp=2", "pipeline.student_layers=[1,1]"],
            r"pipeline.student_layers=.1, 1. must have mesh.pp=2",
        ),
        (["mesh.pp=8"], "mesh.pp=8 is more than num_hidden_layers=4"),
        (["mesh.pp=2", "plan.costs.teacher=[1,2,3]"], "plan.costs.teacher=.1.0,2.0,3.0. has 3 entries"),
        (["student.prune.num_layers=9"], "student.prune.num_layers=9 must be between"),
        (["plan.devices=7"], "mesh.tp=7 does not divide|mesh.pp=7 is more|not a multiple of mesh.dp=7"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(teacher, tmp_path, *arguments)


def test_weights_are_not_read(teacher: Path, tmp_path: Path) -> None:
    """Zeroed weight bytes change nothing, as only shapes count."""
    shutil.copytree(teacher, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    file.write_bytes(content)
    assert run(tmp_path / "model", tmp_path, "mesh.pp=2")["step_s"]["fill"] > 0
