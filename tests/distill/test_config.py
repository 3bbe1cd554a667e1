from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from distill.annealing import Ramp, Stages
from distill.config import Config, ConfigError, Hidden, Loss, MeshShape, Train


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_microbatches_do_not_depend_on_tp_and_pp() -> None:
    config = Config(train=Train(global_batch_size=24, microbatch_size=2), mesh=MeshShape(pp=2, dp=3, tp=2))
    assert config.num_microbatches == 4


def test_microbatches_need_a_filled_mesh() -> None:
    with pytest.raises(AssertionError, match="mesh.dp=-1"):
        _ = replace(Config(), mesh=MeshShape(dp=-1)).num_microbatches


def test_a_teacher_is_needed_if_the_soft_loss_counts_at_any_step() -> None:
    for alpha, needed in (
        (1.0, False),
        (0.9, True),
        (Ramp("linear", 1.0, 0.5), True),
        (Ramp("cosine", 0.5, 1.0), True),
        (Ramp("linear", 1.0, 1.0), False),
        (Stages("steps", {0: 1.0, 50: 0.9, 60: 1.0}), True),
    ):
        assert Config(loss=Loss(alpha=alpha)).needs_teacher is needed
    for weight, needed in ((0.0, False), (1.0, True), (Ramp("linear", 0.0, 0.1), True)):
        assert Config(loss=Loss(alpha=1.0, hidden=Hidden(weight=weight))).needs_teacher is needed


def test_the_loss_of_a_step_has_numbers() -> None:
    loss = Loss(
        kind="jsd", temperature=Ramp("linear", 5.0, 1.0), alpha=Stages("steps", {0: 1.0, 3: 0.5}), beta=0.2
    )
    assert loss.at(2, 5) == Loss(kind="jsd", temperature=3.0, alpha=1.0, beta=0.2)
    assert loss.at(4, 5) == Loss(kind="jsd", temperature=1.0, alpha=0.5, beta=0.2)
    hidden = Hidden(weight=Ramp("linear", 0.0, 4.0), kind="cosine")
    assert Loss(hidden=hidden).at(1, 5) == Loss(hidden=Hidden(weight=1.0, kind="cosine"))


def test_a_mistake_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
