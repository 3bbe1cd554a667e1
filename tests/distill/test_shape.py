"""The student's shape: targets, ratio, rounding, what families accept, and the messages when nothing fits."""

from __future__ import annotations

import pytest

from distill.config import ConfigError
from distill.shape import Shape, Steps, planned_config, resolve_shape
from distill.student_config import Prune
from tests.families import tiny_config


def smollm2(**overrides: object):
    """Return the config of the embedded teacher, or one that differs in a few sizes."""
    values = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_hidden_layers": 30,
        "vocab_size": 97,
    }
    return tiny_config("llama", **{**values, **overrides})


def test_the_default_ratio_cuts_feed_forward_channels_only() -> None:
    # 60 % of 1536 is 921.6; 928 is the nearest multiple of 32.
    assert resolve_shape(smollm2(), Prune(), tp=1) == Shape(576, 928, 9, 3, 30, None)


def test_any_target_replaces_the_ratio() -> None:
    assert resolve_shape(smollm2(), Prune(num_layers=24), tp=1) == Shape(576, 1536, 9, 3, 24, None)
    assert resolve_shape(smollm2(), Prune(layers=(0, 5, 29)), tp=1) == Shape(576, 1536, 9, 3, 3, (0, 5, 29))
    assert resolve_shape(smollm2(), Prune(intermediate_size=1536), tp=1) == Shape(576, 1536, 9, 3, 30, None)


def test_ratio_zero_cuts_nothing() -> None:
    assert (
        resolve_shape(smollm2(intermediate_size=1500), Prune(pruning_ratio=0.0), tp=2).intermediate_size
        == 1500
    )


@pytest.mark.parametrize(
    ("target", "tp", "expected"),
    [(1216, 1, 1216), (1231, 1, 1216), (1232, 1, 1248), (1224, 2, 1216), (1000, 3, 960), (1000, 64, 1024)],
)
def test_feed_forward_targets_round_to_the_nearest_multiple(target: int, tp: int, expected: int) -> None:
    config = smollm2(num_attention_heads=64, num_key_value_heads=64)
    assert resolve_shape(config, Prune(intermediate_size=target), tp=tp).intermediate_size == expected


def test_min_channels_is_a_floor() -> None:
    assert resolve_shape(smollm2(), Prune(pruning_ratio=0.9, min_channels=500), tp=1).intermediate_size == 512
    with pytest.raises(
        ConfigError, match=r"intermediate_size=256 is less than student.prune.min_channels=500"
    ):
        resolve_shape(smollm2(), Prune(intermediate_size=256, min_channels=500), tp=1)


@pytest.mark.parametrize(
    ("heads", "tp", "expected"), [(6, 1, (6, 2)), (5, 1, (6, 2)), (4, 1, (3, 1)), (3, 1, (3, 1))]
)
def test_heads_go_in_whole_groups(heads: int, tp: int, expected: tuple[int, int]) -> None:
    resolved = resolve_shape(smollm2(), Prune(num_attention_heads=heads), tp=tp)
    assert (resolved.num_attention_heads, resolved.num_key_value_heads) == expected
    by_groups = resolve_shape(smollm2(), Prune(num_key_value_heads=expected[1]), tp=tp)
    assert by_groups == resolved
    assert (
        resolve_shape(
            smollm2(), Prune(num_attention_heads=expected[0], num_key_value_heads=expected[1]), tp=tp
        )
        == resolved
    )


def test_groups_are_a_multiple_of_tp() -> None:
    config = smollm2(hidden_size=512, num_attention_heads=16, num_key_value_heads=8)
    assert resolve_shape(config, Prune(num_key_value_heads=5), tp=2).num_key_value_heads == 4
    assert resolve_shape(config, Prune(num_attention_heads=6), tp=4).num_attention_heads == 8


def test_heads_stay_within_what_the_family_accepts() -> None:
    # 64 is no multiple of 6 heads: Llama and Gemma 2 refuse it, Qwen 3 does not mind.
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    assert (
        resolve_shape(tiny_config("qwen3", **sizes), Prune(num_attention_heads=5), tp=1).num_attention_heads
        == 6
    )
    for family in ("llama", "gemma2"):
        assert (
            resolve_shape(
                tiny_config(family, **sizes), Prune(num_attention_heads=5), tp=1
            ).num_attention_heads
            == 4
        )


def test_hidden_size_is_rounded_to_what_the_heads_divide() -> None:
    assert resolve_shape(smollm2(), Prune(hidden_size=320), tp=1).hidden_size == 288
    assert resolve_shape(smollm2(), Prune(hidden_size=500, num_attention_heads=6), tp=1) == Shape(
        480, 1536, 6, 2, 30, None
    )
    qwen3 = tiny_config("qwen3", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    assert resolve_shape(qwen3, Prune(hidden_size=512), tp=1).hidden_size == 512


def test_small_widths_go_by_eights() -> None:
    config = tiny_config("qwen3", hidden_size=32, intermediate_size=32)
    resolved = resolve_shape(config, Prune(hidden_size=20, intermediate_size=19), tp=1)
    assert (resolved.hidden_size, resolved.intermediate_size) == (24, 16)


@pytest.mark.parametrize(
    ("prune", "tp", "words"),
    [
        (
            Prune(hidden_size=544),
            1,
            r"hidden_size=544 would round to the teacher's own 576.*LlamaConfig with 9.*: 288",
        ),
        (Prune(hidden_size=600), 1, r"hidden_size=600 must be between 1 and the teacher's 576"),
        (Prune(intermediate_size=1535), 1, r"intermediate_size=1535 would round.*use 1536 or .* 1504"),
        (
            Prune(pruning_ratio=0.001),
            1,
            r"pruning_ratio=0.001 \(1534 of 1536 feed-forward channels\) would round",
        ),
        (
            Prune(num_attention_heads=8),
            1,
            r"num_attention_heads=8 would round to the teacher's own 9.*: 3, 6",
        ),
        (Prune(num_attention_heads=12), 1, r"num_attention_heads=12 must be between 1 and the teacher's 9"),
        (
            Prune(num_attention_heads=6, num_key_value_heads=3),
            1,
            r"3 query heads to a key/value head.*use 9 with 3",
        ),
        (
            Prune(num_key_value_heads=2),
            3,
            r"num_key_value_heads=2: nothing smaller than the teacher's 3 is .*mesh.tp=3",
        ),
        (Prune(num_layers=31), 1, r"num_layers=31 must be between 1 and the teacher's 30"),
        (Prune(layers=(0, 30)), 1, r"layers=\[0, 30\] must name layers of the teacher to keep, 0 to 29"),
        (Prune(layers=(4, 2)), 1, r"layers=\[4, 2\] .* ascending"),
        (Prune(layers=(0, 1), num_layers=3), 1, r"num_layers=3 but student.prune.layers names 2"),
    ],
)
def test_targets_that_cannot_be_met_say_what_can(prune: Prune, tp: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_shape(smollm2(), prune, tp=tp)


def test_per_layer_targets_are_means() -> None:
    prune = Prune(per_layer=True, num_key_value_heads=2, hidden_size=512)
    assert resolve_shape(smollm2(num_key_value_heads=9), prune, tp=1) == Shape(
        512, 1536, 2, 2, 30, None, Steps(ffn=None, groups=1, min_channels=8)
    )
    assert resolve_shape(smollm2(), Prune(per_layer=True), tp=3).intermediate_size == 960
    # A student whose layers already differ: 60 % of the mean of 1024 and 1536, as ready as any other teacher.
    own = {layer: {"intermediate_size": 1024} for layer in range(15)}
    shape = resolve_shape(smollm2(per_layer_config=own), Prune(per_layer=True), tp=1)
    assert shape.intermediate_size == 768
    assert resolve_shape(smollm2(per_layer_config=own), Prune(), tp=1).intermediate_size == 928
    planned = planned_config(smollm2(per_layer_config=own), Shape(576, 1280, 9, 3, 30, None))
    assert [each.intermediate_size for each in planned.per_layer_config] == [1024] * 15 + [1280] * 15
