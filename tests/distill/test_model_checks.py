from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from distill.config import ConfigError
from distill.convert import config_from_dict
from distill.model_checks import check_models
from tests.distill.test_checks import BASE


def hf_config(**changes: Any) -> SimpleNamespace:
    values = {"num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 100}
    config = SimpleNamespace(**{**values, "max_position_embeddings": 1024, **changes})
    config.get_text_config = lambda: config
    config.per_layer_config = [config]
    return config


@pytest.mark.parametrize(
    ("mesh", "teacher", "student", "words"),
    [
        ({"tp": 3}, {}, {}, "mesh.tp=3 does not divide num_attention_heads=32 of the teacher; use 1, 2, 4 or 8"),
        (
            {"tp": 3},
            {"num_attention_heads": 24},
            {},
            "mesh.tp=3 does not divide num_key_value_heads=8 of the teacher; use 1, 2, 4 or 8",
        ),
        ({"tp": 4}, {}, {"num_key_value_heads": 6}, "mesh.tp=4 does not divide num_key_value_heads=6 of the student; use 1 or 2"),
        (
            {"tp": 2},
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            "mesh.tp=2 does not divide num_attention_heads=9 of the teacher; use 1 or 3",
        ),
        ({"pp": 4}, {}, {"num_hidden_layers": 3}, "mesh.pp=4 is more than num_hidden_layers=3 of the student; use at most 3"),
        ({}, {}, {"vocab_size": 101}, "student.model=null has vocab_size=101 but teacher.model=embedded has vocab_size=100; use models"),
        (
            {},
            {"max_position_embeddings": 256},
            {},
            "data.seq_len=512 is longer than max_position_embeddings=256 of the teacher; use at most 256",
        ),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(mesh: dict[str, int], teacher: Any, student: Any, words: str) -> None:
    config = config_from_dict({**BASE, "mesh": mesh})
    with pytest.raises(ConfigError) as caught:
        check_models(config, hf_config(**teacher), hf_config(**student))
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("tp", "sizes", "words"),
    [
        (1, {"hidden_size": 30}, "mesh.tp=1 does not leave hidden_size=30 of the student in such; use student.sparsity.pattern=unstr"),
        (4, {"intermediate_size": 24}, "mesh.tp=4 does not leave intermediate_size=24 of the student in such; use mesh.tp=1, 2 or 3"),
        (2, {"head_dim": 3, "num_attention_heads": 4}, "leave query heads x head width=12 of the student in such; use mesh.tp=1"),
        (2, {"intermediate_size": 24}, None),
    ],
)  # fmt: skip
def test_groups_that_tp_cuts(tp: int, sizes: dict[str, int], words: str | None) -> None:
    student = hf_config(
        **{"hidden_size": 64, "intermediate_size": 96, "head_dim": 8, "num_key_value_heads": 4, **sizes}
    )
    config = config_from_dict(
        {**BASE, "mesh": {"tp": tp}, "student": {"sparsity": {"method": "wanda", "pattern": "2:4"}}}
    )
    if words is None:
        check_models(config, hf_config(), student)
    else:
        with pytest.raises(ConfigError, match=words):
            check_models(config, hf_config(), student)


def test_top_k_leaves_an_id_for_the_rest() -> None:
    config = config_from_dict({**BASE, "loss": {"kind": "top_k_kl", "top_k": 100}})
    with pytest.raises(
        ConfigError, match="loss.top_k=100 must be less than vocab_size=100 .* use at most 99, or"
    ):
        check_models(config, hf_config(), hf_config())
    check_models(replace(config, loss=replace(config.loss, top_k=99)), hf_config(), hf_config())
    check_models(replace(config, loss=replace(config.loss, kind="jsd")), hf_config(), hf_config())


def test_every_layers_heads_are_looked_at() -> None:
    student = hf_config()
    student.per_layer_config = [hf_config(), hf_config(num_attention_heads=12, num_key_value_heads=3)]
    with pytest.raises(
        ConfigError, match=r"mesh.tp=2 does not divide num_key_value_heads=3 of the student; use 1"
    ):
        check_models(config_from_dict({**BASE, "mesh": {"tp": 2}}), hf_config(), student)


def test_models_that_fit() -> None:
    config = config_from_dict({**BASE, "mesh": {"pp": 4, "tp": 8}})
    check_models(config, hf_config(), hf_config(num_attention_heads=16))
    no_positions = hf_config()
    del no_positions.max_position_embeddings, no_positions.num_key_value_heads
    check_models(config, no_positions, hf_config())
