"""The teacher's scores and the student cut by them: the same in every layout as on one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.config import Config, Prune, Student, Teacher
from distill.data import IGNORE, Rows, sequential_microbatches
from distill.packing import Row
from distill.scores import Scores
from distill.step import messages
from distill.structure import Sizes
from distill.student import SCORES_FILE, prune_teacher, score_teacher
from parallel.mesh import Mesh
from parallel.model import StageModel, build_stage
from parallel.pipeline.p2p import Links
from parallel.weights import load_weights
from tests.families import save_tiny, tiny_config
from tests.workers import run_distributed

SEQ_LEN, SIZE = 9, 2
TEACHER = tiny_config("qwen3", num_hidden_layers=3, tie_word_embeddings=False)
LAYOUTS = [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}, {"pp": 1, "dp": 2, "tp": 1}]
# Rows of text: enough for both replicas; one micro-batch alone; a single row.
NUM_ROWS = (7, 2, 1)


class _Text(list):
    """Rows as the loader gives them: a list with a length of row and a padding id."""

    seq_len, pad_token_id = SEQ_LEN, 0


def _rows() -> Rows:
    random = np.random.default_rng(3)
    rows = _Text()
    for _ in range(max(NUM_ROWS)):
        labels = random.integers(3, 97, SEQ_LEN)
        labels[random.random(SEQ_LEN) < 0.3] = IGNORE
        rows.append(Row(random.integers(3, 97, SEQ_LEN), np.arange(SEQ_LEN), labels))
    return rows


def _share(mesh: Mesh, num_rows: int) -> list:
    return sequential_microbatches(
        _rows(), microbatch_size=SIZE, num_rows=num_rows, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size
    )


def _teacher(folder: Path, mesh: Mesh, num_slices: int = 1) -> tuple[StageModel, Links]:
    stage = build_stage(
        TEACHER, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False, num_slices=num_slices
    )
    load_weights(stage, folder)
    return stage, Links(mesh, messages(None, stage, rows=SIZE, seq_len=SEQ_LEN))


def _scores(folder: Path, mesh: Mesh, num_slices: int = 1) -> list[Scores]:
    stage, links = _teacher(folder, mesh, num_slices)
    scores = [
        score_teacher(stage, mesh, links, _share(mesh, num_rows), method="activation")
        for num_rows in NUM_ROWS
    ]
    # No text at all: `l1` must not look at it.
    return [*scores, score_teacher(stage, mesh, links, [], method="l1")]


def _in_layouts(folder: Path) -> list[list[Scores]]:
    return [_scores(folder, Mesh.create(**layout), num_slices) for layout in LAYOUTS for num_slices in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("teacher"), TEACHER)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _compare(mine: Scores, expected: Scores) -> None:
    assert mine.method == expected.method
    assert sorted(mine.layers) == sorted(expected.layers) == [0, 1, 2]
    torch.testing.assert_close(mine.hidden, expected.hidden, rtol=1e-6, atol=0)
    for layer in range(3):
        assert mine.layers[layer] == pytest.approx(expected.layers[layer], rel=1e-9)
        for scores, others in ((mine.ffn, expected.ffn), (mine.groups, expected.groups)):
            torch.testing.assert_close(scores[layer], others[layer], rtol=1e-6, atol=0)


def test_scores_do_not_depend_on_the_layout(folder: Path) -> None:
    expected = _scores(folder, Mesh.single())
    for some, others in ((0, 1), (1, 2), (0, 3)):
        assert not torch.equal(expected[some].hidden, expected[others].hidden), "each text must count"
    ranks = run_distributed(2, _in_layouts, folder)
    for rank in ranks:
        for scores in rank:
            for mine, single in zip(scores, expected, strict=True):
                _compare(mine, single)
    for first, second in zip(*ranks, strict=True):
        for mine, other in zip(first, second, strict=True):
            assert torch.equal(mine.hidden, other.hidden) and mine.layers == other.layers


def test_padding_and_positions_without_a_label_do_not_count(folder: Path) -> None:
    mesh = Mesh.single()
    stage, links = _teacher(folder, mesh)
    (batch,) = _share(mesh, 1)
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


def _config(folder: Path) -> Config:
    prune = Prune(num_layers=2, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    return Config(teacher=Teacher(model=str(folder)), student=Student(prune=prune))


def _prune(folder: Path, mesh: Mesh, target: Path) -> float:
    stage, links = _teacher(folder, mesh)
    return prune_teacher(
        _config(folder),
        mesh,
        teacher=stage,
        teacher_config=TEACHER,
        teacher_folder=folder,
        links=links,
        microbatches=_share(mesh, 7),
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
        _compare(Scores.load(run / SCORES_FILE), Scores.load(alone.parent / SCORES_FILE))


def test_a_student_that_is_there_is_kept(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "pruned"
    target.mkdir()
    (target / "mine").write_text("x")
    assert _prune(folder, Mesh.single(), target) == 0
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert not (tmp_path / SCORES_FILE).exists()
