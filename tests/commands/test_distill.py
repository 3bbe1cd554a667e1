"""The main job from the command line to the last file, in several layouts."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from launch import distill
from tests.commands.tiny_run import (
    CONTRACT_NAMES,
    STEPS,
    Inputs,
    call,
    largest_difference,
    losses,
    metrics,
    read_lines,
    snapshot,
    start,
)


def test_the_run_folder_holds_what_is_promised(reference: Path) -> None:
    lines = metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert tuple(line) == CONTRACT_NAMES
        planned = {name for name in line if name.startswith("pipeline/planned_")}
        assert all(isinstance(value, (int, float)) for name, value in line.items() if name not in planned)
        assert all((line[name] is None) == (line["step"] <= 3) for name in planned), "known once measured"
    tokens = [line["tokens"] for line in lines]
    assert all(before < after for before, after in itertools.pairwise(tokens))
    assert 0 <= lines[-1]["pipeline/bubble_fraction"] < 1 and lines[-1]["memory/peak_bytes"] > 2**20
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["finished"] and summary["metrics"] == lines[-1] and summary["tokens"] == tokens[-1]
    assert summary["layout"]["world_size"] == 1 and summary["seconds"] > 0 and "torch" in summary["versions"]
    assert summary["parameters"]["student"] < summary["parameters"]["teacher"]
    assert [row["model"] for row in summary["table"]] == ["teacher", "pruned", "pruned + distilled"]
    assert yaml.safe_load((reference / "config.yaml").read_text())["student"]["prune"]["num_layers"] == 3
    for picture in ("curve.svg", "timeline.svg"):
        assert ElementTree.parse(reference / picture).getroot().tag.endswith("svg")
    assert json.loads((reference / "timeline.json").read_text())
    assert (reference / "student" / "README.md").read_text().startswith("---\n")
    names = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (5, STEPS - 2, STEPS)], (
        "keep is 3, and the last step is one of them"
    )
    judged = [(line["step"], line["model"]) for line in read_lines(reference / "evaluations.jsonl")]
    assert judged == [(0, "teacher"), (0, "student"), (STEPS, "student")]
    leftovers = [path for path in reference.rglob("*") if re.search(r"partial|\.part$|\.building", path.name)]
    assert leftovers == []


def test_distillation_brings_the_student_nearer_to_its_teacher(reference: Path) -> None:
    _, before, after = read_lines(reference / "evaluations.jsonl")
    assert after["eval/kl"] < before["eval/kl"]


def test_a_finished_run_is_not_repeated(inputs: Inputs, reference: Path) -> None:
    before = snapshot(reference)
    done = call(distill.COMMAND, inputs.settings(reference))
    assert done.code == 0 and "| pruned + distilled |" in done.out and str(reference / "student") in done.out
    assert snapshot(reference) == before


def test_more_steps_go_on_from_the_last(inputs: Inputs, tmp_path: Path) -> None:
    constant = ["optimizer.schedule=constant", "checkpoint.every=0"]
    assert call(distill.COMMAND, inputs.settings(tmp_path / "once", "train.steps=4", *constant)).code == 0
    for steps in (2, 4):
        done = call(distill.COMMAND, inputs.settings(tmp_path / "twice", f"train.steps={steps}", *constant))
        assert done.code == 0, done.err
    assert "going on after step 2 of 4" in done.out
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")
    judged = [(line["step"], line["model"]) for line in read_lines(tmp_path / "twice" / "evaluations.jsonl")]
    assert judged == [(0, "teacher"), (0, "student"), (2, "student"), (4, "student")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, ["mesh.pp=2", "pipeline.schedule=gpipe", "pipeline.teacher=batch"]),
        (2, ["mesh.dp=2"]),
        (2, ["mesh.tp=2"]),
        (4, ["mesh.pp=2", "mesh.tp=2"]),
        (4, ["mesh.pp=2", "mesh.dp=2", "pipeline.slices=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_layouts_have_one_trajectory(
    num_ranks: int, layout: list[str], inputs: Inputs, reference: Path, tmp_path: Path
) -> None:
    arguments = inputs.settings(tmp_path / "run", *layout)
    done = start("launch.distill", arguments, num_ranks=num_ranks).end(timeout_s=200)
    assert done.code == 0, done.err
    assert largest_difference(losses(tmp_path / "run"), losses(reference)) < 1e-5
    assert [line["tokens"] for line in metrics(tmp_path / "run")] == [
        line["tokens"] for line in metrics(reference)
    ]
