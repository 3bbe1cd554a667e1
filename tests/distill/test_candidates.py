"""Shapes of a budget, judged by cutting them: the same choice in every layout, by the perplexity of the model that is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from distill.config import Config, Data, MeshShape, Teacher, Train
from distill.data import IGNORE, spread_microbatches
from distill.packing import Row
from distill.prune import load_kept
from distill.step import messages
from distill.student import prune_teacher
from distill.student_config import Prune, Student
from parallel.mesh import Mesh
from parallel.model import build_stage
from parallel.pipeline.p2p import Links
from parallel.weights import load_weights
from tests.families import save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

SEQ_LEN = 9
TEACHER = tiny_config("qwen3", num_hidden_layers=6, hidden_size=64, intermediate_size=1536)
LAYOUTS = [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}, {"pp": 1, "dp": 2, "tp": 1}]
PRUNE = Prune(method="l1", target_params="65%", candidates=3, num_key_value_heads=4)


class _Text(list):
    """Rows as the loader gives them."""

    seq_len, pad_token_id = SEQ_LEN, 0


def _rows() -> _Text:
    random = np.random.default_rng(3)
    return _Text(
        Row(random.integers(3, 97, SEQ_LEN), np.arange(SEQ_LEN), random.integers(3, 97, SEQ_LEN))
        for _ in range(4)
    )


def _prune(folder: Path, mesh: Mesh, target: Path, previous: Path | None = None) -> None:
    teacher = build_stage(TEACHER, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False)
    load_weights(teacher, folder)
    shape = MeshShape(pp=mesh.pp.size, dp=mesh.dp.size, tp=mesh.tp.size)
    config = Config(
        teacher=Teacher(model=str(folder)),
        student=Student(prune=PRUNE),
        mesh=shape,
        data=Data(seq_len=SEQ_LEN),
        train=Train(dtype="float64", microbatch_size=1, global_batch_size=4),
    )
    judging = spread_microbatches(
        _rows(), microbatch_size=1, num_rows=4, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size
    )
    prune_teacher(
        config,
        mesh,
        teacher=teacher,
        teacher_config=TEACHER,
        teacher_folder=folder,
        links=Links(mesh, messages(None, teacher, rows=1, seq_len=SEQ_LEN)),
        microbatches=[],
        judging=judging,
        target=target,
        previous=previous,
    )


def _in_layouts(folder: Path, root: Path) -> None:
    for number, layout in enumerate(LAYOUTS):
        _prune(folder, Mesh.create(**layout), root / f"run-{number}" / "pruned")


def _perplexity(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    batches = spread_microbatches(_rows(), microbatch_size=1, num_rows=4, dp_rank=0, dp_size=1)
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
        labels = batch.labels_BS.flatten()
        total += F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum", ignore_index=IGNORE).item()
        count += int((labels != IGNORE).sum())
    return math.exp(total / count)


def test_a_later_rounds_shapes_are_judged_with_the_weights_that_were_trained(tmp_path: Path) -> None:
    folder, run = save_tiny(tmp_path / "teacher", TEACHER), tmp_path / "run"
    _prune(folder, Mesh.single(), run / "pruned")
    student = AutoModelForCausalLM.from_pretrained(run / "pruned", dtype=torch.float64)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    student.save_pretrained(run / "pruned")
    _prune(folder, Mesh.single(), run / "pruned-1", run / "pruned")
    first, second = (
        json.loads((run / name).read_text()) for name in ("candidates.json", "candidates-1.json")
    )
    assert [row["shape"] for row in first] == [row["shape"] for row in second]
    (taken,) = (row for row in second if row["taken"])
    assert math.isclose(taken["perplexity"], _perplexity(run / "pruned-1"), rel_tol=1e-6)
    assert not {row["perplexity"] for row in first} & {row["perplexity"] for row in second}


def test_every_layout_takes_the_shape_with_the_lowest_perplexity(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", TEACHER)
    limit = 0.65 * sum(parameter.numel() for parameter in tiny_model(TEACHER).parameters())
    alone = tmp_path / "alone" / "pruned"
    _prune(folder, Mesh.single(), alone)
    rows = json.loads((alone.parent / "candidates.json").read_text())
    assert len(rows) == 3 and all(row["parameters"] <= limit for row in rows)
    (taken,) = (row for row in rows if row["taken"])
    assert taken["perplexity"] == min(row["perplexity"] for row in rows)
    assert len({row["perplexity"] for row in rows}) == 3
    assert math.isclose(taken["perplexity"], _perplexity(alone), rel_tol=1e-6)
    kept, _ = load_kept(alone)
    assert len(kept.layers) == taken["shape"]["num_layers"]
    assert not list(alone.parent.glob(".candidate*"))
    run_distributed(2, _in_layouts, folder, tmp_path)
    for number in range(len(LAYOUTS)):
        others = json.loads((tmp_path / f"run-{number}" / "candidates.json").read_text())
        for mine, other in zip(rows, others, strict=True):
            assert mine["taken"] == other["taken"] and mine["parameters"] == other["parameters"]
            assert math.isclose(mine["perplexity"], other["perplexity"], rel_tol=1e-9)
