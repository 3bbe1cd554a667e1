"""A judge's figures are those of its parts, the teacher's are found again, and the gap follows its formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import judging
from distill.choices import choice_figures, microbatches, score_choices
from distill.config import Config, ConfigError
from distill.convert import config_from_dict
from distill.data import IGNORE, MicroBatch
from distill.evaluate import evaluate
from distill.judging import Judge, gap_closed, load_tasks
from distill.levels import Levels
from distill.step import messages
from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links
from parallel.weights import load_weights
from tests.distill.tiny_tokenizer import TOKENS, tiny_tokenizer
from tests.families import save_tiny, tiny_config
from tests.workers import run_distributed

SEQ_LEN = 32
QUESTIONS = [
    {"question": "which", "choices": ["the", "12", "a cat"], "answer": 0},
    {"question": "who", "choices": ["the dog", "no"], "answer": 1},
    {"question": "a question that is longer than a row", "choices": ["the", "12"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and its tokenizer, a student, and questions."""
    folder = tmp_path_factory.mktemp("judging")
    for name, family in (("teacher", "qwen3"), ("student", "llama")):
        save_tiny(folder / name, tiny_config(family, vocab_size=len(TOKENS), num_hidden_layers=2))
    tiny_tokenizer().save_pretrained(folder / "teacher")
    lines = [json.dumps(each) for each in QUESTIONS]
    (folder / "tiny.jsonl").write_text("\n".join(lines))
    (folder / "bad.jsonl").write_text("\n".join([*lines, "{"]))
    return folder


def config_of(folder: Path, *files: str) -> Config:
    return config_from_dict(
        {
            "data": {"seq_len": SEQ_LEN},
            "evaluate": {
                "choices": [str(folder / file) for file in files],
                "choices_template": "Q {question}",
            },
        }
    )


def _judge(folder: Path, cache: Path) -> tuple[Judge, list[StageModel]]:
    """Return a judge on one process, and student and teacher."""
    mesh = Mesh.single()
    models = []
    for name, family in (("student", "llama"), ("teacher", "qwen3")):
        config = tiny_config(family, vocab_size=len(TOKENS), num_hidden_layers=2)
        models.append(build_stage(config, pp=Axis("stage"), tp=mesh.tp, dtype=torch.float64))
        load_weights(models[-1], folder / name)
    traffic = messages(*models, rows=1, seq_len=SEQ_LEN)
    links = Links(mesh, {kind: traffic[kind] for kind in (Kind.F, Kind.K)}, num_stages=1)
    ids = torch.randint(3, 90, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    (task,) = load_tasks(config_of(folder, "tiny.jsonl"), mesh, folder / "teacher")
    judge = Judge(
        mesh=mesh,
        links=links,
        held_out=[MicroBatch(ids, torch.arange(SEQ_LEN)[None], labels)],
        held_out_print="a row",
        tasks=[(task, microbatches(task, seq_len=SEQ_LEN, microbatch_size=1))],
        levels=Levels(cache, folder / "teacher", "float64", 97),
    )
    return judge, models


def test_a_judge_puts_text_and_questions_together_and_knows_the_teacher_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, (student, teacher) = _judge(folder, tmp_path / "levels")
    task, share = judge.tasks[0]

    def expected(text: dict[str, Any], **model: Any) -> dict[str, float | None]:
        quality = evaluate(judge.mesh, judge.links, judge.held_out, **text)
        scores = score_choices(judge.mesh, judge.links, share, num_choices=len(task.pieces), **model)
        return {**quality.named(), **choice_figures(task, scores)}

    theirs = expected({"teacher": teacher}, teacher=teacher)
    ours = expected({"students": [student], "teacher": teacher}, students=[student])
    assert theirs != ours and "eval/choices/tiny/accuracy" in ours
    assert judge.teacher(teacher) == (theirs, False)
    assert judge.student([student], teacher, with_choices=True) == ours
    short = judge.student([student], teacher, with_choices=False)
    assert short == {name: value for name, value in ours.items() if "choices" not in name}

    def forbidden(*given: Any, **named: Any) -> None:
        raise AssertionError("the teacher is judged once more")

    with monkeypatch.context() as patch:
        patch.setattr(judging, "evaluate", forbidden)
        patch.setattr(judging, "score_choices", forbidden)
        assert judge.teacher(teacher) == (theirs, True)
    (judge.levels.folder / next(judge.levels.folder.iterdir()).name).unlink()
    assert judge.teacher(teacher) == (theirs, False), "one of two judgements is new"


def _tasks_on_two_ranks(folder: Path) -> list[Any]:
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    tasks = load_tasks(config_of(folder, "tiny.jsonl"), mesh, folder / "teacher")
    with pytest.raises(ConfigError) as caught:
        load_tasks(config_of(folder, "tiny.jsonl", "bad.jsonl"), mesh, folder / "teacher")
    return [tasks, load_tasks(config_of(folder), mesh, folder / "teacher"), str(caught.value)]


def test_all_ranks_get_the_questions_or_the_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_distributed(2, _tasks_on_two_ranks, folder)
    assert first == second and first[1] == []
    assert first[2].startswith(f"evaluate.choices={folder / 'bad.jsonl'}, line 4 is not JSON")
    assert load_tasks(config_of(folder, "tiny.jsonl"), Mesh.single(), folder / "teacher") == first[0]
    assert capsys.readouterr().out == (
        "tiny: 2 of 7 choices with their questions are longer than data.seq_len=32 and lose their beginning\n"
    )


def line(model: str, step: int, loss: float | None, round: int = 0) -> dict[str, Any]:
    return {"model": model, "step": step, "round": round, "eval/loss": loss}


def test_the_gap_closed_is_a_share_of_what_the_round_began_with() -> None:
    start = [line("teacher", 0, 2.0), line("student", 0, 4.0)]
    later = [*start, line("student", 10, 2.5)]
    assert gap_closed(start, 3.5, round=0) == gap_closed(later, 3.5, round=0) == 0.25
    assert gap_closed(later, 1.5, round=0) == 1.25 and gap_closed(later, 4.5, round=0) == -0.25
    second = [*later, line("student", 10, 3.0, round=1)]
    assert gap_closed(second, 2.25, round=1) == 0.75


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line("student", 0, 4.0)],
        [line("teacher", 0, 2.0)],
        [line("teacher", 0, 2.0), line("student", 0, 4.0, round=1)],
        [line("teacher", 8, 2.0), line("student", 8, 4.0), line("student", 10, 3.0)],
        [line("teacher", 0, 2.0), line("student", 0, 2.0)],
        [line("teacher", 0, 2.0), line("student", 0, 1.5)],
        [line("teacher", 0, None), line("student", 0, 4.0)],
        [line("teacher", 0, 2.0), line("student", 0, None)],
    ],
)
def test_without_a_gap_nothing_is_closed(lines: list[dict[str, Any]]) -> None:
    assert gap_closed(lines, 1.0, round=0) is None
