"""Benchmark `zero`: the rows, that all sides make the same parameters, and which options it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from distill.config import ConfigError
from launch.benchmarks import zero


@pytest.mark.slow
@pytest.mark.parametrize("engines", [["torch"], ["torch", "deepspeed"]])
def test_rows_compare_each_engine_with_replicas_that_hold_everything(engines: list[str]) -> None:
    rows = zero.run({"dp": 2, "layers": 2, "hidden": 48, "turns": 3, "engines": engines})
    assert len(rows) == 3 * len(engines) and {row["peer_name"] for row in rows} == {zero.PEER}
    for held, peak, seconds in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert held["ratio"] == pytest.approx(0.5, abs=0.01) and held["ratio"] <= held["bound"]
        assert peak["ours"] >= held["ours"] and peak["peer"] >= held["peer"]
        assert all(row["ratio"] == row["ours"] / row["peer"] > 0 for row in (held, peak, seconds))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dq": 2}, "dq is no option; use dp"),
        ({"dp": [1, 2]}, "dp=1; use a whole number, 2 or more"),
        ({"turns": 1}, "turns=1; use a whole number, 2 or more"),
        ({"engines": "apex"}, "engines=apex; use torch or deepspeed"),
        ({"dtype": "int8"}, "dtype=int8; use bfloat16 or float32"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        zero.run(options)
