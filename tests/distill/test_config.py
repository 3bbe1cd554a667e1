from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from distill.config import Config, ConfigError, MeshShape, Train


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_microbatches_do_not_depend_on_tp_and_pp() -> None:
    config = Config(train=Train(global_batch_size=24, microbatch_size=2), mesh=MeshShape(pp=2, dp=3, tp=2))
    assert config.num_microbatches == 4


def test_microbatches_need_a_filled_mesh() -> None:
    with pytest.raises(AssertionError, match="mesh.dp=-1"):
        _ = replace(Config(), mesh=MeshShape(dp=-1)).num_microbatches


def test_a_mistake_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
