"""Judge the shapes that meet a budget by cutting each as the student would be cut, and take the best.

Decides that a candidate is judged as it is cut (out of the teacher, or in a later round out of what was trained), without
further training, by its perplexity on a few held-out rows, in the layout of the run: cut by rank 0 into a folder beside the
student's, loaded by all ranks, judged, thrown away. What is left is `candidates.json` in the run's folder, of later rounds
`candidates-N.json`. Perplexity without training favours cuts that training would catch up with
differently; the shapes are therefore few and all of them sensible (`distill.search`), and the list is printed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from distill.balance import split_models
from distill.config import Config
from distill.data import MicroBatch
from distill.evaluate import evaluate
from distill.forward import forward_links
from distill.loading import load_stages
from distill.pretrained import load_config
from distill.search import Candidate
from distill.shape import Shape
from parallel.collectives import barrier
from parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PretrainedConfig

JUDGED_ROWS = 16
"""Held-out rows that candidates are judged by, at most."""


def best_shape(
    config: Config,
    mesh: Mesh,
    candidates: Sequence[Candidate],
    *,
    write: Callable[[Path, Shape], None],
    teacher_config: PretrainedConfig,
    judging: Sequence[MicroBatch],
    record: Path,
) -> Shape:
    """Return the shape whose untrained student has the lowest perplexity; of equal ones the first.

    Args:
        write: cuts a student of a shape into a folder; called on rank 0.
        judging: this replica's share of the held-out rows.
        record: file for the list; beside it lies for a while each candidate.
    Collectives: for each candidate those of loading and evaluating it, and barriers over the world.
    """
    perplexities: list[float] = []
    for number, candidate in enumerate(candidates):
        target = record.with_name(f".candidate-{number}")
        if mesh.world.is_first:
            # A run that was killed may have left one.
            shutil.rmtree(target, ignore_errors=True)
            write(target, candidate.shape)
        barrier(mesh.world)
        perplexities.append(_perplexity(config, mesh, target, teacher_config, judging))
        barrier(mesh.world)
        if mesh.world.is_first:
            shutil.rmtree(target)
            _say(candidate, perplexities[-1], number=number)
    comparable = [value if math.isfinite(value) else math.inf for value in perplexities]
    best = comparable.index(min(comparable))
    if mesh.world.is_first:
        rows = [
            {
                "parameters": candidate.num_parameters,
                "perplexity": perplexity,
                "taken": number == best,
                "shape": asdict(candidate.shape),
            }
            for number, (candidate, perplexity) in enumerate(zip(candidates, perplexities, strict=True))
        ]
        record.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(f"taken: number {best + 1}; all are in {record}", flush=True)
    return candidates[best].shape


def _perplexity(
    config: Config, mesh: Mesh, folder: Path, teacher_config: PretrainedConfig, judging: Sequence[MicroBatch]
) -> float:
    student_config = load_config(folder, key="student.prune.target_params")
    layers = split_models(config, teacher_config, student_config).student
    stages = load_stages(
        folder,
        student_config,
        config,
        mesh,
        trainable=False,
        key="student.prune.target_params",
        layers=layers,
    )
    with closing(forward_links(config, mesh, stages, None, num_stages=len(layers))) as links:
        return evaluate(mesh, links, judging, students=stages).perplexity


def _say(candidate: Candidate, perplexity: float, *, number: int) -> None:
    """Print one line of the table, under its header if it is the first."""
    shape = candidate.shape
    cells = {
        "number": number + 1,
        "parameters": f"{candidate.num_parameters / 1e6:.2f} M",
        "layers": shape.num_layers,
        "hidden": shape.hidden_size,
        "feed-forward": shape.intermediate_size,
        "heads": shape.num_attention_heads,
        "groups": shape.num_key_value_heads,
        "perplexity": f"{perplexity:.4g}",
    }
    if number == 0:
        print("  ".join(f"{name:>12}" for name in cells))
    print("  ".join(f"{value:>12}" for value in cells.values()), flush=True)
