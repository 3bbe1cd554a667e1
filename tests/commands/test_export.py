"""The exported student is a plain Hugging Face folder, equal to what the stages hold, whatever the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.deploy.export import export_student
from distill.prune import load_kept
from launch import distill
from parallel.collectives import all_gather, broadcast_, shard_sizes
from parallel.mesh import Mesh
from parallel.model import build_stage
from parallel.weights import load_weights
from tests.commands.tiny_run import Inputs, call, same_weights, weights
from tests.workers import run_distributed

TOKENS_BS = torch.tensor([[5, 17, 200, 33, 9, 266, 41, 8], [100, 3, 3, 77, 250, 12, 60, 1]])


@pytest.fixture(scope="module")
def students(inputs: Inputs, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported students of whole runs, untied and tied."""
    folder = tmp_path_factory.mktemp("tied") / "run"
    done = call(distill.COMMAND, inputs.settings(folder, f"teacher.model={inputs.tied}", "train.steps=3"))
    assert done.code == 0, done.err
    return {"untied": reference / "student", "tied": folder / "student"}


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    return model.eval()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_transformers_reads_the_folder(kind: str, students: dict[str, Path]) -> None:
    folder = students[kind]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("the cat runs", return_tensors="pt")
    assert tokenizer.decode(prompt["input_ids"][0]) == "the cat runs"
    generated = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (1, prompt["input_ids"].shape[1] + 5)
    sizes = model.config
    assert (sizes.num_hidden_layers, sizes.intermediate_size, sizes.num_key_value_heads) == (3, 32, 2)
    assert ("lm_head.weight" in weights(folder)) == (kind == "untied")
    assert sizes.tie_word_embeddings == (kind == "tied")
    assert folder.name in (folder / "README.md").read_text().lower()


def test_the_kept_indices_cut_the_teacher_to_the_student(inputs: Inputs, reference: Path) -> None:
    """Of what is only cut and not trained: the pruned folder, against the indices that came with the export."""
    kept, provenance = load_kept(reference / "student")
    assert provenance["teacher"] == str(inputs.teacher) and provenance["prune"]["num_layers"] == 3
    whole, cut = weights(inputs.teacher), weights(reference / "pruned")
    assert len(kept.layers) == 3
    for new, old in enumerate(kept.layers):
        name = "model.layers.{}.mlp.up_proj.weight"
        expected = whole[name.format(old)][kept.ffn[old]][:, kept.hidden]
        assert torch.equal(cut[name.format(new)], expected)
    assert not same_weights(reference / "pruned", reference / "student"), "training changes the weights"


def _export(pp: int, tp: int, source: str, target: str) -> torch.Tensor | None:
    """Load a student into stages, run them by hand, export them; return the logits of the last stage."""
    mesh = Mesh.create(pp=pp, dp=1, tp=tp)
    config = AutoConfig.from_pretrained(source)
    stage = build_stage(config, pp=mesh.pp, tp=mesh.tp, dtype=torch.float32, trainable=False)
    load_weights(stage, Path(source))
    positions_BS = torch.arange(TOKENS_BS.shape[1]).expand_as(TOKENS_BS)
    x = TOKENS_BS
    with torch.no_grad():
        if not mesh.pp.is_first:
            x = torch.empty(*TOKENS_BS.shape, config.hidden_size)
            broadcast_(x, mesh.pp, source=0)
        hidden_BSD = stage(x, positions_BS)
        if not mesh.pp.is_last:
            broadcast_(hidden_BSD, mesh.pp, source=0)
    logits = None
    if mesh.pp.is_last:
        shard = hidden_BSD @ stage.head.weight.detach().T
        logits = stage.transform(
            all_gather(shard, mesh.tp, dim=2, sizes=shard_sizes(config.vocab_size, mesh.tp.size))
        )
    export_student(
        [stage],
        mesh,
        Path(target),
        source=Path(source),
        model_config=config,
        card="# A card\n",
        dtype=torch.float32,
    )
    return logits


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_stages_and_their_export_are_one_model(kind: str, students: dict[str, Path], tmp_path: Path) -> None:
    source = students[kind]
    with torch.no_grad():
        expected = load(source)(TOKENS_BS).logits
    for pp, tp in ((2, 1), (1, 2)):
        target = tmp_path / f"pp{pp}tp{tp}"
        logits = run_distributed(2, _export, pp, tp, str(source), str(target))[-1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert same_weights(target, source)
        with torch.no_grad():
            torch.testing.assert_close(load(target)(TOKENS_BS).logits, expected, rtol=0, atol=0)
        left_out = {path.name for path in source.rglob("*") if path.suffix != ".safetensors"}
        assert left_out <= {path.name for path in target.rglob("*")}, (
            "tokenizer, kept indices and card come along"
        )
