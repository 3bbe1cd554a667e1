from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from distill.bounds import check_bounds
from distill.config import Config, ConfigError
from distill.convert import config_to_dict, flatten, known_keys

FLAT = flatten(config_to_dict(Config()))


def refused(key: str, value: Any) -> str:
    """Return the sentence with which a value of a key is refused."""
    with pytest.raises(ConfigError) as caught:
        check_bounds({**FLAT, key: value})
    assert str(caught.value).startswith(f"{key}=") and ";" in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_within() -> None:
    check_bounds(FLAT)


@pytest.mark.parametrize("key", known_keys())
def test_every_key_is_covered_by_the_type_of_its_value(key: str) -> None:
    for number in (math.nan, math.inf, -math.inf, 1e300, -1e300, 10**16, -(10**400)):
        assert "too" in refused(key, number)
        assert "too" in refused(
            key, [1, number] if key not in ("data.seq_len", "train.timeout_s") else [9, number]
        )
    for text in ("", "  ", "\n", "\udcff"):
        assert "use" in refused(key, text)
    if key != "evaluate.choices_template":
        assert "a character that no name has" in refused(key, "a\0b")
        assert "use at most 1000" in refused(key, "a/" * 501)
        assert "use at most 255 bytes" in refused(key, ["b", "\u00e4" * 128])


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("data.seq_len", 7, "use at least 8"),
        ("student.prune.candidates", 1001, "use at most 1000"),
        ("log.health_port", -1, "use at least 0"),
        ("log.health_port", 65536, "use at most 65535"),
        ("train.timeout_s", 0.01, "use at least 0.1"),
        ("train.timeout_s", 1e8, "use at most 1e+07"),
        ("optimizer.eps", 5e-324, "too near to 0; use 0, or at least 1e-30"),
        ("log.wandb_project", "a/b", "use at most 128 letters without any of"),
        ("log.wandb_project", "a" * 129, "use at most 128 letters"),
        ("data.path", ["a", "~no_such_user/x"], "begins with the home of nobody here"),
        ("run.dir", "~/runs", f"use {Path.home() / 'runs'}"),
    ],
)
def test_limits_of_single_keys(key: str, value: Any, part: str) -> None:
    assert part in refused(key, value)


def test_what_is_still_right() -> None:
    for key, value in {
        "data.path": ["~/text", "\u00fcbung/\u6587.txt", "a b"],
        "evaluate.choices_template": "Q: {question}\n\tA:",
        "gate.stop_if": -0.5,
        "train.seed": 2**40,
        "log.health_port": 65535,
        "optimizer.lr": 1e30,
        "loss.alpha": {"kind": "steps", "values": {0: 1.0, 10**6: 0.0}},
        "teacher.model": os.fspath(Path("x") / ("y" * 255)),
    }.items():
        check_bounds({**FLAT, key: value})
