"""A factored student that leaves the project: with the code in its folder, or merged into a plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distill.deploy.export import export_student
from distill.deploy.own_code import has_own_code
from distill.pretrained import load_config
from parallel.collectives import all_gather, shard_sizes
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.weights import load_weights
from tests.families import factored_config, save_tiny
from tests.workers import run_distributed

IDS = torch.tensor([[5, 17, 33, 2, 9, 61, 80, 96], [7, 7, 8, 2, 44, 51, 0, 4]])
POSITIONS = torch.arange(8).expand(2, -1)
RANKS = {"mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.down_proj": 8, "self_attn.o_proj": 8}
CASES = {
    "llama untied": factored_config("llama", RANKS, tie_word_embeddings=False),
    "qwen3 tied": factored_config("qwen3", RANKS, tie_word_embeddings=True),
    "gemma3 tied": factored_config(
        "gemma3_text", RANKS, tie_word_embeddings=True, sliding_window=5, hidden_size=64
    ),
}


def _export(source: str, root: str) -> Tensor:
    """Export a student from two shards in both ways; return its logits."""
    mesh = Mesh.create(pp=1, dp=1, tp=2)
    config = load_config(Path(source))
    stage = build_stage(config, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False)
    load_weights(stage, Path(source))
    with torch.no_grad():
        shard = stage.head(stage(IDS, POSITIONS))
        if not stage.head.gather_output:
            shard = all_gather(shard, mesh.tp, dim=-1, sizes=shard_sizes(config.vocab_size, 2))
    for kind in ("merged", "factored"):
        export_student(
            [stage],
            mesh,
            Path(root) / kind,
            source=Path(source),
            model_config=config,
            card="# A card\n",
            dtype=torch.float64,
            merge_factors=kind == "merged",
        )
    return stage.transform(shard)


@pytest.mark.parametrize("case", CASES)
def test_both_folders_are_the_trained_model(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where transformers keeps the code of a folder that it was told to trust.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = save_tiny(tmp_path / "student", CASES[case])
    logits = run_distributed(2, _export, str(source), str(tmp_path))[0]
    again = tmp_path / "again"
    for kind, trusted in (("merged", False), ("factored", True)):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / kind, dtype=torch.float64, trust_remote_code=trusted
        ).eval()
        assert type(model).__name__ == AutoModelForCausalLM._model_mapping[type(CASES[case])].__name__
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-6, atol=1e-7)
        generated = model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        expected = model(generated[:, :-1]).logits[:, 7:].argmax(dim=-1)
        assert torch.equal(generated[:, 8:], expected)
        # Saved by transformers and read again, it is still the same.
        model.save_pretrained(again)
        copy = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float64, trust_remote_code=trusted)
        with torch.no_grad():
            torch.testing.assert_close(copy(IDS).logits, logits, rtol=1e-6, atol=1e-7)


def test_a_factored_folder_needs_no_code_here(tmp_path: Path) -> None:
    config = CASES["qwen3 tied"]
    source = save_tiny(tmp_path / "student", config)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64, trainable=False)
    load_weights(stage, source)
    target = tmp_path / "factored"
    options = {"source": source, "card": "# A card\n", "dtype": torch.float64}
    export_student([stage], Mesh.single(), target, model_config=config, merge_factors=False, **options)
    written = json.loads((target / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoModelForCausalLM": "modeling_reflux_low_rank.RefluxLowRankForCausalLM"
    }
    assert has_own_code(target) and not has_own_code(source)
    read = load_config(target)
    again = build_stage(read, pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64, trainable=False)
    load_weights(again, target)
    assert torch.equal(again(IDS, POSITIONS), stage(IDS, POSITIONS))
    # And what is merged from there is plain: nothing in the config speaks of factors or code.
    export_student([again], Mesh.single(), tmp_path / "merged", model_config=read, **options)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not {"auto_map", "reflux_low_rank"} & written.keys()
    assert not list((tmp_path / "merged").glob("*.py"))
    (target / "more.py").write_text("")
    assert not has_own_code(target), "what is not ours is nobody's"
    (target / "more.py").unlink()
    with (target / "modeling_reflux_low_rank.py").open("a") as code:
        code.write("print('changed')\n")
    assert not has_own_code(target)


def test_a_model_from_the_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = CASES["llama untied"]
    source = save_tiny(tmp_path / "student", config)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), trainable=False)
    load_weights(stage, source)
    export_student(
        [stage], Mesh.single(), tmp_path / "out", source=source, model_config=config, card="", dtype=torch.float32, merge_factors=False
    )  # fmt: skip
    read = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(read, trust_remote_code=True)
    expected = sum(entry.numel() for entry in stage.parameters())
    assert sum(each.numel() for each in model.parameters()) == expected
