from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import _backward

from distill.config import ConfigError
from launch.benchmarks import schedule
from launch.benchmarks._schedule_cases import OURS, Case
from launch.benchmarks._sleeping import SleepingStage
from launch.benchmarks._torch_pipelining import ENGINES


def _took_s(function: Any, *arguments: Any) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start_s, result


@pytest.mark.parametrize("is_first", [False, True])
def test_a_sleeping_stage_takes_its_time_where_torch_does_the_work(is_first: bool) -> None:
    stage = SleepingStage(0.02, 0.05, 0.08, is_first=is_first)
    x = torch.ones(1, 4, requires_grad=not is_first)
    forward_s, y = _took_s(stage, x)
    assert 0.02 <= forward_s < 0.05
    if not is_first:
        input_s, (_, groups) = _took_s(
            _backward.stage_backward_input, [y], [torch.ones_like(y)], [x], stage.parameters()
        )
        weight_s, _ = _took_s(_backward.stage_backward_weight, stage.parameters(), groups)
        assert 0.05 <= input_s < 0.08 <= weight_s < 0.11
        assert x.grad is not None
        y, x.grad, stage.scale.grad = stage(x), None, None
    whole_s, _ = _took_s(_backward.stage_backward, [y], [torch.ones_like(y)], [x])
    assert 0.13 <= whole_s < 0.18
    assert stage.scale.grad == 4


def test_textbook_times_are_those_of_the_literature() -> None:
    case = Case(pp=4, m=8, r=2, forward_s=1.0)
    assert case.textbook_s("inline") == (8 + 3) * 5
    assert case.textbook_s("batch") == case.textbook_s("torch_1f1b") == 8 * 5 + 3 * 4
    assert case.textbook_s("torch_interleaved") == 8 * 5 + 3 * 4 / 2
    assert case.bound_s("fill") == case.bound_s("fill_zero_bubble") == 8 * 5
    assert Case(4, 4, 1, 1.0).bound_s("fill") == (4 + 3) * 3


@pytest.mark.slow
def test_rows_of_a_small_grid(capsys: pytest.CaptureFixture[str]) -> None:
    engines = [*OURS, *ENGINES]
    rows = schedule.run({"pp": 2, "m_factors": 1, "r": [2], "forward_ms": 5, "steps": 2, "engines": engines})
    case = Case(pp=2, m=2, r=2, forward_s=0.005)
    assert capsys.readouterr().err.count("pp 2, m 2, r 2: fill 0.") == 1
    assert {row["case"].partition(": ")[2] for row in rows} == {
        f"{engine}, s a step" for engine in ("fill", "fill_interleaved", "fill_zero_bubble")
    }
    fill = [row for row in rows if ": fill, " in row["case"]]
    names = {row["peer_name"]: row["peer"] for row in fill}
    assert len(fill) == len(names) == 2 + 2 + len(ENGINES)
    for row in rows:
        assert row["ratio"] == row["ours"] / row["peer"]
        # A sleep is never too short; a single interval may be, after one that was too long.
        assert row["ours"] >= 0.9 * case.bound_s("fill")
        assert row["peer_name"] != "least possible" or (row["peer"], row["bound"]) == (
            pytest.approx(0.05),
            1.03,
        )
    for engine, peer in ENGINES.items():
        assert names[f"torch {peer.schedule}"] >= 0.9 * case.textbook_s(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 4}, "ranks is no option; use pp, "),
        ({"pp": [4, 1]}, "pp=1; use a whole number, 2 or more"),
        ({"r": 0}, "r=0; use a number above 0"),
        ({"engines": ["fill", "gpipe"]}, "engines=gpipe; use fill, "),
        ({"engines": ["inline"]}, r"engines=\[inline\] has nothing to compare; add fill, "),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule.run(options)
