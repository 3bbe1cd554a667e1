from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import ConfigError
from launch.benchmarks import checkpoint
from tests.families import save_tiny, tiny_config


@pytest.mark.slow
def test_rows_compare_saving_with_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("llama", tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
    folders = [
        str(save_tiny(tmp_path / name, config, dtype=torch.float32)) for name in ("teacher", "student")
    ]
    options = {"teacher": folders[0], "student": folders[1], "seq_len": 16, "turn": 4, "pairs": 2}
    rows = checkpoint.run(options)
    assert [row["peer_name"] for row in rows] == 3 * ["10 steps without"] + ["a step"]
    assert [row["bound"] for row in rows] == [0.03, None, None, None]
    assert all(row["ratio"] == row["ours"] / row["peer"] for row in rows)
    said = capsys.readouterr().err
    assert said.count("no saving: ") == said.count("ms in save: ") == 3


def test_the_cost_is_that_of_the_pairs() -> None:
    chosen = checkpoint._Options(turn=2, every=10, pairs=3)
    none = [checkpoint._Result(step_s, 0.0) for step_s in (4.0, 6.0, 5.0)]
    # A checkpoint costs 1 s, whatever the machine does meanwhile.
    saving = [checkpoint._Result(each.step_s + 0.5, 0.2) for each in none]
    rows = checkpoint._rows(chosen, {False: none, True: saving})
    assert [row["ours"] for row in rows] == pytest.approx([1.0, 1.0, 1.0, 0.2])
    assert [row["ratio"] for row in rows] == pytest.approx([0.02, 0.02, 0.02, 0.04])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 4}, "tokens is no option; use teacher, "),
        ({"every": 0}, "every=0; use a whole number, 1 or more"),
        ({"pairs": 1}, "pairs=1; use a whole number, 2 or more"),
        ({"turn": 1.5}, "turn=1.5; use a whole number"),
        ({"seq_len": 1}, "seq_len=1; use a whole number, 2 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpoint.run(options)
