"""A tiny teacher and rows of text to score it on, for the tests of scoring and pruning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data import IGNORE, MicroBatch, Rows, spread_microbatches
from distill.packing import Row
from distill.scores import Scores
from distill.step import messages
from parallel.mesh import Mesh
from parallel.model import StageModel, build_stage
from parallel.pipeline.p2p import Links
from parallel.weights import load_weights
from tests.families import save_tiny, tiny_config

SEQ_LEN, SIZE = 9, 2
TEACHER = tiny_config("qwen3", num_hidden_layers=3, tie_word_embeddings=False)
LAYOUTS = [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}, {"pp": 1, "dp": 2, "tp": 1}]
# Rows of text: enough for both replicas; one micro-batch alone; a single row.
NUM_ROWS = (7, 2, 1)


class _Text(list):
    """Rows as the loader gives them: a list with a length of row and a padding id."""

    seq_len, pad_token_id = SEQ_LEN, 0


def rows() -> Rows:
    """Return the rows, some of their positions without a label."""
    random = np.random.default_rng(3)
    rows = _Text()
    for _ in range(max(NUM_ROWS)):
        labels = random.integers(3, 97, SEQ_LEN)
        labels[random.random(SEQ_LEN) < 0.3] = IGNORE
        rows.append(Row(random.integers(3, 97, SEQ_LEN), np.arange(SEQ_LEN), labels))
    return rows


def share(mesh: Mesh, num_rows: int) -> list[MicroBatch]:
    """Return this replica's micro-batches of evenly spaced rows."""
    return spread_microbatches(
        rows(), microbatch_size=SIZE, num_rows=num_rows, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size
    )


def save_teacher(folder: Path) -> Path:
    """Write the teacher with a tokenizer file; return the folder."""
    save_tiny(folder, TEACHER)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def load_teacher(folder: Path, mesh: Mesh, num_slices: int = 1) -> tuple[StageModel, Links]:
    """Return this rank's stage of the teacher, and channels for it."""
    stage = build_stage(
        TEACHER, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False, num_slices=num_slices
    )
    load_weights(stage, folder)
    return stage, Links(mesh, messages(None, stage, rows=SIZE, seq_len=SEQ_LEN))


def compare(mine: Scores, expected: Scores) -> None:
    """Assert that scores are the same up to the last digits."""
    assert (mine.method, mine.depth_method) == (expected.method, expected.depth_method)
    assert sorted(mine.layers) == sorted(expected.layers) == [0, 1, 2]
    torch.testing.assert_close(mine.hidden, expected.hidden, rtol=1e-6, atol=0)
    for layer in range(3):
        assert mine.layers[layer] == pytest.approx(expected.layers[layer], rel=1e-9)
        for scores, others in ((mine.ffn, expected.ffn), (mine.groups, expected.groups)):
            torch.testing.assert_close(scores[layer], others[layer], rtol=1e-6, atol=0)
