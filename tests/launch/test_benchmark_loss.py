from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.config import ConfigError
from launch.benchmarks import loss

SMALL = {"tokens": 32, "hidden": 8}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_both_sides_compute_the_same(dtype: str) -> None:
    problem = loss._Problem(97, loss._Options(dtype=dtype, **SMALL))
    ours, naive = loss._Ours(problem), loss._Naive(problem)
    limit = loss._TOLERANCE[dtype]
    for found, expected in zip(ours(), naive(), strict=True):
        assert (found - expected).double().norm() <= limit * expected.double().norm()
    assert (ours.grad_weight - naive.grad_weight).norm() <= limit * naive.grad_weight.norm()
    assert torch.count_nonzero(ours.grad_weight) == ours.grad_weight.numel()


def test_rows_compare_time_and_memory() -> None:
    rows = loss.run({"vocab": 20011, "repeats": 1, **SMALL})
    assert [row["bound"] for row in rows] == [1.0, 0.1]
    for row in rows:
        assert row["ratio"] == row["ours"] / row["peer"] > 0
        assert "V 20011" in row["case"]
    # Two [tokens, V] float32 at least, and none of them here.
    assert rows[1]["peer"] > 2 * 32 * 20011 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 10}, "vocabulary is no option; use vocab, "),
        ({"vocab": [97, 1]}, "vocab=1; use a whole number, 2 or more"),
        ({"repeats": 0}, "repeats=0; use a whole number, 1 or more"),
        ({"dtype": "float8"}, "dtype=float8; use float64, float32 or bfloat16"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loss.run(options)
