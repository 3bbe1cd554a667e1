"""A whole run whose student's layers differ in width: cut, trained, exported with the code that builds it, gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.cut_config import MODELING_FILE
from distill.prune import load_kept
from launch import distill
from launch.export import export
from parallel.mesh import Axis
from parallel.model import build_stage
from parallel.weights import load_weights
from tests.commands.tiny_run import Inputs, call, losses, same_weights
from tests.distill.tiny_tokenizer import TOKENS, tiny_tokenizer
from tests.families import tiny_config, tiny_model

IDS = torch.tensor([[5, 17, 33, 2, 9, 61, 80, 96]])


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of a run whose teacher leans on one query group and a third of the channels in its first layer."""
    folder = tmp_path_factory.mktemp("leaning")
    model = tiny_model(
        tiny_config("qwen3", vocab_size=len(TOKENS), intermediate_size=96), dtype=torch.float32
    )
    first = model.model.layers[0]
    with torch.no_grad():
        # Two query heads of 8 to a group.
        first.self_attn.o_proj.weight[:, 16:] *= 0.01
        first.mlp.down_proj.weight[:, 32:] *= 0.01
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return (
        f"teacher.model={folder}",
        "student.prune.per_layer=true",
        "student.prune.num_layers=null",
        "student.prune.intermediate_size=64",
        "train.steps=4",
        "checkpoint.every=2",
    )


@pytest.fixture(scope="module")
def run(inputs: Inputs, wanted: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("per_layer") / "run"
    done = call(distill.COMMAND, inputs.settings(folder, *wanted))
    assert done.code == 0, done.err
    return folder


def _loaded(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def _stage_logits(folder: Path) -> Tensor:
    """Return what training computes with the weights of a folder."""
    stage = build_stage(
        AutoConfig.from_pretrained(folder),
        pp=Axis("pp"),
        tp=Axis("tp"),
        dtype=torch.float64,
        trainable=False,
    )
    load_weights(stage, folder)
    return stage.transform(stage.head(stage(IDS, torch.arange(IDS.shape[1])[None])))


def test_the_exported_student_builds_the_layers_that_were_trained(run: Path, tmp_path: Path) -> None:
    student = run / "student"
    kept, _ = load_kept(student)
    groups, channels = ([len(own[layer]) for layer in range(4)] for own in (kept.groups, kept.ffn))
    assert groups[0] == 1 and sum(groups) == 4 * 2, "the first layer leaves its share to the others"
    assert channels[0] == 32 and sum(channels) == 4 * 64
    assert json.loads((student / "config.json").read_text())["per_layer_config"]
    assert (student / MODELING_FILE).is_file()
    model = _loaded(student)
    layers = model.model.layers
    assert [layer.self_attn.o_proj.in_features for layer in layers] == [16 * each for each in groups]
    assert [layer.mlp.down_proj.in_features for layer in layers] == channels
    torch.testing.assert_close(_logits(model), _stage_logits(student), rtol=1e-9, atol=1e-9)
    # Out of a checkpoint it is the same.
    out = tmp_path / "out"
    export([f"checkpoint={run / 'checkpoints' / 'step-00000004'}", f"out={out}"])
    assert same_weights(out, student) and torch.equal(_logits(_loaded(out)), _logits(model))


def test_a_checkpoint_brings_its_uneven_student_along(
    inputs: Inputs, wanted: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    begin = f"checkpoint.resume={run / 'checkpoints' / 'step-00000002'}"
    done = call(distill.COMMAND, inputs.settings(tmp_path, *wanted, begin))
    assert done.code == 0, done.err
    assert "going on after step 2 of 4" in done.out
    assert losses(tmp_path) == losses(run)[2:]
    assert same_weights(tmp_path / "student", run / "student")
    assert (tmp_path / "student" / MODELING_FILE).is_file()
