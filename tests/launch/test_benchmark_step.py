from __future__ import annotations

from typing import Any

import pytest

from distill.config import ConfigError
from launch.benchmarks import step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 4}, "tokens is no option; use teacher, "),
        ({"steps": 0}, "steps=0; use a whole number, 1 or more"),
        ({"trainers": ["sft"]}, "trainers=sft; use gkd or distillation"),
        ({"recompute": "all"}, "recompute=all; use none, selective or full"),
        ({"dtype": "float8"}, "dtype=float8; use "),
        ({"rows": 6, "microbatch": 4}, "microbatch=4 does not divide rows=6"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_make_venv", lambda: pytest.fail("nothing is installed for a mistake"))
    with pytest.raises(ConfigError, match=message):
        step.run(options)
