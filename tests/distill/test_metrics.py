from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import Config, Log, MeshShape, Run, Train
from distill.metrics import RunLog, StepMetrics, duration
from tests.distill.test_line_file import full_at

CONTRACT = [
    *("step", "round", "tokens", "loss/total", "loss/hard", "loss/soft"),
    *("loss/hidden", "loss/temperature", "loss/alpha", "optim/grad_norm", "optim/lr"),
    "optim/skipped_steps",
    *("time/step_s", "throughput/tokens_per_s", "pipeline/bubble_fraction"),
    *("pipeline/planned_bubble_fraction", "pipeline/planned_step_s", "memory/peak_bytes"),
]


def config_in(folder: Path, *, wandb: str = "disabled", every: int = 1) -> Config:
    config = replace(Config(), run=Run(dir=str(folder)), mesh=MeshShape(pp=2, dp=1))
    return replace(config, log=Log(wandb=wandb, every=every), train=Train(global_batch_size=4))


def numbers(step: int, loss: float = 3.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        round=0,
        tokens=100 * step,
        loss_total=loss,
        loss_hard=4.0,
        loss_soft=2.0,
        loss_hidden=0.5,
        loss_temperature=2.5,
        loss_alpha=0.25,
        grad_norm=1.5,
        lr=1e-4,
        skipped_steps=3,
        step_s=2.0,
        tokens_per_s=50.0,
        bubble_fraction=0.25,
        planned_bubble_fraction=None if step == 1 else 0.125,
        planned_step_s=1.5,
        peak_bytes=10**9,
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_folder_and_the_names_of_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(config_in(tmp_path), writes=True) as log:
        log.evaluation(
            step=0,
            round=0,
            model="teacher",
            parameters=7,
            values={"eval/loss": 2.68, "eval/perplexity": 14.6, "eval/entropy_5_inf/kl": 0.5},
        )
        for step in (1, 2):
            log.step(numbers(step), total_steps=4)
        log.flush()
        assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
        summary = log.finish({"table": [{"model": "teacher"}], "tokens": 7})
    assert list(lines(tmp_path / "metrics.jsonl")[0]) == CONTRACT
    written = lines(tmp_path / "evaluations.jsonl")[0]
    assert (written["eval/loss"], written["eval/entropy_5_inf/kl"]) == (2.68, 0.5)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mesh"] == {"pp": 2, "dp": 1, "tp": 1}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["tokens"] == 7 and summary["seconds"] == 4.0 and summary["metrics"]["step"] == 2
    assert summary["layout"]["num_microbatches"] == 4 and summary["versions"]["torch"].startswith("2.")
    assert (tmp_path / "curve.svg").is_file() and not (tmp_path / "wandb").exists()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "held-out text, teacher after step 0: loss 2.68  perplexity 14.6"
    assert out[1] == "step 1/4  loss 3.0000  (hard 4.0000, soft 2.0000)  50 tokens/s  0:06 left"


def test_figures_that_are_undefined_or_known_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(config_in(tmp_path), writes=True) as log:
        level = {"eval/loss": 2.68, "eval/choices/animals/accuracy": 0.5}
        log.evaluation(step=0, round=0, model="teacher", parameters=7, values=level, known=True)
        log.evaluation(
            step=2, round=0, model="student", parameters=5, values={"eval/loss": 3.0, "eval/gap_closed": None}
        )
    assert lines(tmp_path / "evaluations.jsonl")[1]["eval/gap_closed"] is None
    assert capsys.readouterr().out.splitlines() == [
        "held-out text, teacher, judged before: loss 2.68  animals/accuracy 0.5",
        "held-out text, student after step 2: loss 3  gap_closed -",
    ]


def test_a_full_disk_is_borne_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = {"round": 0, "model": "student", "parameters": 5, "values": {"eval/loss": 3.0}}
    with RunLog(config_in(tmp_path), writes=True) as log:
        log.step(numbers(1), total_steps=4)
        log.flush()
        with full_at(10):
            log.step(numbers(2), total_steps=4)
            log.evaluation(step=2, **judged)
            log.flush()
        assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]
        assert not (tmp_path / "evaluations.jsonl").exists()
        log.step(numbers(3), total_steps=4)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == [2]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [
        f"warning: {tmp_path / name} could not be written: File too large; tried again with the next line"
        for name in ("metrics.jsonl", "evaluations.jsonl")
    ]


def test_other_ranks_touch_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(config_in(tmp_path / "run", wandb="offline"), writes=False) as log:
        log.evaluation(step=0, round=0, model="teacher", parameters=7, values={"eval/loss": 2.68})
        log.step(numbers(1), total_steps=1)
        log.say("not on this rank")
        log.finish({})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_going_on_keeps_one_line_a_step(tmp_path: Path) -> None:
    with RunLog(config_in(tmp_path), writes=True) as log:
        log.evaluation(step=0, round=0, model="student", parameters=5, values={"eval/loss": 5.0})
        for step in range(1, 6):
            log.step(numbers(step, loss=1.0), total_steps=8)
        log.evaluation(step=5, round=0, model="student", parameters=5, values={"eval/loss": 4.0})
    with RunLog(config_in(tmp_path), writes=True, done_steps=3) as log:
        assert log.trained_s == 6.0 and [line["step"] for line in log.evaluations] == [0]
        for step in range(4, 9):
            log.step(numbers(step, loss=2.0), total_steps=8)
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(1, 9))
    assert [line["loss/total"] for line in written] == [1.0] * 3 + [2.0] * 5


def test_lines_on_the_terminal_follow_log_every(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(config_in(tmp_path, every=3), writes=True) as log:
        for step in range(1, 8):
            log.step(numbers(step), total_steps=7)
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["3/7", "6/7", "7/7"] and len(lines(tmp_path / "metrics.jsonl")) == 7


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    with RunLog(config_in(tmp_path), writes=True) as log:
        log.step(numbers(1, loss=float("nan")), total_steps=1)
    assert lines(tmp_path / "metrics.jsonl")[0]["loss/total"] is None


def test_a_failure_closes_the_log(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLog(config_in(tmp_path), writes=True) as log:
        log.step(numbers(1), total_steps=2)
        _ = 1 / 0
    log.step(numbers(2), total_steps=2)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1 and (tmp_path / "curve.svg").is_file()


def test_saving_buffers_waits_for_what_was_given_but_not_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, written = threading.Event(), []
    monkeypatch.setattr("distill.metrics._DRAIN_S", 0.5)
    with RunLog(config_in(tmp_path), writes=True) as log:
        # Longer than taking the buffers away takes.
        monkeypatch.setattr(log, "_write_step", lambda *_: written.append(disk.wait(0.1)))
        log.step(numbers(1), total_steps=2)
        log.save_buffers()
        assert written == [False]
        monkeypatch.setattr(log, "_write_step", lambda *_: written.append(disk.wait(60)))
        log.step(numbers(2), total_steps=2)
        log.save_buffers()
        assert written == [False]
        disk.set()
    assert written == [False, True]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (192, "3:12"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def inspect(folder: Path) -> list[dict[str, Any]]:
    """Return the records of an offline run, as `wandb leet` reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def test_what_a_round_came_to_is_not_covered_by_the_next_ones_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both belong to one step, and wandb keeps one value of a name and a step."""
    given: list[tuple[int, str]] = []
    monkeypatch.setattr(
        RunLog, "_to_wandb", lambda self, values, *, step: given.extend((step, name) for name in values)
    )
    with RunLog(config_in(tmp_path), writes=True) as log:
        for step, index in ((0, 0), (4, 0), (4, 1), (8, 1)):
            log.evaluation(step=step, round=index, model="student", parameters=5, values={"eval/loss": 3.0})
    plain, cut = "student/eval/loss", "student/cut/eval/loss"
    assert given == [(0, plain), (4, plain), (4, cut), (8, plain)]


def test_wandb_gets_the_same_names_and_the_pictures(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run", wandb="offline")
    ids = set()
    for done, last in ((0, 2), (2, 3)):
        with RunLog(config, writes=True, done_steps=done) as log:
            for step in range(done + 1, last + 1):
                log.step(numbers(step), total_steps=3)
            log.evaluation(step=last, round=0, model="student", parameters=5, values={"eval/loss": 3.5})
            log.finish({"table": [{"model": "student"}]})
        ids.add((tmp_path / "run" / "wandb" / "run_id").read_text())
    assert len(ids) == 1, "a run that goes on is the same run"
    first, second = sorted(
        (tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime
    )
    records = inspect(first)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["_step"] for item in history] == [1, 2]
    assert set(CONTRACT) <= set(history[1])
    assert "pipeline/planned_bubble_fraction" not in history[0], "wandb gets no empty values"
    assert history[1]["student/eval/loss"] == 3.5
    assert history[1]["curve.path"].endswith(".html"), "the picture belongs to the last step"
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["config"]["update"]["loss"]["temperature"] == 2.0
    assert [r["history"]["item"]["_step"] for r in inspect(second) if r["type"] == "history"] == [3]
