"""What parameters mean for cuts: every family's names and sizes, fused projections, errors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from distill.config import ConfigError
from distill.kept import Kept
from distill.structure import (
    Layout,
    Sizes,
    Unit,
    Widths,
    cut,
    cut_shape,
    kept_indices,
    layout_of,
    student_name,
)
from parallel.model import build_meta_model
from tests.families import FAMILIES, tiny_config

SIZES = Sizes(hidden=6, ffn=5, heads=4, groups=2, head_width=3, vocabulary=11, layers=3)
KEPT = Kept(
    hidden=torch.tensor([0, 2, 5]),
    ffn={0: torch.tensor([1, 4]), 2: torch.tensor([0, 3])},
    groups={0: torch.tensor([1]), 2: torch.tensor([0])},
    layers=(0, 2),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_family_is_known(family: str) -> None:
    config = tiny_config(family)
    sizes = Sizes.of(config)
    for name, parameter in build_meta_model(config).named_parameters():
        layout = layout_of(name, tuple(parameter.shape), sizes)
        assert len(layout.dims) == parameter.ndim
        assert cut_shape(layout, sizes, Kept.everything(sizes)) == tuple(parameter.shape)
    assert (sizes.heads, sizes.groups, sizes.head_width) == (8, 4, 8 if "head_dim" in config.to_dict() else 4)


def test_size_decides_what_a_head_norm_runs_over() -> None:
    dims = {
        family: layout_of(
            "model.layers.1.self_attn.k_norm.weight",
            (build_meta_model(tiny_config(family)).model.layers[1].self_attn.k_norm.weight.numel(),),
            Sizes.of(tiny_config(family)),
        ).dims
        for family in ("qwen3", "olmo2")
    }
    assert dims == {"qwen3": ((Unit.HEAD_WIDTH,),), "olmo2": ((Unit.KEY_VALUE,),)}


def test_fused_projections_are_cut_part_by_part() -> None:
    qkv = layout_of("model.layers.0.self_attn.qkv_proj.weight", (24, 6), SIZES)
    # Group 1 is query heads 2 and 3 (rows 6-11), key head 1 (12 + 3-5), value head 1 (18 + 3-5).
    expected = [6, 7, 8, 9, 10, 11, 15, 16, 17, 21, 22, 23]
    assert kept_indices(qkv, 0, SIZES, KEPT).tolist() == expected
    gate_up = layout_of("model.layers.2.mlp.gate_up_proj.weight", (10, 6), SIZES)
    assert kept_indices(gate_up, 0, SIZES, KEPT).tolist() == [0, 3, 5, 8]
    weight = torch.arange(60).view(10, 6)
    student = cut(weight, gate_up, SIZES, KEPT)
    assert torch.equal(student, weight[[0, 3, 5, 8]][:, [0, 2, 5]]) and student.is_contiguous()
    assert cut_shape(gate_up, SIZES, KEPT) == (4, 3)


def test_a_dim_that_keeps_everything_has_no_indices() -> None:
    assert kept_indices(layout_of("lm_head.weight", (11, 6), SIZES), 0, SIZES, KEPT) is None
    assert layout_of("model.norm.bias", (6,), SIZES) == Layout(None, "norm", ((Unit.HIDDEN,),))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.mlp.experts.0.gate_proj.weight", (5, 6), "experts.0.gate_proj"),
        ("model.layers.0.self_attn.q_proj.scale", (12,), "q_proj.scale"),
        ("transformer.wte.weight", (11, 6), "transformer.wte"),
        ("model.layers.0.mlp.down_proj.weight", (5, 6), r"down_proj.weight .* \(5, 6\)"),
        ("model.layers.0.self_attn.q_norm.weight", (5,), r"q_norm.weight .* \(5,\)"),
    ],
)
def test_unknown_names_and_sizes_are_errors_that_name_them(
    name: str, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        layout_of(name, shape, SIZES)


def test_configs_that_cannot_be_read_are_errors() -> None:
    for override, words in (({"skip": ["mlp"]}, "skip parts"), ({"head_dim": 4}, "differ in .*head width")):
        config = tiny_config("llama")
        config.per_layer_config = {1: override}
        with pytest.raises(ConfigError, match=words):
            Sizes.of(config)
    with pytest.raises(ConfigError, match="gpt2 has no whole number intermediate_size"):
        Sizes.of(AutoConfig.for_model("gpt2"))


def test_layers_are_renumbered_and_dropped() -> None:
    assert student_name("model.layers.2.mlp.c_fc.bias", KEPT) == "model.layers.1.mlp.c_fc.bias"
    assert student_name("model.layers.1.mlp.c_fc.bias", KEPT) is None
    assert student_name("model.embed_tokens.weight", KEPT) == "model.embed_tokens.weight"


def test_sizes_after_a_cut() -> None:
    assert SIZES.after(KEPT) == Sizes(
        hidden=3, ffn=2, heads=2, groups=1, head_width=3, vocabulary=11, layers=2
    )


def test_each_layer_has_its_own_sizes() -> None:
    kept = Kept(KEPT.hidden, {0: torch.arange(2), 2: torch.arange(3)}, KEPT.groups, KEPT.layers)
    after = SIZES.after(kept)
    assert (after.ffn, after.layers, after.by_layer) == (3, 2, (Widths(2, 1), Widths(3, 1)))
    assert (after.at(0).ffn, after.at(0).layers, after.at(None)) == (2, 2, after)
    up = layout_of("model.layers.0.mlp.up_proj.weight", (2, 3), after)
    assert cut_shape(up, after, Kept.everything(after)) == (2, 3)
    again = Kept(
        torch.tensor([1]),
        {0: torch.tensor([1]), 1: torch.tensor([0, 2])},
        KEPT.groups | {1: KEPT.groups[0]},
        (0, 1),
    )
    assert kept_indices(up, 0, after, again).tolist() == [1]
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj.weight .*\(2, 3\)"):
        layout_of("model.layers.1.mlp.up_proj.weight", (2, 3), after)
