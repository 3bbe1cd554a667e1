"""The student cut out of a teacher: the same in every layout as on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.config import Config, Data, Teacher
from distill.scores import Scores
from distill.structure import Sizes
from distill.student import SCORES_FILE, prune_teacher
from distill.student_config import Prune, Student
from parallel.mesh import Mesh
from tests.distill.calibration import LAYOUTS, TEACHER, compare, load_teacher, save_teacher, share
from tests.workers import run_distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _config(folder: Path, cache: Path) -> Config:
    prune = Prune(num_layers=2, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    return Config(
        teacher=Teacher(model=str(folder)), student=Student(prune=prune), data=Data(cache_dir=str(cache))
    )


def _prune(folder: Path, mesh: Mesh, target: Path) -> float:
    stage, links = load_teacher(folder, mesh)
    return prune_teacher(
        _config(folder, target.parent / "cache"),
        mesh,
        teacher=stage,
        teacher_config=TEACHER,
        teacher_folder=folder,
        links=links,
        microbatches=share(mesh, 7),
        target=target,
    )


def _prune_in_layouts(folder: Path, root: Path) -> list[tuple[float, float, bool]]:
    """Cut the student twice in each layout; return the seconds and whether the folder was there at once."""
    results = []
    for number, layout in enumerate(LAYOUTS):
        mesh = Mesh.create(**layout)
        target = root / f"run-{number}" / "pruned"
        first_s = _prune(folder, mesh, target)
        there = (target / "config.json").is_file()
        results.append((first_s, _prune(folder, mesh, target), there))
    return results


def test_every_layout_cuts_the_same_student(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "pruned"
    assert _prune(folder, Mesh.single(), alone) > 0
    expected = load_file(alone / "model.safetensors")
    assert json.loads((alone / "config.json").read_text())["num_hidden_layers"] == 2
    assert Sizes.of(TEACHER).ffn == 48 and expected["model.layers.1.mlp.up_proj.weight"].shape == (32, 32)
    assert (alone / "tokenizer.json").is_file()
    assert json.loads((alone / "pruning" / "provenance.json").read_text())["teacher"] == str(folder)
    for rank in run_distributed(2, _prune_in_layouts, folder, tmp_path):
        assert all(first_s > 0 and again_s == 0 and there for first_s, again_s, there in rank)
    for number in range(len(LAYOUTS)):
        run = tmp_path / f"run-{number}"
        tensors = load_file(run / "pruned" / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
        compare(Scores.load(run / SCORES_FILE), Scores.load(alone.parent / SCORES_FILE))


def test_a_student_that_is_there_is_kept(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "pruned"
    target.mkdir()
    (target / "mine").write_text("x")
    assert _prune(folder, Mesh.single(), target) == 0
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert not (tmp_path / SCORES_FILE).exists()
