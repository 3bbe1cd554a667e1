"""Scores on disk, and how the pieces of ranks join."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.scores import Measured, Piece, Scores, unite
from distill.structure import Sizes
from parallel.mesh import Mesh
from tests.workers import run_distributed

SIZES = Sizes(hidden=2, ffn=5, heads=1, groups=1, head_width=2, vocabulary=3, layers=2)


def _scores() -> Scores:
    return Scores(
        method="activation",
        ffn={0: torch.rand(5), 3: torch.rand(5)},
        groups={0: torch.rand(2), 3: torch.rand(2)},
        hidden=torch.rand(4),
        layers={0: 0.1 + 0.2, 3: 1e-17},
    )


def test_scores_survive_the_file(tmp_path: Path) -> None:
    scores = _scores()
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.method == scores.method and loaded.layers == scores.layers
    assert torch.equal(loaded.hidden, scores.hidden)
    for layer in scores.layers:
        assert torch.equal(loaded.ffn[layer], scores.ffn[layer])
        assert torch.equal(loaded.groups[layer], scores.groups[layer])


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    scores = _scores()
    scores.save(file, {"teacher": "a"})
    Scores.load(file, {"teacher": "a"})
    with pytest.raises(ValueError, match="of something else"):
        Scores.load(file, {"teacher": "b"})
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="other importance scores than were written"):
        Scores.load(file)
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match="holds no importance scores"):
        Scores.load(file)


def test_scores_that_are_not_finite_name_the_layer() -> None:
    scores = _scores()
    scores.groups[3][1] = torch.nan
    with pytest.raises(ValueError, match="layer 3"):
        scores.check()


def _unite() -> dict[int, dict[str, torch.Tensor]]:
    mesh = Mesh.create(pp=1, dp=2, tp=2)
    tp, dp = mesh.tp.rank, mesh.dp.rank
    shard = torch.tensor([1.0, 2.0, 3.0] if tp == 0 else [4.0, 5.0], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    pieces = {
        (0, "sharded tokens"): Piece(shard * (dp + 1), start=3 * tp, whole=5, add_over_dp=True),
        (0, "sharded weights"): Piece(shard, start=3 * tp, whole=5),
        (0, "replicated tokens"): Piece(ones * (dp + 1), start=0, whole=2, add_over_dp=True),
        (0, "partial weights"): Piece(ones * (tp + 1), start=0, whole=2, add_over_tp=True),
    }
    return unite(Measured("l1", SIZES, pieces), mesh)


def test_pieces_join_over_tp_and_dp() -> None:
    for by_layer in run_distributed(4, _unite):
        assert {quantity: values.tolist() for quantity, values in by_layer[0].items()} == {
            "sharded tokens": [3.0, 6.0, 9.0, 12.0, 15.0],
            "sharded weights": [1.0, 2.0, 3.0, 4.0, 5.0],
            "replicated tokens": [3.0, 3.0],
            "partial weights": [3.0, 3.0],
        }
