"""Whole runs with a factored student: pruned, factored, trained, exported, gone on with, and judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.config import ConfigError
from launch import distill, evaluate, prune
from launch.export import export
from tests.commands.tiny_run import Inputs, call, losses, same_weights, start, weights

WANTED = ("student.low_rank.ratio=0.6", "train.steps=4", "checkpoint.every=2", "train.dtype=float64")


@pytest.fixture(scope="module")
def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "run"
    done = call(distill.COMMAND, inputs.settings(folder, *WANTED))
    assert done.code == 0, done.err
    assert "factored 9 of 9 linears, ranks 8 to 8" in done.out
    return folder


def test_the_export_is_the_trained_student(inputs: Inputs, merged: Path, tmp_path: Path) -> None:
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", *WANTED, "export.low_rank=factored"))
    assert done.code == 0, done.err
    factored = tmp_path / "run" / "student"
    assert losses(tmp_path / "run") == losses(merged)
    plain, parts = weights(merged / "student"), weights(factored)
    name = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(
        plain[f"{name}.weight"], parts[f"{name}.second.weight"] @ parts[f"{name}.first.weight"], rtol=1e-12, atol=1e-14
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(merged / "student")
    assert "merged here" in (merged / "student" / "README.md").read_text()
    assert "trust_remote_code=True" in (factored / "README.md").read_text()
    # As a student it needs no code of its own: what is judged is what was trained.
    expected = json.loads((merged / "summary.json").read_text())["table"][-1]
    for folder in (merged / "student", factored):
        arguments = inputs.settings(tmp_path / "judged", f"student.model={folder}", "train.dtype=float64")
        done = call(evaluate.COMMAND, arguments)
        assert done.code == 0, done.err
        row = next(line for line in done.out.splitlines() if line.startswith("| student"))
        cells = [cell.strip() for cell in row.split("|")]
        assert {f"{expected[name]:.4g}" for name in ("perplexity", "agreement", "loss", "kl")} <= set(cells)
        assert f"{expected['parameters']:,}" in cells or folder == merged / "student"


def test_the_student_alone_is_the_one_that_a_run_begins_with(
    inputs: Inputs, merged: Path, tmp_path: Path
) -> None:
    """Factored it loads by its own code, merged without; either is the model that a run begins to train."""
    models = []
    for low_rank in ("factored", "merged"):
        folder = tmp_path / low_rank
        done = call(prune.COMMAND, inputs.settings(folder, *WANTED, f"export.low_rank={low_rank}"))
        assert done.code == 0 and f"student: {folder / 'student'}" in done.out, done.err
        assert {path.name for path in folder.iterdir()} <= {"student", "scores.safetensors"}
        card = (folder / "student" / "README.md").read_text()
        assert "Not trained since" in card and f"pruned out of `{inputs.teacher}`" in card
        models.append(
            AutoModelForCausalLM.from_pretrained(
                folder / "student", dtype=torch.float64, trust_remote_code=low_rank == "factored"
            )
        )
    mine, expected = weights(tmp_path / "factored" / "student"), weights(merged / "factored")
    assert mine.keys() == expected.keys()
    # A run's are in the teacher's float32.
    assert all(torch.equal(mine[name], expected[name].double()) for name in mine)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        one, other = (model.eval()(input_ids=ids, use_cache=False).logits for model in models)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_layers_of_different_widths_are_exported_merged(inputs: Inputs, tmp_path: Path) -> None:
    uneven = "student.prune.per_layer=true"
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", *WANTED, uneven))
    assert done.code == 0, done.err
    checkpoint = f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'step-00000004'}"
    with pytest.raises(ConfigError, match="export.low_rank=factored does not go with layers of different"):
        export([checkpoint, f"out={tmp_path / 'factored'}", "export.low_rank=factored"])
    export([checkpoint, f"out={tmp_path / 'merged'}"])
    assert same_weights(tmp_path / "merged", tmp_path / "run" / "student")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Layers differ in width" in card and "merged here" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    widths = {
        (layer.mlp.up_proj.out_features, layer.self_attn.q_proj.out_features) for layer in model.model.layers
    }
    assert len(widths) > 1, "the layers do differ"


@pytest.mark.slow
def test_two_stages_are_one_run(inputs: Inputs, merged: Path, tmp_path: Path) -> None:
    arguments = inputs.settings(tmp_path / "run", *WANTED, "mesh.pp=2")
    done = start("launch.distill", arguments, num_ranks=2).end(timeout_s=200)
    assert done.code == 0, done.err
    for mine, expected in zip(losses(tmp_path / "run"), losses(merged), strict=True):
        assert mine == pytest.approx(expected, rel=1e-9)


def test_a_run_goes_on_with_its_factors(inputs: Inputs, merged: Path, tmp_path: Path) -> None:
    constant = [*WANTED, "optimizer.schedule=constant"]
    for folder, steps in (("twice", 2), ("twice", 4), ("once", 4)):
        done = call(distill.COMMAND, inputs.settings(tmp_path / folder, *constant, f"train.steps={steps}"))
        assert done.code == 0, done.err
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.low_rank.layers=[5]"], "error: student.low_rank.layers=[5] names layer 5, but the student's are 0 to 2"),
        (["student.low_rank.modules=[mlp.fc]"], "error: student.low_rank.modules=[mlp.fc] names mlp.fc, which"),
    ],
)  # fmt: skip
def test_mistakes_are_seen_before_weights_are_read(
    overrides: list[str], words: str, inputs: Inputs, tmp_path: Path
) -> None:
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", *WANTED, *overrides))
    assert done.code == 2 and done.errors[0].startswith(words), done.err
    assert not (tmp_path / "run" / "pruned").exists()


def test_a_factored_teacher_is_not_pruned(inputs: Inputs, merged: Path, tmp_path: Path) -> None:
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", f"teacher.model={merged / 'factored'}"))
    assert done.code == 2
    assert done.errors[0].startswith(
        "error: student.prune: a qwen3 with factored linears cannot be pruned; use one"
    )
