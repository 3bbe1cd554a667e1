"""Students cut anew: growth undoes a cut bit for bit, trained weights stay, restored ones are the teacher's, indices compose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from distill.config import ConfigError
from distill.kept import Kept
from distill.prune import load_kept, prune_checkpoint
from distill.recut import recut, recut_checkpoint
from distill.structure import Sizes, Unit, cut, layout_of, student_name, teacher_name
from tests.families import save_tiny, tiny_config, tiny_model

FAMILIES = ("llama", "glm4", "gemma2", "phi3", "starcoder2")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _some(draw: torch.Generator, candidates: Tensor, keep: int) -> Tensor:
    return candidates[torch.randperm(len(candidates), generator=draw)[:keep]].sort().values


def _kept(
    config: PretrainedConfig,
    *,
    hidden: int,
    ffn: int,
    groups: int,
    layers: tuple[int, ...],
    inside: Kept | None = None,
) -> Kept:
    """Return a random cut of the teacher, inside another one if it is given."""
    whole = inside or Kept.everything(Sizes.of(config))
    draw = torch.Generator().manual_seed(hidden + ffn)
    return Kept(
        hidden=_some(draw, whole.hidden, hidden),
        ffn={layer: _some(draw, whole.ffn[layer], ffn) for layer in layers},
        groups={layer: _some(draw, whole.groups[layer], groups) for layer in layers},
        layers=layers,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_growing_an_untrained_student_is_the_larger_cut(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = tiny_config(family)
    source = save_tiny(tmp_path / "teacher", config, dtype=dtype)
    large = _kept(config, hidden=24, ffn=40, groups=3 if family != "gemma2" else 2, layers=(0, 1, 3))
    small = _kept(config, hidden=16, ffn=24, groups=2, layers=(0, 3), inside=large)
    everything = Kept.everything(Sizes.of(config))
    for name, kept in (("large", large), ("small", small)):
        prune_checkpoint(source, tmp_path / name, config, kept, provenance={})
    cases = {"grown": (small, large), "shrunk": (large, small), "back": (small, everything)}
    folders = {id(large): "large", id(small): "small", id(everything): "teacher"}
    for name, (old, new) in cases.items():
        written = recut_checkpoint(
            source, tmp_path / folders[id(old)], tmp_path / name, config, old, new, provenance={"round": 1}
        )
        expected, actual = _tensors(tmp_path / folders[id(new)]), _tensors(tmp_path / name)
        assert actual.keys() == expected.keys()
        for key in expected:
            assert torch.equal(actual[key], expected[key]) and actual[key].dtype == dtype, key
        assert written.hidden_size == len(new.hidden)
    loaded, metadata = load_kept(tmp_path / "grown")
    assert loaded.layers == large.layers and metadata == {"round": 1}
    assert all(torch.equal(loaded.ffn[layer], large.ffn[layer]) for layer in large.layers)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 3


def test_trained_entries_stay_and_restored_ones_are_the_teachers(tmp_path: Path) -> None:
    """Some units go while others come back; every entry is looked up by hand."""
    config = tiny_config("gemma2", tie_word_embeddings=True)
    source = save_tiny(tmp_path / "teacher", config)
    teacher = dict(tiny_model(config).named_parameters())
    old = _kept(config, hidden=16, ffn=24, groups=2, layers=(0, 2))
    new = _kept(config, hidden=24, ffn=32, groups=4, layers=(1, 2))
    prune_checkpoint(source, tmp_path / "student", config, old, provenance={})
    start = _tensors(tmp_path / "student")
    torch.manual_seed(5)
    trained = {name: tensor + torch.randn_like(tensor) for name, tensor in start.items()}
    save_file(trained, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    recut_checkpoint(source, tmp_path / "student", tmp_path / "next", config, old, new, provenance={})
    actual = _tensors(tmp_path / "next")

    both = [unit for unit in new.hidden.tolist() if unit in old.hidden.tolist()]
    assert 0 < len(both) < 16, "some residual channels must stay, go and come back"
    down = "model.layers.{}.mlp.down_proj.weight"
    full = teacher[down.format(2)]
    for row, unit in enumerate(new.hidden.tolist()):
        for column, channel in enumerate(new.ffn[2].tolist()):
            if unit in old.hidden.tolist() and channel in old.ffn[2].tolist():
                where = old.hidden.tolist().index(unit), old.ffn[2].tolist().index(channel)
                expected = trained[down.format(1)][where]
            else:
                expected = full[unit, channel]
            assert actual[down.format(1)][row, column] == expected
    # Layer 1 comes back whole.
    assert torch.equal(actual[down.format(0)], teacher[down.format(1)][new.hidden][:, new.ffn[1]])
    # Gemma's norms multiply by 1 + weight: sqrt(32 / 16) of the old cut, sqrt(32 / 24) of the new one.
    norm = "model.layers.1.input_layernorm.weight"
    for place, unit in enumerate(new.hidden.tolist()):
        if unit in both:
            expected = (1 + trained[norm][old.hidden.tolist().index(unit)]) * (16 / 24) ** 0.5 - 1
        else:
            expected = (1 + teacher["model.layers.2.input_layernorm.weight"][unit]) * (32 / 24) ** 0.5 - 1
        torch.testing.assert_close(actual[norm][place], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_moment_follows_its_parameter(family: str) -> None:
    """What a cut of the teacher's own moments gives, with a number where the smaller student had no unit."""
    config = tiny_config(family)
    sizes = Sizes.of(config)
    old = _kept(config, hidden=16, ffn=24, groups=2, layers=(0, 2))
    new = _kept(config, hidden=24, ffn=32, groups=3, layers=(1, 2))
    for name, parameter in tiny_model(config).named_parameters():
        layout = layout_of(name, tuple(parameter.shape), sizes)
        if layout.layer not in (None, 2):
            continue
        moment = 1 + torch.rand_like(parameter)
        # The whole teacher's, with -7 wherever one of the units is not in the old student.
        known = torch.full_like(moment, -7.0)
        places = [_entries(layout.dims[dim], layout.layer, sizes, old) for dim in range(moment.ndim)]
        grid = torch.meshgrid(*places, indexing="ij")
        known[grid] = moment[grid]
        actual = recut(cut(moment, layout, sizes, old), layout, sizes, old, new, restored=-7.0)
        assert torch.equal(actual, cut(known, layout, sizes, new)), name


def _entries(parts: tuple[Unit, ...], layer: int | None, sizes: Sizes, kept: Kept) -> Tensor:
    """Return the entries of a dim whose units are kept, by asking each entry."""
    units = {
        Unit.HIDDEN: (kept.hidden, 1),
        Unit.FFN: (kept.ffn[layer or 0], 1),
        Unit.QUERY: (kept.groups[layer or 0], sizes.heads_per_group * sizes.head_width),
        Unit.KEY_VALUE: (kept.groups[layer or 0], sizes.head_width),
        Unit.VOCABULARY: (torch.arange(sizes.vocabulary), 1),
        Unit.HEAD_WIDTH: (torch.arange(sizes.head_width), 1),
    }
    found, offset = [], 0
    for part in parts:
        stay, width = units[part]
        total = sizes.width(part)
        found += [offset + entry for entry in range(total) if entry // width in stay.tolist()]
        offset += total
    return torch.tensor(found)


def test_a_cut_of_a_student_counts_in_the_teachers_units(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = save_tiny(tmp_path / "teacher", config)
    first = _kept(config, hidden=24, ffn=40, groups=3, layers=(0, 2, 3))
    middle = prune_checkpoint(source, tmp_path / "first", config, first, provenance={})
    inner = _kept(middle, hidden=16, ffn=24, groups=2, layers=(1, 2))
    second = first.of_student(inner)
    assert second.layers == (2, 3)
    recut_checkpoint(source, tmp_path / "first", tmp_path / "second", config, first, second, provenance={})
    prune_checkpoint(source, tmp_path / "direct", config, second, provenance={})
    actual, expected = _tensors(tmp_path / "second"), _tensors(tmp_path / "direct")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_names_go_both_ways() -> None:
    kept = Kept(torch.arange(2), {}, {}, (0, 2, 5))
    for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        assert student_name(teacher_name(name, kept), kept) == name
    assert teacher_name("model.layers.2.mlp.up_proj.weight", kept) == "model.layers.5.mlp.up_proj.weight"


def test_a_student_that_is_another_cut_is_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = save_tiny(tmp_path / "teacher", config)
    old = _kept(config, hidden=32, ffn=24, groups=4, layers=(0, 2))
    other = _kept(config, hidden=32, ffn=40, groups=4, layers=(0, 2))
    prune_checkpoint(source, tmp_path / "student", config, old, provenance={})
    with pytest.raises(ConfigError, match=r"student.model: .* of shape \(32, 24\), .* \(32, 40\)"):
        recut_checkpoint(source, tmp_path / "student", tmp_path / "next", config, other, old, provenance={})
    with pytest.raises(ConfigError, match="teacher exists already"):
        recut_checkpoint(source, tmp_path / "student", source, config, old, other, provenance={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
