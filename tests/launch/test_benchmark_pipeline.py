from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.config import ConfigError
from launch.benchmarks import pipeline
from launch.benchmarks._inputs import check_losses
from launch.benchmarks._pipeline_sides import PEER, Job, _Part
from tests.families import save_tiny, tiny_config


def _folder(path: Path, width: int) -> str:
    config = tiny_config(
        "llama", intermediate_size=width, tie_word_embeddings=True, attention_bias=False, mlp_bias=False
    )
    return str(save_tiny(path, config, seed=width, dtype=torch.float32))


def test_the_peers_parts_are_the_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(_folder(tmp_path, 48), dtype=torch.float32)
    input_ids = Job(student=str(tmp_path), seq_len=16, microbatches=2).input_ids(0)
    expected = model(input_ids).logits
    hidden = input_ids
    for rank in range(3):
        hidden = _Part(model, rank, 3)(hidden)
    assert torch.equal(hidden, expected)


@pytest.mark.slow
def test_rows_compare_fill_with_theory_and_all_other_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That losses agree, before and after an update, is checked by the benchmark itself."""
    rows = pipeline.run(
        {
            "teacher": _folder(tmp_path / "teacher", 96),
            "student": _folder(tmp_path / "student", 48),
            "microbatches": 3,
            "seq_len": 16,
            "turns": 1,
        }
    )
    assert [row["peer_name"].partition(" (")[0] for row in rows] == [
        "least possible",
        "its plan",
        "its plan, from the first steps",
        "ours, inline",
        "ours, batch",
        "torch Schedule1F1B",
    ]
    assert len({(row["case"], row["ours"]) for row in rows}) == 1
    assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in rows)
    assert rows[0]["peer"] <= 1.001 * rows[1]["peer"]
    said = capsys.readouterr().err
    assert all(f"{side}: 0." in said for side in ("fill", "inline", "batch", PEER)), said


def test_sides_that_compute_something_else_are_found() -> None:
    check_losses({"fill": [2.0, 1.0], PEER: [2.001, 1.0]})
    for wrong in ([2.01, 1.0], [2.0, 1.01]):
        with pytest.raises(AssertionError, match=PEER):
            check_losses({"fill": [2.0, 1.0], PEER: wrong})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 4}, "tokens is no option; use teacher, "),
        ({"pp": 1}, "pp=1; use a whole number, 2 or more"),
        ({"microbatches": 2, "pp": 4}, "microbatches=2 is less than pp=4"),
        ({"sides": ["fill", "gpipe"]}, "sides=gpipe; use fill, inline, batch or torch_1f1b"),
        ({"sides": "inline"}, "sides must name fill"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.run(options)
