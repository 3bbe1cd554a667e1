"""lm_eval as a judge: the same answers as ours on the shipped task where it is installed, and one line where it fails."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.config import Config, ConfigError, Evaluate
from distill.prune import modeling_code
from distill.stop import Stop
from distill.student_config import Student
from launch import evaluate, lm_eval
from launch.lm_eval import judge_folder, with_figures
from parallel.mesh import Mesh

ROOT = Path(__file__).parents[2]
TASK = ROOT / "tests" / "lm_eval_task"


def stand_in(monkeypatch: pytest.MonkeyPatch, *, results: dict[str, Any] | None, code: int = 0) -> list[Any]:
    """Let lm_eval be one that writes these results; return the calls of it."""
    calls: list[Any] = []

    def run(command: list[str], stop: Stop, **options: Any) -> SimpleNamespace:
        settings = json.loads(Path(command[-1]).read_text())
        calls.append((command, options, settings))
        if results is not None:
            out = Path(settings["output_path"])
            out.with_name("results_2026-01-01.json").write_text(json.dumps({"results": results}))
        return SimpleNamespace(returncode=code, stderr="log\nValueError: no such task\n", stdout="")

    monkeypatch.setattr(lm_eval, "_run", run)
    return calls


def test_how_lm_eval_is_called_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("KEPT", "yes")
    metrics = {"alias": "t", "sample_len": 5, "acc,none": 0.4, "acc_stderr,none": "N/A", "em,strict": 1}
    calls = stand_in(monkeypatch, results={"t": metrics})
    monkeypatch.chdir(tmp_path)
    found = judge_folder(Path("student"), [str(TASK), "arc_easy"], Stop(), dtype="float32", device="cpu")
    assert list(found) == [str(TASK), "arc_easy"]
    assert found["arc_easy"] == {"lm_eval/t/acc": 0.4, "lm_eval/t/em,strict": 1.0}
    (command, local, settings), (_, hub, named) = calls
    assert command[:5] == [sys.executable, "-m", "lm_eval", "run", "--config"]
    assert local["cwd"] == TASK and hub["cwd"] is None
    assert settings["tasks"] == [str(TASK)] and named["tasks"] == ["arc_easy"]
    assert settings["model_args"] == {"pretrained": str(tmp_path / "student"), "dtype": "float32"}
    assert local["env"]["KEPT"] == "yes" and not {"WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(local["env"])


def with_code(folder: Path, model_type: str, module: str, code: str = "import os\n") -> Path:
    """Make a folder whose config.json names a module of its own."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(code)
    named = {"AutoModelForCausalLM": f"{module}.SomeForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": named}))
    return folder


def test_code_of_a_model_is_run_if_it_is_ours_or_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch, results={"t": {"acc,none": 0.4}})
    layerwise = ("llama", "modeling_layerwise")
    ours = with_code(tmp_path / "ours", *layerwise, modeling_code("LlamaForCausalLM"))
    theirs = with_code(tmp_path / "theirs", *layerwise)
    unknown = with_code(tmp_path / "unknown", "from-the-future", "modeling_future")
    known = with_code(tmp_path / "known", "phi3", "modeling_phi3")
    judge = partial(judge_folder, tasks=["t"], stop=Stop(), dtype="float32", device="cpu")
    judge(ours)
    for folder in (theirs, unknown):
        with pytest.raises(
            ConfigError, match=rf"{folder.name} comes with Python code that is not .*trust_remote_code=true"
        ):
            judge(folder)
    judge(theirs, trust_remote_code=True)
    judge(known)
    trusted = [settings["model_args"].get("trust_remote_code") for _, _, settings in calls]
    assert trusted == [True, True, None], "transformers has a class of its own for the last"


def test_code_that_nobody_trusts_is_told_before_models_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_code(tmp_path / "theirs", "llama", "modeling_reflux_low_rank")
    monkeypatch.setattr("distill.pretrained.resolve_model", lambda name, **rest: Path(name))
    monkeypatch.setattr("distill.without_training.judge_models", lambda *given: pytest.fail("judged"))
    config = Config(student=Student(model=str(folder)), evaluate=Evaluate(lm_eval=("t",)))
    with pytest.raises(ConfigError, match="theirs comes with Python code"):
        evaluate.evaluate(config, Mesh.single(), Stop())


@pytest.mark.parametrize(("results", "code"), [(None, 0), ({"t": {}}, 1)])
def test_a_failure_is_one_line(results: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, results=results, code=code)
    with pytest.raises(ConfigError) as caught:
        judge_folder(Path("student"), ["nonsense"], Stop(), dtype="float32", device="cpu")
    assert str(caught.value).startswith(
        "evaluate.lm_eval=nonsense: lm_eval failed (ValueError: no such task); look"
    )


def test_lm_eval_ends_with_the_process_that_has_started_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a request to stop, or by the last calls of a process that leaves at once; with what it has started."""
    program = ["sh", "-c", "sleep 60; true"]
    begin_s = time.monotonic()
    leaving = Stop()

    def leave() -> None:
        while not leaving._last_calls:
            time.sleep(0.01)
        leaving.save_buffers()

    threading.Thread(target=leave).start()
    done = lm_eval._run(program, leaving)
    assert done is not None and done.returncode == -signal.SIGKILL
    asked = Stop()
    threading.Timer(0.3, asked.request).start()
    assert lm_eval._run(program, asked) is None
    assert time.monotonic() - begin_s < 30, "nobody waits for the sleep, which holds the pipe"
    assert lm_eval._run(["sh", "-c", "echo told >&2; exit 3"], Stop()).returncode == 3  # type: ignore[union-attr]
    monkeypatch.setattr(lm_eval, "_run", lambda *given, **options: None)
    assert judge_folder(Path("student"), ["t", "u"], asked, dtype="float32", device="cpu") == {}
    assert capsys.readouterr().out.endswith("judged by t; the same command judges by it again\n")


def test_figures_become_columns_of_the_judged_row() -> None:
    rows = with_figures([{"model": "teacher"}, {"model": "student"}], 1, {"lm_eval/t/acc": 0.5})
    assert rows == [
        {"model": "teacher", "lm_eval/t/acc": None},
        {"model": "student", "lm_eval/t/acc": 0.5},
    ]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_and_our_own_judge_agree(tmp_path: Path) -> None:
    from tests.commands.tiny_run import call, make_inputs

    torch.manual_seed(0)
    inputs = make_inputs(tmp_path)
    out = tmp_path / "out.json"
    done = call(
        evaluate.COMMAND,
        inputs.settings(
            tmp_path / "none",
            "data.seq_len=64",
            f"student.model={inputs.tied}",
            f"evaluate.choices=[{TASK / 'animals.jsonl'}]",
            f"evaluate.lm_eval=[{TASK}]",
            f"evaluate.out={out}",
        ),
    )
    assert done.code == 0, done.err
    teacher, student = json.loads(out.read_text())["table"]
    assert teacher["lm_eval/animals/acc"] is None
    assert student["lm_eval/animals/acc"] == student["choices/animals/accuracy"]
    assert student["lm_eval/animals/acc_bytes"] == student["choices/animals/accuracy_norm"]
    assert student["lm_eval/animals/acc_stderr"] == pytest.approx(student["choices/animals/accuracy_stderr"])
    with pytest.raises(ConfigError, match="evaluate.lm_eval=no_such_task: lm_eval failed"):
        judge_folder(inputs.tied, ["no_such_task"], Stop(), dtype="float32", device="cpu")
