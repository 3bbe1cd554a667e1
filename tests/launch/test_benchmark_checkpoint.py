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
    options = {"teacher": folders[0], "student": folders[1], "seq_len": 16, "every": 4, "turns": 1}
    rows = checkpoint.run(options)
    assert [row["peer_name"] for row in rows] == ["no saving", "a step"]
    assert [row["bound"] for row in rows] == [1.03, None]
    assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in rows)
    said = capsys.readouterr().err
    assert said.count("no saving: ") == said.count("ms in save: ") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 4}, "tokens is no option; use teacher, "),
        ({"every": 0}, "every=0; use a whole number, 1 or more"),
        ({"turns": 1.5}, "turns=1.5; use a whole number"),
        ({"seq_len": 1}, "seq_len=1; use a whole number, 2 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpoint.run(options)
