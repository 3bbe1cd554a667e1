"""What `launch.distill` and `launch.evaluate` say of their models: questions, the gap closed, the teacher judged once."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch import distill, evaluate
from tests.commands.tiny_run import STEPS, Inputs, call, read_lines, start

QUESTIONS = Path(__file__).parents[1] / "lm_eval_task" / "animals.jsonl"
ACCURACY = ("choices/animals/accuracy", "choices/animals/accuracy_norm")


def judged(inputs: Inputs, out: Path, *overrides: str) -> list[str]:
    """Return the command line that judges by the questions, with every figure in a file."""
    common = ("data.seq_len=64", f"evaluate.choices=[{QUESTIONS}]", f"evaluate.out={out}", *overrides)
    return inputs.settings(out.parent / "none", *common)


def table(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text())["table"]


def test_a_run_says_what_it_has_closed_and_what_its_student_knows(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    every = ["data.seq_len=64", f"evaluate.choices=[{QUESTIONS}]", f"evaluate.every={STEPS // 2}"]
    # A teacher's level of its own: another run may have judged this teacher by these rows.
    every.append(f"data.cache_dir={tmp_path / 'cache'}")
    done = call(distill.COMMAND, inputs.settings(run, *every))
    assert done.code == 0, done.err
    assert "held-out text, teacher after step 0: " in done.out
    teacher, begin, middle, end = read_lines(run / "evaluations.jsonl")
    assert "eval/gap_closed" not in teacher | begin
    for line in (middle, end):
        gap = begin["eval/loss"] - teacher["eval/loss"]
        expected = (begin["eval/loss"] - line["eval/loss"]) / gap if gap > 0 else None
        assert line["eval/gap_closed"] == expected
    assert not any("choices" in name for name in middle)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["gap_closed"] == end["eval/gap_closed"]
    assert [row["gap_closed"] for row in summary["table"]] == [None, None, end["eval/gap_closed"]]
    for row, line in zip(summary["table"], (teacher, begin, end), strict=True):
        assert all(row[name] == line[f"eval/{name}"] for name in ACCURACY)
    assert "| gap_closed | choices/animals/accuracy |" in done.out

    again = call(distill.COMMAND, inputs.settings(tmp_path / "again", *every))
    assert "held-out text, teacher, judged before: " in again.out
    assert read_lines(tmp_path / "again" / "evaluations.jsonl") == [teacher, begin, middle, end]

    out = tmp_path / "out.json"
    arguments = judged(inputs, out, every[-1], f"student.model={run / 'student'}")
    alone = call(evaluate.COMMAND, arguments)
    assert alone.code == 0 and alone.out.startswith("teacher, judged before: "), alone.err
    for row, line in zip(table(out), (teacher, end), strict=True):
        figures = {
            name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")
        }
        figures.pop("gap_closed", None)
        assert row.keys() - figures.keys() == {"model", "parameters"}
        assert all(row[name] == pytest.approx(value, rel=1e-6) for name, value in figures.items())


def test_a_teacher_is_judged_alone(inputs: Inputs, tmp_path: Path) -> None:
    done = call(evaluate.COMMAND, judged(inputs, tmp_path / "out.json", "student.prune.num_layers=99"))
    assert done.code == 0, done.err
    (row,) = table(tmp_path / "out.json")
    assert row["model"] == "teacher" and row["kl"] == 0.0 and row["parameters"] > 0
    assert 0 <= row["choices/animals/accuracy"] <= 1
    assert not (tmp_path / "none").exists()


def test_a_line_that_is_no_question(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 7}')
    for command in (distill.COMMAND, evaluate.COMMAND):
        done = call(command, inputs.settings(tmp_path / "run", f"evaluate.choices=[{tmp_path / 'q.jsonl'}]"))
        assert done.code == 2 and done.errors[0].startswith(
            f"error: evaluate.choices={tmp_path / 'q.jsonl'}, line 1: its answer=7 is not an index from 0 to 1"
        )
        assert len(done.errors) == 1 and "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mesh.pp=2", "mesh.dp=2", "mesh.tp=2"])
def test_the_same_figures_in_every_layout(layout: str, inputs: Inputs, tmp_path: Path) -> None:
    results = []
    for number, ranks in enumerate((1, 2)):
        arguments = judged(
            inputs,
            tmp_path / f"{number}.json",
            "train.dtype=float64",
            f"student.model={inputs.tied}",
            f"data.cache_dir={tmp_path / f'cache{number}'}",
            *([layout] if ranks == 2 else []),
        )
        done = start("launch.evaluate", arguments, num_ranks=ranks if ranks > 1 else None).end()
        assert done.code == 0, done.err
        results.append(table(tmp_path / f"{number}.json"))
    for one, two in zip(*results, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value == two[name] or math.isclose(value, two[name], rel_tol=1e-9, abs_tol=1e-12), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_judges_the_finished_student(inputs: Inputs, tmp_path: Path) -> None:
    """On two ranks: the one that lm_eval runs beside must not draw it into its world."""
    task = QUESTIONS.parent
    arguments = inputs.settings(tmp_path / "run", "mesh.pp=2", f"evaluate.lm_eval=[{task}]")
    done = start("launch.distill", arguments, num_ranks=2).end()
    assert done.code == 0 and "lm_eval/animals/acc |" in done.out, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = summary["lm_eval"][str(task)]
    assert 0 <= figures["lm_eval/animals/acc"] <= 1
    assert [row["lm_eval/animals/acc"] for row in summary["table"]] == [
        None,
        None,
        figures["lm_eval/animals/acc"],
    ]
    again = start("launch.distill", arguments, num_ranks=2).end()
    assert again.code == 0 and "lm_eval judges" in done.out and "lm_eval judges" not in again.out
