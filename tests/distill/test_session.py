"""What a round's settings of the optimizer become."""

from __future__ import annotations

from dataclasses import fields, replace

from distill.config import Config, Optimizer, Train
from distill.session import _learning_rate, optimizer_options
from parallel.optimizer import LearningRate
from parallel.update_rules import OptimizerOptions

SETTINGS = Optimizer(
    engine="deepspeed",
    name="rmsprop",
    zero_stage=2,
    offload=True,
    lr=3e-3,
    weight_decay=0.2,
    betas=(0.7, 0.8),
    eps=1e-5,
    momentum=0.4,
    clip=0.6,
    warmup_steps=7,
    schedule="linear",
    min_lr_ratio=0.3,
)
CONFIG = Config(optimizer=SETTINGS, train=Train(steps=91))


def test_every_setting_reaches_the_optimizer() -> None:
    options = optimizer_options(CONFIG)
    for each in fields(OptimizerOptions):
        value = getattr(options, each.name)
        assert value == getattr(SETTINGS, each.name), each.name
        # Equal to a default it could have been left out.
        assert value not in (each.default, getattr(Optimizer(), each.name)), each.name


def test_every_setting_reaches_the_learning_rate() -> None:
    expected = LearningRate(peak=3e-3, warmup_steps=7, total_steps=91, schedule="linear", min_ratio=0.3)
    assert _learning_rate(CONFIG) == expected


def test_no_clipping_is_a_norm_of_zero() -> None:
    assert optimizer_options(replace(CONFIG, optimizer=replace(SETTINGS, clip=None))).clip == 0.0
