"""The search for shapes that meet a budget: counts against the models themselves, what is found, and what cannot be."""

from __future__ import annotations

import pytest

from distill.config import ConfigError
from distill.search import Counter, candidate_shapes
from distill.shape import Shape, planned_config
from distill.student_config import Prune
from parallel.model import build_meta_model
from tests.families import tiny_config


def _num_parameters(config) -> int:
    return sum(parameter.numel() for parameter in build_meta_model(config).parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm4", "gemma2", "phi3", "starcoder2", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_that_of_the_model(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    shape = Shape(24, 16, 4, 2, 3, None)
    expected = _num_parameters(planned_config(config, shape))
    assert Counter(config)(hidden=24, ffn=16, groups=2, layers=3) == expected


@pytest.mark.parametrize("target", ["70M", "50%", 100e6])
def test_every_candidate_meets_the_budget(target: object) -> None:
    config = tiny_config(
        "llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, num_hidden_layers=12, vocab_size=20_000, tie_word_embeddings=True,
    )  # fmt: skip
    whole = _num_parameters(config)
    target = {"70M": "35M", 100e6: 0.8 * whole}.get(target, target)
    limit = {"35M": 35e6, "50%": whole / 2}.get(target, target)
    found = candidate_shapes(config, Prune(target_params=target, candidates=5), tp=1)
    assert 1 < len(found) <= 5 and len({each.shape for each in found}) == len(found)
    for each in found:
        assert 0.97 * limit <= each.num_parameters <= limit
        assert each.num_parameters == _num_parameters(planned_config(config, each.shape))
        assert each.shape.num_layers >= 8 and each.shape.intermediate_size % 32 == 0
    assert found[0].shape.num_layers == 12 and len({each.shape.num_layers for each in found}) > 1


def test_targets_that_are_given_are_fixed() -> None:
    config = tiny_config("qwen3", hidden_size=256, intermediate_size=768, vocab_size=500, num_hidden_layers=6)
    prune = Prune(target_params="60%", num_layers=5, num_key_value_heads=2)
    for each in candidate_shapes(config, prune, tp=2):
        assert (each.shape.num_layers, each.shape.num_key_value_heads) == (5, 2)


def test_a_budget_that_nothing_meets_names_the_nearest() -> None:
    config = tiny_config("llama")
    whole = _num_parameters(config)
    with pytest.raises(ConfigError, match=f"must be less than the teacher's {whole:,}"):
        candidate_shapes(config, Prune(target_params=whole), tp=1)
    with pytest.raises(ConfigError, match=r"=1000 .* nearest that can be had is [0-9,]+ \(num_layers="):
        candidate_shapes(config, Prune(target_params=1000), tp=1)
