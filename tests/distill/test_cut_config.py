"""The student's config: sizes, lists of layers, layers of different widths, and what families refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from distill import cut_config
from distill.config import ConfigError
from distill.cut_config import student_config
from distill.kept import Kept
from distill.structure import Sizes, Widths
from tests.families import FAMILIES, tiny_config


def _first_of(config, *, hidden: int, ffn: int, groups: int, layers: tuple[int, ...]) -> Kept:
    return Kept(
        hidden=torch.arange(hidden),
        ffn=dict.fromkeys(layers, torch.arange(ffn)),
        groups=dict.fromkeys(layers, torch.arange(groups)),
        layers=layers,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_config_has_the_shape_and_keeps_the_head_width(family: str) -> None:
    config = tiny_config(family)
    kept = _first_of(config, hidden=24, ffn=16, groups=2, layers=(0, 1, 3))
    student = student_config(config, kept)
    before, after = Sizes.of(config), Sizes.of(student)
    assert after == before.after(kept)
    assert (after.hidden, after.ffn, after.heads, after.groups, after.layers) == (24, 16, 4, 2, 3)
    assert type(student) is type(config)


def test_lists_of_layers_are_cut_with_the_layers() -> None:
    kept = _first_of(None, hidden=32, ffn=48, groups=4, layers=(1, 2, 3))
    gemma2 = tiny_config("gemma2")
    assert gemma2.layer_types[0] == "sliding_attention"
    assert student_config(gemma2, kept).layer_types == gemma2.layer_types[1:]
    qwen2 = tiny_config("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2)
    student = student_config(qwen2, kept)
    assert student.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (student.max_window_layers, student.sliding_window) == (1, 5)


def test_layer_lists_of_unknown_meaning_are_an_error() -> None:
    config = tiny_config("llama")
    config.dense_layers = [0, 2]
    with pytest.raises(ConfigError, match="dense_layers"):
        student_config(config, _first_of(config, hidden=32, ffn=48, groups=4, layers=(0, 1)))
    same_depth = student_config(config, _first_of(config, hidden=32, ffn=32, groups=4, layers=(0, 1, 2, 3)))
    assert same_depth.dense_layers == [0, 2]


def test_a_config_class_that_refuses_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"LlamaConfig refuses .*hidden size \(24\)"):
        student_config(
            tiny_config("llama"), _first_of(None, hidden=24, ffn=48, groups=8, layers=(0, 1, 2, 3))
        )


def test_a_model_that_does_not_follow_its_config_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    monkeypatch.setattr(cut_config, "_resized", lambda config, sizes, **changes: config)
    with pytest.raises(
        ConfigError, match=r"layers.0.mlp.down_proj.weight is \(32, 32\) after.*has \(32, 48\)"
    ):
        student_config(config, _first_of(config, hidden=32, ffn=32, groups=4, layers=(0, 1, 2, 3)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [(2, 2, 2), (3, 1, 2)])
def test_layers_of_different_widths_survive_the_file(
    family: str, groups: tuple[int, ...], tmp_path: Path
) -> None:
    config, layers = tiny_config(family), (0, 1, 3)
    kept = Kept(
        hidden=torch.arange(24),
        ffn={layer: torch.arange(width) for layer, width in zip(layers, (40, 8, 16), strict=True)},
        groups={layer: torch.arange(width) for layer, width in zip(layers, groups, strict=True)},
        layers=layers,
    )
    student_config(config, kept).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    sizes = Sizes.of(read)
    assert sizes.by_layer == tuple(map(Widths, (40, 8, 16), groups)) and sizes.hidden == 24
    assert sizes == Sizes.of(config).after(kept)
    # A student of such a student: the two narrow layers are alike, and nothing of its own is left.
    inner = Kept(
        hidden=torch.arange(16),
        ffn={1: torch.arange(8), 2: torch.arange(8)},
        groups={1: torch.arange(1), 2: torch.arange(1)},
        layers=(1, 2),
    )
    again = student_config(read, inner)
    assert not again.is_heterogeneous and not hasattr(again, "auto_map")
    assert "allow_global_per_layer_attribute_access" not in again.to_dict()
    assert (again.intermediate_size, again.num_key_value_heads, again.num_hidden_layers) == (8, 1, 2)


def test_other_differences_of_layers_go_with_them() -> None:
    config = tiny_config("mistral")
    config.per_layer_config = {1: {"sliding_window": 3}, 2: {"intermediate_size": 40}}
    kept = Kept(
        hidden=torch.arange(32),
        ffn={1: torch.arange(48), 2: torch.arange(24)},
        groups={1: torch.arange(4), 2: torch.arange(4)},
        layers=(1, 2),
    )
    student = student_config(config, kept)
    assert [each.sliding_window for each in student.per_layer_config] == [3, 5]
    assert [each.intermediate_size for each in student.per_layer_config] == [48, 24]
