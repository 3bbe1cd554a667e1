"""A whole run whose student is sparse: what it writes, and scores that a second cut finds again."""

from __future__ import annotations

import json
import re
from pathlib import Path

from distill.structure import MATRICES
from launch import distill, prune
from launch.export import export
from tests.commands.tiny_run import Inputs, call, same_weights, weights

SETTINGS = (
    "student.prune.method=l2",
    "student.prune.depth_method=leave_one_out",
    "student.sparsity.method=wanda",
    "student.sparsity.pattern=2:4",
    "student.sparsity.schedule=cubic",
    "student.sparsity.steps=3",
    "train.steps=4",
)


def zeros(folder: Path) -> dict[str, list[bool]]:
    return {name: (weight == 0).tolist() for name, weight in weights(folder).items()}


def test_a_later_round_measures_the_student_that_it_begins_with(inputs: Inputs, tmp_path: Path) -> None:
    """Masks are those of a run that is given the earlier round's student."""
    sparse = "{method: wanda, pattern: '2:4'}"
    rounds = f"rounds=[{{}}, {{student: {{sparsity: {sparse}}}}}]"
    few = ("train.steps=2", "optimizer.lr=0.05")
    both = call(distill.COMMAND, inputs.settings(tmp_path / "both", rounds, *few))
    assert both.code == 0, both.err
    ready = f"student.model={tmp_path / 'both' / 'round-0'}"
    alone = call(
        distill.COMMAND, inputs.settings(tmp_path / "alone", ready, f"student.sparsity={sparse}", *few)
    )
    assert alone.code == 0, alone.err
    assert zeros(tmp_path / "both" / "student") == zeros(tmp_path / "alone" / "student")


def test_a_student_that_is_not_trained_has_the_zeros_too(inputs: Inputs, tmp_path: Path) -> None:
    """Those that a run holds from its first step on; `student.sparsity.schedule` speaks of steps, and there are none."""
    sparse = ("student.sparsity.method=wanda", "student.sparsity.ratio=0.25")
    done = call(
        prune.COMMAND, inputs.settings(tmp_path / "alone", *sparse, "student.sparsity.schedule=cubic")
    )
    assert done.code == 0, done.err
    run = call(distill.COMMAND, inputs.settings(tmp_path / "run", *sparse, "train.steps=1"))
    assert run.code == 0, run.err
    found = zeros(tmp_path / "alone" / "student")
    assert found == zeros(tmp_path / "run" / "student")
    assert all(any(map(any, rows)) for name, rows in found.items() if "_proj." in name)
    card = (tmp_path / "alone" / "student" / "README.md").read_text()
    assert "25.0% of the weights of the layers' linears are zero (unstructured)" in card


def test_a_sparse_student_is_named_and_its_teacher_scored_once(inputs: Inputs, tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", *SETTINGS, cache))
    assert done.code == 0, done.err
    assert "scoring" in done.out and "on 8 rows of text" in done.out
    student = weights(tmp_path / "run" / "student")
    linears = [name for name in student if re.sub(r".*layers\.\d+\.|\.weight$", "", name) in MATRICES]
    assert len(linears) == 3 * 7
    for name, weight in student.items():
        zeros = (weight.reshape(-1, 4) == 0).sum(dim=1)
        assert (zeros == (2 if name in linears else 0)).all(), name
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["sparsity"] == {"pattern": "2:4", "share": 0.5}
    assert "50.0% of the weights of the layers' linears are zero (2:4)" in (
        (tmp_path / "run" / "student" / "README.md").read_text()
    )
    # The zeros and what is said of them come out of a checkpoint too.
    export([f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'step-00000004'}", f"out={tmp_path / 'out'}"])
    assert same_weights(tmp_path / "out", tmp_path / "run" / "student")
    assert "50.0% of the weights of the layers' linears are zero (2:4)" in (
        (tmp_path / "out" / "README.md").read_text()
    )

    again = call(distill.COMMAND, inputs.settings(tmp_path / "again", *SETTINGS, cache, "train.steps=3"))
    assert again.code == 0 and "those measured before" in again.out and "scoring" not in again.out
    scores = [(tmp_path / run / "scores.safetensors").read_bytes() for run in ("run", "again")]
    assert scores[0] == scores[1]
