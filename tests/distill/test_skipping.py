"""Steps that are skipped: when they are told, when they end the run, and what may not be saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.config import Config
from distill.failures import RunFailed
from distill.rounds import Progress
from distill.skipping import check_skipped, refuse_not_finite
from parallel.checkpoint import Saver
from parallel.mesh import Mesh
from parallel.model import build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.update_rules import OptimizerOptions
from tests.families import tiny_config

CONFIG = replace(Config(), train=replace(Config().train, max_skipped_steps=3))


class Said:
    """A log that remembers what it is to say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def _steps(skipped: list[bool]) -> Progress:
    progress = Progress()
    for each in skipped:
        progress = progress.after_step(tokens=100, skipped=each)
    return progress


def test_skipped_steps_are_counted_and_data_goes_on() -> None:
    progress = _steps([False, True, True, False, True])
    assert (progress.skipped, progress.skipped_in_a_row) == (3, 1)
    assert (progress.step, progress.tokens) == (5, 500)


def test_each_is_told_and_a_sound_one_ends_the_row(tmp_path: Path) -> None:
    log = Said()
    for skipped in ([True], [True, True], [True, True, False], [True, True, False, True]):
        check_skipped(_steps(skipped), CONFIG, log, tmp_path, settle=lambda: None)
    assert [line[:6] for line in log.lines] == ["step 1", "step 2", "step 4"]
    assert "(2 in a row, train.max_skipped_steps=3)" in log.lines[1] and "(1 in a row" in log.lines[2]


@pytest.mark.parametrize(
    ("saved", "kept"), [((), "there is no checkpoint yet"), ((2, 4), "the checkpoint of step 4 is kept")]
)
def test_too_many_in_a_row_end_the_run(saved: tuple[int, ...], kept: str, tmp_path: Path) -> None:
    def settle() -> None:
        """Complete the checkpoints that are under way."""
        for step in saved:
            (tmp_path / f"step-{step:08d}").mkdir()
            (tmp_path / f"step-{step:08d}" / "manifest.json").touch()

    with pytest.raises(RunFailed, match=f"3 steps in a row up to step 4 .* {kept}"):
        check_skipped(_steps([False, True, True, True]), CONFIG, Said(), tmp_path, settle=settle)


def test_checkpoints_that_cannot_be_read_are_told_with_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunFailed, match=r"checkpoints cannot be read \(Not a directory\); a lower"):
        check_skipped(_steps([True] * 3), CONFIG, Said(), tmp_path / "checkpoints", settle=lambda: None)


def _optimizer(mesh: Mesh) -> StageOptimizer:
    stage = build_stage(tiny_config("llama"), pp=mesh.pp, tp=mesh.tp, dtype=torch.float32)
    for parameter in stage.parameters():
        torch.nn.init.ones_(parameter)
    rate = LearningRate(peak=1e-3, warmup_steps=0, total_steps=2)
    return StageOptimizer.of_stages([stage], mesh, OptimizerOptions(), rate)


def test_looking_through_all_weights_marks_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does copying them: offloaded ones may take longer than a hang is waited for."""
    mesh = Mesh.single()
    optimizer, marks = _optimizer(mesh), []
    num_parts = sum(len(parts) for _, parts in optimizer.state())
    monkeypatch.setattr(mesh.activity, "mark", lambda: marks.append(None))
    refuse_not_finite(optimizer, mesh, Progress(step=7))
    assert len(marks) == num_parts > 10
    with Saver(tmp_path, optimizer, mesh, keep=1) as saver:
        saver.save(7, {})
        assert len(marks) == 2 * num_parts


@pytest.mark.parametrize("name", ["weight", "exp_avg", "exp_avg_sq"])
def test_what_is_not_finite_is_not_saved(name: str) -> None:
    optimizer = _optimizer(Mesh.single())
    _, parts = optimizer.state()[-1]
    # Finite, though their sum is not.
    parts[name].write(torch.full_like(parts[name].read(), torch.finfo(torch.float32).max))
    refuse_not_finite(optimizer, Mesh.single(), Progress(step=7))
    parts[name].write(parts[name].read().clone().index_fill_(0, torch.tensor(0), float("inf")))
    with pytest.raises(RunFailed, match="not finite after step 7"):
        refuse_not_finite(optimizer, Mesh.single(), Progress(step=7))
