"""Every mistake in `optimizer.*` that the settings show."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from distill.config import Config, ConfigError
from distill.convert import config_to_dict, flatten
from distill.optimizer_checks import NAMES, check_optimizer
from parallel.update_rules import EIGHT_BIT, RULES


def _check(**values: Any) -> None:
    flat = flatten(config_to_dict(Config()))
    check_optimizer({**flat, **{key.replace("__", "."): value for key, value in values.items()}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer__name": "muon"}, "optimizer.name=muon looks at whole matrices or layers"),
        ({"optimizer__name": "lion"}, "optimizer.name=lion is not known; use adamw, adam, radam,"),
        ({"optimizer__momentum": 1.0}, "optimizer.momentum=1.0 must be 0 or more and less than 1"),
        ({"optimizer__zero_stage": 3, "optimizer__engine": "deepspeed"}, "optimizer.zero_stage=3 gathers parameters inside"),
        ({"optimizer__zero_stage": 2}, "optimizer.zero_stage=2 does not go with optimizer.engine=torch; use 0 or 1"),
        (
            {"optimizer__zero_stage": 0, "optimizer__engine": "deepspeed"},
            "optimizer.zero_stage=0 does not go with optimizer.engine=deepspeed; use 1 or 2",
        ),
        ({"optimizer__zero_stage": -1}, "optimizer.zero_stage=-1 does not go with optimizer.engine=torch"),
        ({"optimizer__offload": True}, "optimizer.offload=true does not go with optimizer.engine=torch; use deepspeed"),
        (
            {"optimizer__name": "adamw8bit", "train__dtype": "float64"},
            "optimizer.name=adamw8bit computes in float32, but train.dtype=float64; use adamw",
        ),
        (
            {"optimizer__engine": "deepspeed", "optimizer__zero_stage": 2},
            "optimizer.zero_stage=2 reduces gradients in train.dtype=bfloat16, in which small ones are lost; use 1, or",
        ),
    ],
)  # fmt: skip
def test_mistakes(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(**values)
    assert str(caught.value).startswith(words)


def test_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in NAMES:
        _check(optimizer__name=name)
        _check(optimizer__name=name, optimizer__engine="deepspeed", optimizer__offload=True)
    _check(optimizer__zero_stage=0)
    for dtype in ("float32", "float64"):
        _check(optimizer__engine="deepspeed", optimizer__zero_stage=2, train__dtype=dtype)
    assert set(NAMES) == {*RULES, EIGHT_BIT}


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"engine=deepspeed needs deepspeed, which is not installed; bash launch/install.sh deepspeed, or use torch",
    ):
        _check(optimizer__engine="deepspeed")
    with pytest.raises(
        ConfigError,
        match=r"name=adamw8bit needs bitsandbytes, which is not installed; bash launch/install.sh bitsandbytes, or use adamw",
    ):
        _check(optimizer__name="adamw8bit")
    _check()
