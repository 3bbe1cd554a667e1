"""The teacher's scores by every method: against plain formulas, on every layout, and out of the cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.config import Config, Data, Teacher, Train
from distill.data import IGNORE, MicroBatch
from distill.importance import random_scores
from distill.scores import Scores
from distill.scoring import cached_scores, score_teacher
from distill.structure import Sizes
from distill.student_config import Prune, Student
from parallel.mesh import Mesh
from tests.distill.calibration import (
    LAYOUTS,
    NUM_ROWS,
    SEQ_LEN,
    TEACHER,
    compare,
    load_teacher,
    save_teacher,
    share,
)
from tests.families import tiny_model
from tests.workers import run_distributed

METHODS = [("activation", "leave_one_out"), ("l2", "block_influence"), ("random", None), ("l1", "random")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _scores(folder: Path, mesh: Mesh, num_slices: int = 1) -> list[Scores]:
    stage, links = load_teacher(folder, mesh, num_slices)
    scores = [
        score_teacher(stage, mesh, links, share(mesh, num_rows), method="activation") for num_rows in NUM_ROWS
    ]
    text = share(mesh, 3)
    scores += [score_teacher(stage, mesh, links, text, method=m, depth_method=d, seed=4) for m, d in METHODS]
    # No text at all: these must not look at it.
    return [*scores, *(score_teacher(stage, mesh, links, [], method=method) for method in ("l1", "l2"))]


def _in_layouts(folder: Path, layouts: list[dict[str, int]]) -> list[list[Scores]]:
    return [_scores(folder, Mesh.create(**layout), num_slices) for layout in layouts for num_slices in (1, 2)]


def _check_layouts(folder: Path, ranks: list[list[list[Scores]]]) -> None:
    expected = _scores(folder, Mesh.single())
    for some, others in ((0, 1), (1, 2), (0, -1)):
        assert not torch.equal(expected[some].hidden, expected[others].hidden), "each text must count"
    for rank in ranks:
        for scores in rank:
            for mine, single in zip(scores, expected, strict=True):
                compare(mine, single)
    for other in ranks[1:]:
        for mine, others in zip(chain(*ranks[0]), chain(*other), strict=True):
            assert torch.equal(mine.hidden, others.hidden) and mine.layers == others.layers


def test_scores_do_not_depend_on_the_layout(folder: Path) -> None:
    _check_layouts(folder, run_distributed(2, _in_layouts, folder, LAYOUTS))


@pytest.mark.slow
def test_scores_do_not_depend_on_the_layout_of_four(folder: Path) -> None:
    _check_layouts(folder, run_distributed(4, _in_layouts, folder, [{"pp": 2, "dp": 1, "tp": 2}]))


def _cross_entropy(model: nn.Module, batches: list[MicroBatch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
        labels = batch.labels_BS
        total += F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += int((labels != IGNORE).sum())
    return total / count


def test_a_layer_left_out_counts_what_the_loss_rises_without_it(folder: Path) -> None:
    mesh = Mesh.single()
    stage, links = load_teacher(folder, mesh, num_slices=2)
    text = share(mesh, 7)
    scores = score_teacher(stage, mesh, links, text, method="random", depth_method="leave_one_out")
    model = tiny_model(TEACHER)
    layers = list(model.model.layers)
    base = _cross_entropy(model, text)
    for left_out in range(3):
        model.model.layers = nn.ModuleList(layers[:left_out] + layers[left_out + 1 :])
        rise = _cross_entropy(model, text) - base
        assert abs(rise) > 1e-3 and scores.layers[left_out] == pytest.approx(rise, abs=1e-9)
    assert score_teacher(stage, mesh, links, text, method="activation").layers != scores.layers
    assert _scores(folder, mesh)[0].hidden.equal(_scores(folder, mesh, 2)[0].hidden)


def test_widths_and_layers_are_scored_by_methods_of_their_own(folder: Path) -> None:
    mesh = Mesh.single()
    stage, links = load_teacher(folder, mesh)
    text = share(mesh, 2)
    whole = {
        method: score_teacher(stage, mesh, links, text, method=method, seed=1)
        for method in ("activation", "l1", "l2", "random")
    }
    assert all(sorted(scores.layers) == [0, 1, 2] for scores in whole.values())
    depths = {"block_influence": whole["activation"].layers, "random": whole["random"].layers}
    for method, alone in whole.items():
        for depth, layers in depths.items():
            mixed = score_teacher(stage, mesh, links, text, method=method, depth_method=depth, seed=1)
            assert mixed.layers == layers and mixed.depth_method == depth and mixed.method == method
            assert mixed.hidden.equal(alone.hidden)
            assert all(mixed.ffn[layer].equal(alone.ffn[layer]) for layer in range(3))
            assert all(mixed.groups[layer].equal(alone.groups[layer]) for layer in range(3))


def test_random_depends_on_the_seed_alone() -> None:
    sizes = Sizes.of(TEACHER)
    torch.manual_seed(1)
    np.random.seed(1)
    first = random_scores(sizes, 5)
    again, other = random_scores(sizes, 5), random_scores(sizes, 6)
    compare(again, first)
    assert first.hidden.equal(again.hidden) and not first.hidden.equal(other.hidden)
    assert first.layers != other.layers and not first.ffn[0].equal(first.ffn[1])


def test_padding_and_positions_without_a_label_do_not_count(folder: Path) -> None:
    mesh = Mesh.single()
    stage, links = load_teacher(folder, mesh)
    (batch,) = share(mesh, 1)
    changed = batch.input_ids_BS.clone()
    # The last position is seen by no other one, and the second row is padding.
    labels = batch.labels_BS.clone()
    labels[0, -1] = IGNORE
    changed[0, -1] += 1
    changed[1] = 11
    expected, mine = (
        score_teacher(
            stage, mesh, links, [replace(batch, input_ids_BS=ids, labels_BS=labels)], method="activation"
        )
        for ids in (batch.input_ids_BS, changed)
    )
    assert torch.equal(mine.hidden, expected.hidden) and mine.layers == expected.layers
    with pytest.raises(ValueError, match="no position"):
        score_teacher(
            stage,
            mesh,
            links,
            [replace(batch, labels_BS=torch.full_like(labels, IGNORE))],
            method="activation",
        )
    assert not any(module._forward_hooks for module in stage.modules()), "hooks stay behind"


def _config(folder: Path, cache: Path, **prune: str) -> Config:
    return Config(
        teacher=Teacher(model=str(folder)),
        student=Student(prune=Prune(calibration_rows=7, **prune)),
        data=Data(cache_dir=str(cache), seq_len=SEQ_LEN),
        train=Train(dtype="float64"),
    )


def _cached(
    config: Config, folder: Path, mesh: Mesh, *, num_rows: int = 5, other_token: bool = False
) -> Scores:
    """Five rows fill up their micro-batches with fewer rows on one process than on two replicas."""
    stage, links = load_teacher(folder, mesh)
    text = share(mesh, num_rows)
    if other_token:
        text[0].input_ids_BS[0, 0] ^= 1
    scores, _ = cached_scores(
        config,
        mesh,
        teacher=stage,
        teacher_folder=folder,
        links=links,
        microbatches=text,
    )
    return scores


def _cached_twice(config: Config, folder: Path) -> Scores:
    """Score on two replicas what one process has scored before."""
    return _cached(config, folder, Mesh.create(pp=1, dp=2, tp=1))


def test_scores_are_measured_once(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    single, cache = Mesh.single(), tmp_path / "cache"
    config = _config(folder, cache)
    first = _cached(config, folder, single)
    (file,) = (cache / "scores").iterdir()
    assert "scoring" in capfd.readouterr().out
    written = file.stat().st_mtime_ns
    for scores in run_distributed(2, _cached_twice, config, folder):
        assert scores.hidden.equal(first.hidden) and scores.layers == first.layers
    assert file.stat().st_mtime_ns == written and "scoring" not in capfd.readouterr().out

    # Whatever they depend on makes other ones, and nothing else does.
    _cached(_config(folder, cache, method="l1"), folder, single)
    _cached(_config(folder, cache, method="l1"), folder, single, num_rows=2)
    assert len(list(file.parent.iterdir())) == 2
    in_bfloat16 = replace(_config(folder, cache, method="l1"), train=Train(dtype="bfloat16"))
    _cached(in_bfloat16, folder, single)
    assert len(list(file.parent.iterdir())) == 3
    # Neither text nor type: the same scores on any machine.
    at_random = _config(folder, cache, method="random")
    _cached(at_random, folder, single)
    _cached(replace(at_random, train=Train(dtype="bfloat16")), folder, single, num_rows=2)
    assert len(list(file.parent.iterdir())) == 4
    _cached(config, folder, single, num_rows=2)
    _cached(config, folder, single, other_token=True)
    _cached(_config(folder, cache, depth_method="random"), folder, single)
    other = save_teacher(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    _cached(config, other, single)
    assert len(list(file.parent.iterdir())) == 8


@pytest.mark.parametrize("place", [0.5, 0.95], ids=["header", "tensor"])
def test_a_damaged_cache_is_told_and_made_again(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], place: float
) -> None:
    config = _config(folder, tmp_path, method="l2")
    first = _cached(config, folder, Mesh.single())
    (file,) = (tmp_path / "scores").iterdir()
    whole = bytearray(file.read_bytes())
    whole[int(len(whole) * place)] ^= 1
    file.write_bytes(whole)
    capfd.readouterr()
    compare(_cached(config, folder, Mesh.single()), first)
    assert "measured again, since the cached ones are damaged" in capfd.readouterr().out
    compare(Scores.load(file), first)
