from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distill.config import ConfigError, Evaluate
from distill.judging_checks import check_judging


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files of one stem, a task, and a folder without tasks."""
    for name in ("q.jsonl", "q.txt", "task.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "bare").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"choices_template": "Answer:"}, "evaluate.choices_template=Answer: has no place for the question; write {question} there"),
        ({"choices": ("FOLDER/no.jsonl",)}, "evaluate.choices=FOLDER/no.jsonl does not exist; use a JSONL file"),
        ({"choices": ("FOLDER/q.jsonl", "FOLDER/q.txt")}, "evaluate.choices=FOLDER/q.txt would have the same name in the results as FOLDER/q.jsonl"),
        ({"lm_eval": ("FOLDER/no.yaml",)}, "evaluate.lm_eval=FOLDER/no.yaml does not exist or holds no task; use a .yaml file"),
        ({"lm_eval": ("FOLDER/bare",)}, "evaluate.lm_eval=FOLDER/bare does not exist or holds no task"),
        ({"out": "FOLDER/none/out.json"}, "evaluate.out=FOLDER/none/out.json cannot be written: FOLDER/none is no folder; use one that is there"),
        ({"out": "FOLDER/bare"}, "evaluate.out=FOLDER/bare is a folder; use a file"),
    ],
)  # fmt: skip
def test_mistakes(values: dict[str, Any], words: str, folder: Path) -> None:
    def placed(value: Any) -> Any:
        return tuple(map(placed, value)) if isinstance(value, tuple) else value.replace("FOLDER", str(folder))

    with pytest.raises(ConfigError) as caught:
        check_judging(Evaluate(**{name: placed(value) for name, value in values.items()}))
    assert str(caught.value).startswith(words.replace("FOLDER", str(folder)))


@pytest.mark.parametrize("installed", [False, True])
def test_lm_eval_that_is_not_installed(
    installed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    good = Evaluate(
        choices=(str(folder / "q.jsonl"),), lm_eval=("arc_easy", str(folder)), out=str(folder / "o.json")
    )
    if installed:
        check_judging(good)
        return
    with pytest.raises(ConfigError) as caught:
        check_judging(good)
    assert str(caught.value) == (
        f"evaluate.lm_eval=[arc_easy,{folder}] needs lm_eval, which is not installed; "
        "use .venv/bin/pip install 'lm_eval[hf]==0.4.13'"
    )
    check_judging(Evaluate())
