"""Any layout and engine resumes any other: the five steps that follow are those of an uninterrupted run, float64, to 1e-9.

Every source writes one checkpoint. Every target is built once, and restores all sources in turn into the same optimizer, so
that whatever one leaves behind must be overwritten by the next. A quarter of the students' weights is held at zero, by a mask
that the targets have from the checkpoint only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.sparsity import Sparsifier
from distill.step import DistillationStep
from distill.student_config import Sparsity
from parallel.checkpoint import restore
from parallel.checkpoint_folders import folder_of, verify
from parallel.mesh import Mesh
from parallel.optimizer import LearningRate
from tests.equivalence.trajectory import (
    SINGLE,
    Case,
    layout_name,
    make_step,
    mesh_of,
    save_models,
    save_now,
    train,
)
from tests.workers import run_distributed

DONE, MORE = 2, 5
RATE = LearningRate(peak=1e-2, warmup_steps=1, total_steps=DONE + MORE)
HELD = Sparsity(method="magnitude", ratio=0.25)
TOLERANCE = 1e-9
ENGINES = ("torch", "deepspeed")
"""What updates the weights (`optimizer.engine`)."""
Source = tuple[str, str]
"""Engine and layout of a checkpoint, or of who goes on from it."""
FIRST: Source = ("torch", "pp1-dp1-tp1")
"""The one process whose later losses all others must have."""


def case_of(layout: tuple[int, int, int], **other: object) -> Case:
    """Return the case of a layout (pp, dp, tp); the number of micro-batches differs with it."""
    return replace(
        SINGLE,
        student="deep",
        pp=layout[0],
        dp=layout[1],
        tp=layout[2],
        num_microbatches=4 // layout[1],
        **other,
    )


SPLITS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 1), (1, 2, 2)]
CASES = {layout_name(layout): case_of(layout) for layout in SPLITS}
CASES["pp2-v2"] = case_of((2, 1, 1), virtual_stages=2, schedule="interleaved")
FAST = ("pp1-dp1-tp1", "pp1-dp1-tp2", "pp2-dp1-tp1")
"""Layouts that are always gone on from; all others are slow."""


def world_size(name: str) -> int:
    return CASES[name].pp * CASES[name].dp * CASES[name].tp


def build(name: str, engine: str, folders: dict[str, str], mesh: Mesh) -> DistillationStep:
    """Build this rank's part of a layout, with nothing held at zero yet."""
    return make_step(replace(CASES[name], engine=engine), folders, mesh, rate=RATE, num_steps=DONE + MORE)


def train_losses(step: DistillationStep, steps: range) -> list[list[float]]:
    return [[each.total, each.hard, each.soft, each.grad_norm] for each in train(step, steps)]


def write_sources(names: Sequence[str], engine: str, root: Path, folders: dict[str, str]) -> None:
    """Take the first steps in each layout, save, and let the first of all go on for the losses that all must have."""
    for name in names:
        mesh = mesh_of(CASES[name])
        step = build(name, engine, folders, mesh)
        Sparsifier(step.student_models, step.optimizer, HELD, total_steps=DONE + MORE).begin()
        train(step, range(DONE))
        save_now(root / engine / name, DONE, step.optimizer, mesh, extras={}, keep=1)
        if (engine, name) == FIRST:
            later = train_losses(step, range(DONE, DONE + MORE))
            (root / "losses.json").write_text(json.dumps(later))
        step.close()


def go_on(
    target: Source, sources: Sequence[Source], root: Path, folders: dict[str, str]
) -> list[list[list[float]]]:
    """Go on from each source with one engine in one layout; return the losses after each."""
    engine, name = target
    mesh = mesh_of(CASES[name])
    step = build(name, engine, folders, mesh)
    step.optimizer.make_mask()
    found = []
    for source in sources:
        folder = folder_of(root.joinpath(*source), DONE)
        verify(folder, mesh)
        restore(folder, step.optimizer, mesh)
        held = torch.stack(
            [
                slot.view(step.optimizer.mask).any()
                for slot in step.optimizer.slots
                if slot.entry.parameter.ndim > 1
            ]
        )
        assert held.any(), f"{source} brought no mask"
        found.append(train_losses(step, range(DONE, DONE + MORE)))
    step.close()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all checkpoints, filled as they are asked for."""
    return tmp_path_factory.mktemp("checkpoints")


def ask_for(sources: Sequence[Source], root: Path, folders: dict[str, str]) -> None:
    """Write the sources that are not there yet, all layouts of one engine and size in one launch."""
    launches: dict[tuple[str, int], list[str]] = {}
    for engine, name in sources:
        if not (root / engine / name).is_dir():
            launches.setdefault((engine, world_size(name)), []).append(name)
    for (engine, size), names in sorted(launches.items()):
        run_distributed(size, write_sources, names, engine, root, folders, timeout_s=300)


def check(target: Source, sources: Sequence[Source], root: Path, folders: dict[str, str]) -> None:
    """Go on from each source, and compare with the run that nobody interrupted."""
    ask_for([*dict.fromkeys([FIRST, *sources])], root, folders)
    expected = json.loads((root / "losses.json").read_text())
    for found in run_distributed(world_size(target[1]), go_on, target, sources, root, folders, timeout_s=600):
        for source, losses in zip(sources, found, strict=True):
            assert losses == [pytest.approx(step, rel=TOLERANCE, abs=TOLERANCE) for step in expected], (
                f"{target} from {source}"
            )


def test_one_layout_goes_on_from_others(root: Path, folders: dict[str, str]) -> None:
    check(FIRST, [("torch", name) for name in FAST], root, folders)


def test_either_engine_goes_on_from_the_other(root: Path, folders: dict[str, str]) -> None:
    own, theirs = ("torch", "pp2-dp1-tp1"), ("deepspeed", "pp1-dp2-tp1")
    check(own, [theirs], root, folders)
    check(theirs, [own], root, folders)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_any_layout_and_engine_goes_on_from_any_other(
    engine: str, name: str, root: Path, folders: dict[str, str]
) -> None:
    check((engine, name), [(writer, source) for writer in ENGINES for source in CASES], root, folders)


def test_the_losses_are_not_those_of_a_run_without_moments_or_mask(
    root: Path, folders: dict[str, str]
) -> None:
    """What makes the comparison above worth something: a checkpoint that brings less is seen."""
    ask_for([FIRST], root, folders)
    expected = json.loads((root / "losses.json").read_text())
    step = build(FIRST[1], FIRST[0], folders, Mesh.single())
    step.optimizer.make_mask()
    restore(folder_of(root.joinpath(*FIRST), DONE), step.optimizer, step.mesh)
    step.optimizer.reset_moments()
    without_moments = train_losses(step, range(DONE, DONE + MORE))
    restore(folder_of(root.joinpath(*FIRST), DONE), step.optimizer, step.mesh)
    step.optimizer.mask.zero_()
    without_mask = train_losses(step, range(DONE, DONE + MORE))
    step.close()
    for other in (without_moments, without_mask):
        assert abs(other[1][0] - expected[1][0]) > 1e3 * TOLERANCE
