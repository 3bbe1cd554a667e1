"""Pruned students against the teacher with the removed units silenced, their folders, and what is refused.

The reference silences units by hooks on activations, so it shares no table with the code that cuts the weights.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from distill import prune as prune_module
from distill.config import ConfigError
from distill.cut_config import MODELING_FILE
from distill.importance import ActivationRecorder, gather_scores, weight_scores
from distill.kept import Kept
from distill.prune import (
    KEPT_FILE,
    KEPT_FOLDER,
    PROVENANCE_FILE,
    choose,
    load_kept,
    prune_checkpoint,
    share_out,
)
from distill.scores import Scores
from distill.shape import Shape, Steps, resolve_shape
from distill.structure import Sizes
from distill.student_config import Prune
from parallel.mesh import Mesh
from tests.families import FAMILIES, save_tiny, tiny_config, tiny_model

IDS = torch.tensor([[5, 17, 33, 2, 9, 61, 80, 96, 3, 11], [7, 7, 8, 2, 44, 51, 0, 4, 5, 6]])


def _config(family: str, **overrides: object) -> PretrainedConfig:
    """Return a config whose norms have next to no epsilon, which a cut of what they average over does not carry."""
    epsilon = "norm_epsilon" if family == "starcoder2" else "rms_norm_eps"
    return tiny_config(family, **{epsilon: 1e-14, **overrides})


def _kept(config: PretrainedConfig, *cuts: str) -> Kept:
    """Return a random cut, other units in every layer, of the kinds named; `own` gives each layer widths of its own."""
    draw = torch.Generator().manual_seed(3)

    def some(total: int, keep: int) -> Tensor:
        return torch.randperm(total, generator=draw)[:keep].sort().values

    sizes = Sizes.of(config)
    layers = (0, 2, 3) if "layers" in cuts else tuple(range(sizes.layers))
    if "own" in cuts:
        return Kept(
            hidden=torch.arange(sizes.hidden),
            ffn={layer: some(sizes.ffn, 8 + 8 * layer) for layer in layers},
            groups={layer: some(sizes.groups, 1 + layer) for layer in layers},
            layers=layers,
        )
    return Kept(
        hidden=some(sizes.hidden, 24 if "hidden" in cuts else sizes.hidden),
        ffn={layer: some(sizes.ffn, 20 if "ffn" in cuts else sizes.ffn) for layer in layers},
        groups={layer: some(sizes.groups, 2 if "groups" in cuts else sizes.groups) for layer in layers},
        layers=layers,
    )


def _mask(kept: Tensor, total: int, width: int = 1) -> Tensor:
    mask = torch.zeros(total, dtype=torch.float64)
    mask[kept] = 1
    return mask.repeat_interleave(width)


def _mask_input(module: nn.Module, mask: Tensor) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * mask, *args[1:]))


def _mask_output(module: nn.Module, mask: Tensor | float) -> None:
    module.register_forward_hook(lambda module, args, output: output * mask)


def _silenced_logits(model: PreTrainedModel, kept: Kept) -> Tensor:
    """Return the teacher's logits with everything outside `kept` silenced."""
    sizes = Sizes.of(model.config)
    hidden = _mask(kept.hidden, sizes.hidden)
    _mask_output(model.model.embed_tokens, hidden)
    for index, layer in enumerate(model.model.layers):
        if index not in kept.layers:
            layer.forward = lambda hidden_states, **kwargs: hidden_states
            continue
        attention, down = layer.self_attn, getattr(layer.mlp, "down_proj", None) or layer.mlp.c_proj
        _mask_input(down, _mask(kept.ffn[index], sizes.ffn))
        _mask_input(
            attention.o_proj,
            _mask(kept.groups[index], sizes.groups, sizes.heads_per_group * sizes.head_width),
        )
        for module in (down, attention.o_proj):
            _mask_output(module, hidden)
        if model.config.model_type == "olmo2":
            # Its q and k are normed over all heads; the student norms over those it has (see distill.prune).
            share = math.sqrt(len(kept.groups[index]) / sizes.groups)
            for norm, heads in ((attention.q_norm, sizes.heads_per_group), (attention.k_norm, 1)):
                _mask_input(norm, _mask(kept.groups[index], sizes.groups, heads * sizes.head_width))
                _mask_output(norm, share)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _student(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Return the student as a user loads it; layers of different widths bring modelling code along."""
    own_code = (folder / MODELING_FILE).exists()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=own_code
    )
    assert not any(info.values()), info
    return model.eval()


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "cuts",
    [
        ("ffn",),
        ("groups",),
        ("layers",),
        ("hidden",),
        ("ffn", "groups", "layers", "hidden"),
        ("own", "layers"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_equals_the_teacher_with_the_removed_units_silenced(
    family: str, cuts: tuple[str, ...], tmp_path: Path
) -> None:
    config = _config(family)
    kept = _kept(config, *cuts)
    source = save_tiny(tmp_path / "teacher", config)
    prune_checkpoint(source, tmp_path / "student", config, kept, provenance={})
    student = _student(tmp_path / "student")
    assert Sizes.of(student.config) == Sizes.of(config).after(kept)
    logits, expected = _logits(student), _silenced_logits(tiny_model(config), kept)
    assert (expected - _logits(tiny_model(config))).abs().max() > 1e-2
    if family == "starcoder2" and "hidden" in cuts:
        # A layer norm also subtracts a mean, over fewer entries than before: no identity.
        assert logits.shape == expected.shape and logits.isfinite().all()
    else:
        # Transformers' norms compute in float32: exact where a norm sees the same entries, else up to its rounding.
        same_norms = "hidden" not in cuts and not (family == "olmo2" and {"groups", "own"} & {*cuts})
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9 if same_norms else 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_stay_ties(family: str, tied: bool, tmp_path: Path) -> None:
    config = _config(family, tie_word_embeddings=tied)
    kept = _kept(config, "hidden")
    prune_checkpoint(
        save_tiny(tmp_path / "teacher", config), tmp_path / "student", config, kept, provenance={}
    )
    student = _student(tmp_path / "student")
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "student" / "model.safetensors")) != tied
    torch.testing.assert_close(
        _logits(student), _silenced_logits(tiny_model(config), kept), rtol=0, atol=1e-5
    )


def test_the_students_folder_is_complete(tmp_path: Path) -> None:
    config = _config("glm4")
    source = save_tiny(tmp_path / "teacher", config)
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    (source / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")
    kept = _kept(config, "ffn", "layers")
    provenance = {"teacher": "tiny", "prune": {"method": "l1", "layers": None}}
    target = tmp_path / "runs" / "student"
    returned = prune_checkpoint(source, target, config, kept, provenance=provenance)
    names = {path.name for path in target.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        KEPT_FOLDER,
    }
    assert list(target.parent.iterdir()) == [target]
    assert json.loads((target / KEPT_FOLDER / PROVENANCE_FILE).read_text()) == provenance
    assert (target / KEPT_FOLDER / KEPT_FILE).is_file()
    loaded, metadata = load_kept(target)
    assert metadata == provenance and loaded.layers == kept.layers
    assert all(torch.equal(loaded.ffn[layer], kept.ffn[layer]) for layer in kept.layers)
    written = json.loads((target / "config.json").read_text())
    assert written["architectures"] == ["Glm4ForCausalLM"] and written["num_hidden_layers"] == 3
    assert returned.intermediate_size == 20
    generated = _student(target).generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 13)


def test_shards_on_both_sides_change_nothing(tmp_path: Path) -> None:
    config = _config("phi3")
    kept = _kept(config, "ffn", "groups")
    whole = save_tiny(tmp_path / "whole", config)
    tiny_model(config).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    prune_checkpoint(whole, tmp_path / "one", config, kept, provenance={})
    target = tmp_path / "many"
    prune_checkpoint(tmp_path / "sharded", target, config, kept, provenance={}, max_shard_bytes=40_000)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert torch.equal(_logits(_student(target)), _logits(_student(tmp_path / "one")))


def test_dtypes_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    config = _config("llama")
    source = save_tiny(tmp_path / "teacher", config, dtype=torch.bfloat16)
    _rewrite(
        source, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()})
    )
    prune_checkpoint(source, tmp_path / "student", config, _kept(config, "hidden"), provenance={})
    dtypes = {
        name: tensor.dtype for name, tensor in load_file(tmp_path / "student" / "model.safetensors").items()
    }
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({}, "lacks the tensors of .*layers.1.mlp.down_proj.weight"),
        ({"model.layers.1.mlp.router.weight": torch.ones(2, 2)}, "mlp.router.weight"),
        ({"model.layers.4.mlp.up_proj.weight": torch.ones(48, 32)}, "layers.4.mlp.up"),
        ({DOWN: torch.ones(32, 47)}, r"down_proj.weight .*\(32, 47\)"),
        ({DOWN: torch.ones(32, 48, dtype=torch.int8)}, "down_proj.weight as I8"),
        ({"model.norm.bias": torch.ones(32)}, "holds model.norm.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_nothing(
    added: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    config = _config("llama")
    source = save_tiny(tmp_path / "teacher", config)
    _rewrite(source, lambda tensors: tensors.update(added) if added else tensors.pop(DOWN))
    with pytest.raises(ConfigError, match=words):
        prune_checkpoint(source, tmp_path / "student", config, _kept(config, "ffn"), provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_tensors_that_transformers_ignores_are_ignored(tmp_path: Path) -> None:
    config = _config("llama", tie_word_embeddings=True)
    source = save_tiny(tmp_path / "teacher", config)
    copies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _rewrite(source, lambda tensors: tensors.update(copies))
    _rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    prune_checkpoint(source, tmp_path / "student", config, _kept(config, "ffn"), provenance={})
    _student(tmp_path / "student")
    _rewrite(source, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(ConfigError, match="ties lm_head"):
        prune_checkpoint(source, tmp_path / "second", config, _kept(config, "ffn"), provenance={})


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config("llama")
    source = save_tiny(tmp_path / "teacher", config)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken exists already"):
        prune_checkpoint(source, tmp_path / "taken", config, _kept(config, "ffn"), provenance={})

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(prune_module, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        prune_checkpoint(source, tmp_path / "student", config, _kept(config, "ffn"), provenance={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "teacher"]


def test_the_best_are_kept_in_order_and_ties_go_to_the_first() -> None:
    config = tiny_config("llama", hidden_size=8, intermediate_size=5, head_dim=2)
    scores = Scores(
        method="l1",
        ffn={layer: torch.tensor([1.0, 9.0, 3.0, 9.0, 2.0]).roll(layer) for layer in range(4)},
        groups={layer: torch.tensor([0.0, 2.0, 1.0, 3.0]) for layer in range(4)},
        hidden=torch.ones(8),
        layers={0: 0.9, 1: 0.1, 2: 0.1, 3: 0.5},
    )
    kept = choose(scores, config, Shape(4, 3, 4, 2, 3, None))
    assert kept.layers == (0, 1, 3)
    assert kept.hidden.tolist() == [0, 1, 2, 3]
    assert {layer: indices.tolist() for layer, indices in kept.ffn.items()} == {
        0: [1, 2, 3],
        1: [2, 3, 4],
        3: [0, 1, 4],
    }
    assert {tuple(indices.tolist()) for indices in kept.groups.values()} == {(1, 3)}
    assert choose(scores, config, Shape(8, 5, 8, 4, 2, (1, 2))).layers == (1, 2)


def test_layers_share_the_channels_by_their_scores() -> None:
    # Layer 0 leans on two units, layer 1 works evenly, layer 2 has one run only; all means are 1, 10 and 1.
    scores = {
        0: torch.tensor([0.1, 3.7, 0.1, 3.7, 0.1, 0.1, 0.1, 0.1]),
        1: 10 * torch.tensor([1.2, 0.8, 1.2, 0.8, 1.2, 0.8, 1.2, 0.8]),
        2: torch.ones(2),
    }
    assert share_out(scores, 4, step=2, fewest=1) == {0: 2, 1: 8, 2: 2}
    assert share_out(scores, 4, step=2, fewest=3) == {0: 4, 1: 6, 2: 2}
    assert share_out(scores, 2, step=2, fewest=1) == {0: 2, 1: 2, 2: 2}
    assert share_out(scores, 6, step=2, fewest=1) == {0: 8, 1: 8, 2: 2}
    config = tiny_config("llama", hidden_size=8, intermediate_size=8, head_dim=2, num_hidden_layers=2)
    whole = Scores(
        method="l1",
        ffn={layer: scores[layer] for layer in (0, 1)},
        groups={0: torch.tensor([9.0, 1.0, 1.0, 1.0]), 1: torch.tensor([1.0, 2.0, 3.0, 4.0])},
        hidden=torch.ones(8),
        layers={0: 0.9, 1: 0.1},
    )
    kept = choose(whole, config, Shape(8, 5, 4, 2, 2, None, Steps(ffn=2, groups=1, min_channels=2)))
    assert {layer: indices.tolist() for layer, indices in kept.ffn.items()} == {
        0: [1, 3],
        1: [0, 1, 2, 3, 4, 5, 6, 7],
    }
    assert {layer: indices.tolist() for layer, indices in kept.groups.items()} == {0: [0], 1: [1, 2, 3]}
    # Nobody has asked to cut the channels.
    kept = choose(whole, config, Shape(8, 5, 4, 2, 2, None, Steps(ffn=None, groups=1, min_channels=2)))
    assert [len(kept.ffn[layer]) for layer in (0, 1)] == [8, 8] and len(kept.groups[0]) == 1


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_layers_of_different_widths_go_on_as_any_model(family: str, tmp_path: Path) -> None:
    """Generate, save, and cut again, as a student or as a teacher."""
    config = _config(family, tie_word_embeddings=True)
    kept = _kept(config, "own")
    source = save_tiny(tmp_path / "teacher", config)
    middle = prune_checkpoint(source, tmp_path / "student", config, kept, provenance={})
    student = _student(tmp_path / "student")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    prompt = IDS[:, :4]
    generated = student.generate(prompt, max_new_tokens=3, do_sample=False)
    for _ in range(3):
        with torch.no_grad():
            following = student(input_ids=prompt, use_cache=False).logits[:, -1:].argmax(-1)
        prompt = torch.cat([prompt, following], dim=1)
    assert torch.equal(generated, prompt)
    student.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(_student(tmp_path / "saved")), _logits(student))
    with pytest.raises(Exception, match="per-layer attribute|mismatch|size"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    inner = _kept(middle, "own", "layers")
    inner = replace(
        inner,
        ffn={layer: torch.arange(8) for layer in inner.layers},
        groups={layer: torch.arange(1) for layer in inner.layers},
    )
    again = kept.of_student(inner)
    prune_checkpoint(tmp_path / "student", tmp_path / "again", middle, inner, provenance={})
    prune_checkpoint(source, tmp_path / "direct", config, again, provenance={})
    assert not (tmp_path / "again" / MODELING_FILE).exists()
    assert torch.equal(_logits(_student(tmp_path / "again")), _logits(_student(tmp_path / "direct")))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_orders_of_magnitude_on_the_embedded_teacher(tmp_path: Path) -> None:
    """The figures of the issue: l1 destroys SmolLM2 at ratio 0.2, activation-aware importance does not."""
    from distill.pretrained import resolve_model

    folder = resolve_model("embedded", cache_dir=Path(__file__).parents[2] / "models")
    windows, calibration = _pydoc_windows(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, layers = teacher.config, dict(enumerate(teacher.model.layers))
    base = _perplexity(teacher, windows)
    with ActivationRecorder(layers, Sizes.of(config)) as recorder, torch.no_grad():
        for row in calibration:
            recorder.expect(torch.ones(1, len(row), dtype=torch.bool))
            teacher.model(row[None], use_cache=False)
    scores = {
        "activation": gather_scores(recorder.measured, Mesh.single()),
        "l1": gather_scores(weight_scores(layers, Sizes.of(config)), Mesh.single()),
    }

    def pruned(**keys: object) -> float:
        prune = Prune(**keys)
        kept = choose(scores[prune.method], config, resolve_shape(config, prune, tp=1))
        target = tmp_path / "student"
        prune_checkpoint(folder, target, config, kept, provenance={})
        perplexity = _perplexity(_student(target, torch.float32), windows)
        shutil.rmtree(target)
        print(f"{keys}: perplexity {perplexity:.4g}")
        return perplexity

    print(f"teacher: perplexity {base:.4g}")
    assert 13 < base < 17
    assert pruned(method="l1", pruning_ratio=0.2) > 1e5
    assert base < pruned(pruning_ratio=0.2) < 1.5 * base
    assert 1.3 * base < pruned(pruning_ratio=0.4) < 2.7 * base
    assert 1.2 * base < pruned(num_layers=27) < 2 * base
    assert 1.6 * base < pruned(num_layers=24) < 4 * base


def _pydoc_windows(folder: Path) -> tuple[Tensor, Tensor]:
    """Return 4 windows of 512 tokens to judge on and 8 far away from them to calibrate on."""
    import pydoc_data.topics

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("".join(pydoc_data.topics.topics.values()), return_tensors="pt").input_ids[0]
    return ids[2000:4048].view(4, 512), ids[60_000:64_096].view(8, 512)


def _perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1]
            total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))
