"""The teacher's level: judged once, again when anything that it depends on differs, and the same on all ranks."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.levels import Figures, Levels
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from tests.workers import run_distributed

FIGURES = {"eval/loss": 2.5, "eval/choices/one/accuracy_stderr": None}


def teacher_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class Counted:
    """Figures that know how often they were measured."""

    def __init__(self, figures: Figures = FIGURES) -> None:
        self.figures, self.calls = figures, 0

    def __call__(self) -> Figures:
        self.calls += 1
        return self.figures


@pytest.fixture
def levels(tmp_path: Path) -> Levels:
    return Levels(tmp_path / "cache" / "levels", teacher_in(tmp_path / "teacher"), "float32", 97)


def test_a_teacher_is_judged_once_for_the_same_things(levels: Levels) -> None:
    mesh, measure = Mesh.single(), Counted()
    assert levels.of("rows", mesh, measure) == (FIGURES, False)
    assert levels.of("rows", mesh, measure) == (FIGURES, True) and measure.calls == 1
    file = levels.teacher / "model.safetensors"
    changes = [
        lambda: levels.of("other rows", mesh, measure),
        lambda: replace(levels, dtype="float64").of("rows", mesh, measure),
        lambda: replace(levels, vocab_size=96).of("rows", mesh, measure),
        lambda: (os.utime(file, ns=(0, 5)), levels.of("rows", mesh, measure))[1],
        lambda: ((levels.teacher / "config.json").write_text("{ }"), levels.of("rows", mesh, measure))[1],
    ]
    for number, change in enumerate(changes, start=2):
        assert change() == (FIGURES, False) and measure.calls == number
    assert len(list(levels.folder.iterdir())) == len(changes) + 1, "whole files and nothing else"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"figures": {}}', '{"figures": {"eval/loss": "low"}}', "\x00"]
)
def test_a_broken_file_is_made_again(
    content: str, levels: Levels, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh, measure = Mesh.single(), Counted()
    levels.of("rows", mesh, measure)
    (file,) = levels.folder.iterdir()
    file.write_text(content)
    assert levels.of("rows", mesh, measure) == (FIGURES, False) and measure.calls == 2
    assert capsys.readouterr().out == f"{file} is broken; the teacher is judged again\n"
    assert levels.of("rows", mesh, measure) == (FIGURES, True) and capsys.readouterr().out == ""


def test_what_is_no_number_is_not_kept(levels: Levels) -> None:
    assert levels.of("rows", Mesh.single(), Counted({"eval/loss": 1.0, "eval/kl": math.nan}))[1] is False
    assert not levels.folder.exists()


def _on_two_ranks(levels: Levels, blind: Path) -> list[tuple[Figures, bool]]:
    """Judge twice; rank 1 sees another folder than rank 0, as on two machines."""
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    mine = levels if mesh.world.is_first else replace(levels, folder=blind)

    def measure() -> Figures:
        count = torch.ones(())
        all_reduce_(count, mesh.world)
        return {"eval/loss": count.item()}

    return [mine.of("rows", mesh, measure) for _ in range(2)]


def test_all_ranks_do_what_rank_0_finds(levels: Levels, tmp_path: Path) -> None:
    expected = [({"eval/loss": 2.0}, False), ({"eval/loss": 2.0}, True)]
    assert run_distributed(2, _on_two_ranks, levels, tmp_path / "blind") == [expected, expected]
    assert not (tmp_path / "blind").exists()
