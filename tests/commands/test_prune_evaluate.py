"""`launch.prune` and `launch.evaluate`, and what every command shows of itself."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import distill, evaluate, prune
from launch.command import Command
from tests.commands.tiny_run import (
    STEPS,
    Inputs,
    call,
    losses,
    read_lines,
    same_weights,
    snapshot,
    start,
    weights,
)


def rows(out: str) -> dict[str, dict[str, float]]:
    """Return the rows of a printed table by the model's name, without the cells that say nothing."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"
    ]
    return {
        line[0]: {name: float(cell.replace(",", "")) for name, cell in zip(cells[0], line, strict=True) if name != "model" and cell != "-"}
        for line in cells[2:]
    }  # fmt: skip


def test_prune_writes_a_student_and_nothing_else(inputs: Inputs, reference: Path, tmp_path: Path) -> None:
    arguments = inputs.settings(tmp_path)
    done = call(prune.COMMAND, arguments)
    scores, student = done.out.splitlines()
    assert done.code == 0 and student == f"student: {tmp_path / 'student'}", done.err
    # The run that the reference is of has scored this teacher on this text.
    assert scores.startswith(f"scores of {inputs.teacher}: those measured before, ")
    assert same_weights(tmp_path / "student", reference / "pruned"), (
        "the student that launch.distill begins with"
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"student", "scores.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.config.num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "student")("the cat")["input_ids"]
    before = snapshot(tmp_path)
    again = call(prune.COMMAND, arguments)
    assert again.code == 2 and again.errors == [
        f"error: run.dir={tmp_path} already holds a student; use another run.dir"
    ]
    other = call(distill.COMMAND, arguments)
    assert other.code == 2 and f"run.dir={tmp_path} holds student but no config.yaml" in other.errors[0]
    assert snapshot(tmp_path) == before


def test_prune_makes_the_first_rounds_student(inputs: Inputs, tmp_path: Path) -> None:
    rounds = "rounds=[{student: {prune: {num_layers: 2}}}, {}]"
    assert call(prune.COMMAND, inputs.settings(tmp_path / "first", rounds)).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "student")
    assert model.config.num_hidden_layers == 2


def test_what_pads_the_teachers_vocabulary_takes_no_part(inputs: Inputs, tmp_path: Path) -> None:
    """Sizes of one family pad the ids of one tokenizer to different widths."""
    assert call(prune.COMMAND, inputs.settings(tmp_path / "prune")).code == 0
    teacher = AutoModelForCausalLM.from_pretrained(inputs.teacher)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 7, mean_resizing=False)
    with torch.no_grad():
        teacher.lm_head.weight[-7:] = 5.0
    teacher.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(inputs.teacher).save_pretrained(tmp_path / "padded")
    ready = (f"student.model={tmp_path / 'prune' / 'student'}", "train.steps=3")
    for name, wide in (("plain", inputs.teacher), ("wide", tmp_path / "padded")):
        done = call(distill.COMMAND, inputs.settings(tmp_path / name, *ready, f"teacher.model={wide}"))
        assert done.code == 0, done.err
    assert losses(tmp_path / "plain") == losses(tmp_path / "wide")
    judged = [read_lines(tmp_path / name / "evaluations.jsonl") for name in ("plain", "wide")]
    for one, other in zip(*judged, strict=True):
        assert one["eval/loss"] == other["eval/loss"] and one["eval/kl"] == other["eval/kl"]


def test_a_pruned_student_is_distilled_and_judged(inputs: Inputs, reference: Path, tmp_path: Path) -> None:
    """In three commands what launch.distill does in one: the same student, bit for bit, and the same numbers."""
    assert call(prune.COMMAND, inputs.settings(tmp_path / "prune")).code == 0
    ready = f"student.model={tmp_path / 'prune' / 'student'}"
    done = call(distill.COMMAND, inputs.settings(tmp_path / "run", ready))
    assert done.code == 0, done.err
    assert same_weights(tmp_path / "run" / "student", reference / "student")
    assert list(rows(done.out)) == ["teacher", "student", "student + distilled"]
    judged = call(
        evaluate.COMMAND, inputs.settings(tmp_path / "none", f"student.model={reference / 'student'}")
    )
    assert judged.code == 0 and not (tmp_path / "none").exists(), judged.err
    logged = {(line["step"], line["model"]): line for line in read_lines(reference / "evaluations.jsonl")}
    shown = rows(judged.out)
    student = [name for name in shown if name != "teacher"]
    assert len(shown) == 2 and len(student) == 1
    for name, key in (("teacher", (0, "teacher")), (student[0], (STEPS, "student"))):
        assert math.isclose(shown[name]["perplexity"], logged[key]["eval/perplexity"], rel_tol=1e-3)
        assert math.isclose(shown[name]["agreement"], logged[key]["eval/agreement"], rel_tol=1e-3)


def test_l1_prunes_without_looking_at_text(inputs: Inputs, tmp_path: Path) -> None:
    done = call(
        prune.COMMAND, inputs.settings(tmp_path, "student.prune.method=l1", "student.prune.num_layers=null")
    )
    assert done.code == 0, done.err
    whole, cut = weights(inputs.teacher), weights(tmp_path / "student")
    up = [tensors["model.layers.0.mlp.up_proj.weight"] for tensors in (whole, cut)]
    assert up[1].shape == (32, 32)
    kept = [next(i for i, row in enumerate(up[0]) if torch.equal(row, mine)) for mine in up[1]]
    assert kept == sorted(kept)


@pytest.mark.parametrize("command", [distill.COMMAND, prune.COMMAND, evaluate.COMMAND])
def test_help_and_settings(command: Command, inputs: Inputs, tmp_path: Path) -> None:
    shown = call(command, ["--help"])
    assert shown.code == 0 and shown.err == ""
    keys = re.findall(r"^  ([a-z_]+\.[a-z_.]+)=", shown.out, flags=re.MULTILINE)
    assert {"teacher.model", "student.prune.method", "loss.temperature", "mesh.pp", "run.dir"} <= set(keys)
    settings = call(command, [*inputs.settings(tmp_path / "run"), "--cfg", "job"])
    values = yaml.safe_load(settings.out)
    assert settings.code == 0 and values["student"]["prune"]["num_layers"] == 3
    assert values["run"]["dir"] == str(tmp_path / "run") and list(tmp_path.iterdir()) == []


def test_help_through_the_launcher_comes_once(tmp_path: Path) -> None:
    done = start("launch.distill", ["--help"], num_ranks=2).end()
    assert done.code == 0 and done.err == "" and done.seconds < 60
    assert (
        done.out.startswith("torchrun --nproc-per-node N -m launch.distill ")
        and done.out.count("Keys (") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mesh.pp=2", "mesh.dp=2", "mesh.tp=2"])
def test_prune_and_evaluate_on_two_ranks(
    layout: str, inputs: Inputs, reference: Path, tmp_path: Path
) -> None:
    pruned = start("launch.prune", inputs.settings(tmp_path, layout), num_ranks=2).end()
    assert pruned.code == 0, pruned.err
    assert same_weights(tmp_path / "student", reference / "pruned")
    arguments = inputs.settings(tmp_path / "none", layout, f"student.model={reference / 'student'}")
    judged = start("launch.evaluate", arguments, num_ranks=2).end()
    assert judged.code == 0, judged.err
    alone = inputs.settings(tmp_path / "none", f"student.model={reference / 'student'}")
    expected = rows(call(evaluate.COMMAND, alone).out)
    for name, values in rows(judged.out).items():
        for key, value in values.items():
            assert math.isclose(value, expected[name][key], rel_tol=2e-3, abs_tol=1e-6), (name, key)
