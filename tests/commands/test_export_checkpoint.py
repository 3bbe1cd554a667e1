"""The student of a checkpoint alone is the one that its run exports, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import cut_files
from distill.config import ConfigError
from distill.deploy.from_checkpoint import export_checkpoint
from launch import distill
from launch.export import export
from tests.commands.tiny_run import STEPS, Inputs, call, same_weights, weights
from tests.parallel.forged import admit, edit_manifest, rewrite

SHARD = "stage-000-tp-00.safetensors"


@pytest.fixture
def alone(reference: Path, tmp_path: Path) -> Path:
    """The last checkpoint of the reference run, and nothing else of it."""
    return Path(shutil.copytree(reference / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "alone"))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_is_what_the_run_exports(
    reference: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export([f"checkpoint={alone}", f"out={out}"])
    assert capsys.readouterr().out == f"student: {out}\n"
    assert same_weights(out, reference / "student")
    own = {"model.safetensors"}
    of_a_layout = {
        name for name in files(reference / "student") if name.startswith("model") and name not in own
    }
    assert files(out) - own == files(reference / "student") - of_a_layout
    for name in files(out) - own - {"README.md"}:
        assert (out / name).read_bytes() == (reference / "student" / name).read_bytes(), name
    card = (out / "README.md").read_text()
    assert f"the checkpoint of step {STEPS}" in card and "- Loss: alpha x cross-entropy" in card
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"]
    assert (alone / "scores.safetensors").read_bytes() == (reference / "scores.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=f"out={out} exists already; remove it"):
        export([f"checkpoint={alone}", f"out={out}"])


def test_one_file_is_in_memory_at_a_time(
    reference: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, sizes = cut_files.save_file, []

    def look(tensors: dict[str, torch.Tensor], *rest: object, **named: object) -> None:
        sizes.append(sum(each.nbytes for each in tensors.values()))
        save(tensors, *rest, **named)

    monkeypatch.setattr(cut_files, "save_file", look)
    export_checkpoint(alone, tmp_path / "out", max_shard_bytes=40_000)
    assert len(sizes) > 2 and max(sizes) <= 40_000
    assert same_weights(tmp_path / "out", reference / "student")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_checkpoint_in_the_middle_of_a_run(reference: Path, tmp_path: Path) -> None:
    folder = reference / "checkpoints" / "step-00000005"
    export([f"checkpoint={folder}", f"out={tmp_path / 'out'}"])
    masters = load_file(folder / SHARD)
    exported = weights(tmp_path / "out")
    assert {f"weight/{name}" for name in exported} == {name for name in masters if name.startswith("weight/")}
    assert all(torch.equal(each, masters[f"weight/{name}"]) for name, each in exported.items())


def test_factors_merged_and_as_they_are(inputs: Inputs, tmp_path: Path) -> None:
    """Of a tied student in bfloat16 with projections beside it, whose masters are rounded before they are multiplied."""
    settings = inputs.settings(
        tmp_path / "run",
        f"teacher.model={inputs.tied}",
        "student.low_rank.ratio=0.6",
        "loss.hidden.weight=0.1",
        "train.dtype=bfloat16",
        "train.steps=2",
    )
    done = call(distill.COMMAND, settings)
    assert done.code == 0, done.err
    folder = Path(shutil.move(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "alone"))
    merged, factored = tmp_path / "merged", tmp_path / "factored"
    export([f"checkpoint={folder}", f"out={merged}"])
    assert same_weights(merged, tmp_path / "run" / "student")
    assert (merged / "config.json").read_bytes() == (
        tmp_path / "run" / "student" / "config.json"
    ).read_bytes()
    assert "merged here" in (merged / "README.md").read_text()
    export([f"checkpoint={folder}", f"out={factored}", "export.low_rank=factored"])
    parts, name = weights(factored), "model.layers.1.mlp.down_proj"
    first, second = (parts[f"{name}.{which}.weight"] for which in ("first", "second"))
    assert first.dtype == torch.bfloat16
    product = (second.float() @ first.float()).bfloat16()
    assert torch.equal(product, weights(merged)[f"{name}.weight"])
    assert not any("projection" in each for each in parts)
    assert "trust_remote_code=True" in (factored / "README.md").read_text()
    assert (factored / "modeling_reflux_low_rank.py").is_file()


def test_what_does_not_fit_is_named(alone: Path, tmp_path: Path) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    name = "weight/model.layers.0.mlp.up_proj.weight"

    def refused(*words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            export([f"checkpoint={broken}", f"out={out}"])
        assert all(word in str(caught.value) for word in (f"checkpoint={broken}: ", *words)), caught.value
        assert not out.exists() and not list(tmp_path.glob(".building*")) and "\n" not in str(caught.value)
        shutil.rmtree(broken)
        shutil.copytree(alone, broken)

    shutil.copytree(alone, broken)
    flipped = bytearray((broken / SHARD).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (broken / SHARD).write_bytes(flipped)
    refused(SHARD, "is damaged")
    rewrite(broken, SHARD, lambda tensors: {key: each for key, each in tensors.items() if key != name})
    refused(f"no file of the checkpoint has the tensor '{name}'")
    rewrite(broken, SHARD, lambda tensors: {**tensors, "weight/model.extra": torch.zeros(1)})
    refused("it holds 'weight/model.extra', which Qwen3ForCausalLM does not have")
    rewrite(broken, SHARD, lambda tensors: {**tensors, name: tensors[name].flatten()})
    refused(f"{name} is [1024], its config says [32, 32]")
    for file, content in (
        ("settings.json", "{"),
        ("settings.json", '{"trains": 1}'),
        ("student/config.json", "[]"),
        ("student/config.json", '{"model_type": "nonsense"}'),
    ):
        (broken / file).write_text(content)
        admit(broken, file, to="companions")
        refused(file, "cannot be read")
    (broken / "student/config.json").write_text('{"model_type": "vit"}')
    admit(broken, "student/config.json", to="companions")
    refused("config.json builds no causal LM")
    edit_manifest(broken, lambda body: {**body, "extras": {**body["extras"], "round": -1}})
    refused("extras.round is -1")
    edit_manifest(broken, lambda body: {**body, "companions": {}})
    (broken / "settings.json").unlink()
    refused("settings.json cannot be read")
    assert json.loads((alone / "settings.json").read_text())["train"]["steps"] == STEPS
