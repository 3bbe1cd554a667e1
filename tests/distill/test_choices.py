"""Multiple choice against unmodified models in float64, one choice at a time and unpadded, whatever the layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.choices import (
    Task,
    choice_figures,
    load_task,
    microbatches,
    read_questions,
    score_choices,
)
from distill.config import ConfigError
from distill.data import IGNORE
from distill.step import messages
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links
from parallel.weights import load_weights
from tests.distill.tiny_tokenizer import BOS, EOS, TOKENS, tiny_tokenizer
from tests.families import save_tiny, tiny_config
from tests.workers import run_distributed

SEQ_LEN, ROWS = 40, 2
TEMPLATE = r"Q: {question}\nA:"
RECORDS: list[dict[str, Any]] = [
    {"question": "what runs", "choices": ["the dog", "12", "a cold hill in the rain"], "answer": 0},
    {"query": "how many", "choices": ["12", "the"], "gold": 0},
    {
        "question": "a very long tale of a cat and a dog that " * 2,
        "choices": ["ends", "goes on"],
        "answer": 1,
    },
    {"question": "caf\u00e9?", "choices": ["\u00e9\u00e9\u00e9", "no", "yes", "the 12"], "answer": 2},
    {"question": "one more", "choices": ["the the the", "x"], "answer": 1},
]
MODELS = {
    "teacher": tiny_config("qwen3", vocab_size=len(TOKENS), tie_word_embeddings=False),
    "student": tiny_config("llama", vocab_size=len(TOKENS), num_hidden_layers=2),
}


def write(file: Path, records: list[Any] = RECORDS) -> Path:
    """Write records as lines; text stays as it is."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return file


def load(folder: Path, *, template: str = TEMPLATE, seq_len: int = SEQ_LEN, **options: bool) -> Task:
    return load_task(
        write(folder / "tiny.jsonl"), tiny_tokenizer(**options), template=template, seq_len=seq_len
    )


def _plain(folder: Path) -> Tensor:
    """Return the score of each choice, from the text alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer, scores = tiny_tokenizer(), []
    for record in RECORDS:
        prompt = f"Q: {record.get('question', record.get('query'))}\nA:"
        for choice in record["choices"]:
            start = len(tokenizer.tokenize(prompt))
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            count = len(ids) - start
            ids = torch.tensor([ids[-(SEQ_LEN + 1) :]])
            with torch.no_grad():
                log_q = model(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            scores.append(log_q[-count:].gather(1, ids[0, -count:, None]).sum().item())
    return torch.tensor(scores, dtype=torch.float64)


def _scores(layout: tuple[int, int, int], task: Task, folders: dict[str, Path]) -> dict[str, Tensor]:
    """Return what each model alone gives on this rank of a layout (pp, dp, tp)."""
    pp, dp, tp = layout
    mesh = Mesh.single() if layout == (1, 1, 1) else Mesh.create(pp=pp, dp=dp, tp=tp)
    stages = {
        name: build_stage(config, pp=Axis("stage", pp, mesh.pp.rank), tp=mesh.tp, dtype=torch.float64)
        for name, config in MODELS.items()
    }
    for name, stage in stages.items():
        load_weights(stage, folders[name])
    traffic = messages(stages["student"], stages["teacher"], rows=ROWS, seq_len=SEQ_LEN)
    links = Links(mesh, {kind: traffic[kind] for kind in (Kind.F, Kind.K)}, num_stages=pp)
    mine = microbatches(
        task, seq_len=SEQ_LEN, microbatch_size=ROWS, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size
    )
    count = len(task.pieces)
    return {
        "student": score_choices(mesh, links, mine, num_choices=count, students=[stages["student"]]),
        "teacher": score_choices(mesh, links, mine, num_choices=count, teacher=stages["teacher"]),
    }


def test_scores_are_those_of_plain_models_in_every_layout(tmp_path: Path) -> None:
    folders = {name: save_tiny(tmp_path / name, config) for name, config in MODELS.items()}
    task = load(tmp_path)
    assert (
        task.num_cut == 2
        and len(microbatches(task, seq_len=SEQ_LEN, microbatch_size=ROWS)) < len(task.pieces) / ROWS
    )
    expected = {name: _plain(folder) for name, folder in folders.items()}
    results = [_scores((1, 1, 1), task, folders)]
    for layout in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        results += run_distributed(2, _scores, layout, task, folders)
    for result in results:
        for name, scores in result.items():
            torch.testing.assert_close(scores, expected[name], rtol=1e-9, atol=1e-9)


def test_a_row_holds_all_but_the_last_token(tmp_path: Path) -> None:
    longest = max(len(piece.token_ids) for piece in load(tmp_path, seq_len=200).pieces)
    assert load(tmp_path, seq_len=longest - 1).num_cut == 0
    shorter = load(tmp_path, seq_len=longest - 2)
    assert shorter.num_cut > 0 and max(len(piece.token_ids) for piece in shorter.pieces) == longest - 1


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, "{question}", "Say: {question} is "])
def test_the_choice_begins_where_the_prompt_alone_ends(template: str, adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    task = load(tmp_path, template=template, seq_len=200, adds_bos=adds_bos)
    assert task.num_cut == 0 and task.answers == (0, 0, 1, 2, 1)
    assert task.num_bytes[3] == (6, 2, 3, 6)
    pieces = iter(task.pieces)
    for record in RECORDS:
        prompt = template.replace("\\n", "\n").replace(
            "{question}", record.get("question", record.get("query", ""))
        )
        spaces = prompt[len(prompt.rstrip()) :]
        for choice in record["choices"]:
            ids, count = next(pieces)
            assert tokenizer.decode(ids[-count:]) == f"{spaces} {choice}"
            assert tokenizer.decode(ids[:-count], skip_special_tokens=True) == prompt.rstrip()
            assert (ids[0] == BOS) == adds_bos


def test_an_empty_prompt_is_what_a_text_begins_with(tmp_path: Path) -> None:
    file = write(tmp_path / "bare.jsonl", [{"question": " ", "choices": ["the", "x"], "answer": 0}])
    for tokenizer, first in ((tiny_tokenizer(adds_bos=True), BOS), (tiny_tokenizer(), BOS)):
        task = load_task(file, tokenizer, template="{question}", seq_len=SEQ_LEN)
        assert [piece.token_ids[0] for piece in task.pieces] == [first, first]
        assert tokenizer.decode(task.pieces[0].token_ids[1:]) == "  the"
    without = tiny_tokenizer()
    without.bos_token = None
    assert load_task(file, without, template="{question}", seq_len=SEQ_LEN).pieces[0].token_ids[0] == EOS


def test_rows_are_dealt_without_loss(tmp_path: Path) -> None:
    """Every choice's tokens are predicted once, over all replicas, each as its owner's."""
    task = load(tmp_path)
    shares = [
        microbatches(task, seq_len=SEQ_LEN, microbatch_size=ROWS, dp_rank=rank, dp_size=3)
        for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    found: dict[int, list[int]] = {}
    for batch in (batch.to("cpu") for share in shares for batch in share):
        assert batch.input_ids_BS.shape == (ROWS, SEQ_LEN)
        for owner, label in zip(
            batch.owner_BS.flatten().tolist(), batch.labels_BS.flatten().tolist(), strict=True
        ):
            if label != IGNORE:
                found.setdefault(owner, []).append(label)
    assert found == {
        owner: list(piece.token_ids[-piece.num_scored :]) for owner, piece in enumerate(task.pieces)
    }


def test_figures_are_shares_of_the_right_answers() -> None:
    task = Task("t", answers=(0, 1, 1), num_bytes=((1, 10), (2, 2), (4, 2)), pieces=(), num_cut=0)
    # Best by sums: 0, 1, 0; by bytes: 1, 1, 0.
    figures = choice_figures(task, torch.tensor([-1.0, -5.0, -4.0, -3.0, -4.0, -6.0]))
    assert figures == pytest.approx(
        {
            "eval/choices/t/accuracy": 2 / 3,
            "eval/choices/t/accuracy_stderr": torch.tensor([1.0, 1.0, 0.0]).std().item() / math.sqrt(3),
            "eval/choices/t/accuracy_norm": 1 / 3,
            "eval/choices/t/accuracy_norm_stderr": torch.tensor([0.0, 1.0, 0.0]).std().item() / math.sqrt(3),
        }
    )
    broken = choice_figures(task, torch.tensor([-1.0, -5.0, -4.0, math.nan, -4.0, -6.0]))
    assert math.isnan(broken["eval/choices/t/accuracy"])
    one = Task("t", answers=(0,), num_bytes=((1, 1),), pieces=(), num_cut=0)
    assert choice_figures(one, torch.tensor([-1.0, -2.0]))["eval/choices/t/accuracy_stderr"] is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON"),
        ([1], "is not a JSON object"),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "its question is not text"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "its choices are not a list of two or more texts"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "its choices are not"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "its answer=2 is not an index from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "its answer=True is not"),
    ],
)
def test_a_bad_line_is_named(line: Any, words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "bad.jsonl", [RECORDS[0], line])
    with pytest.raises(ConfigError) as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"evaluate.choices={file}, line 2")
    assert words in str(caught.value) and 'a line is {"question"' in str(caught.value)


def test_ends_of_lines_inside_a_text_are_text(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    record = json.dumps({"question": text, "choices": ["a", "b"], "answer": 0}, ensure_ascii=False)
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{record}\r\n\n{record}\n", encoding="utf-8")
    assert [question.text for question in read_questions(file)] == [text, text]


@pytest.mark.parametrize(
    ("line", "words"),
    [("[" * 100_000, "is not JSON"), (f'{{"answer": {"9" * 5000}}}', "is not JSON")]
    + [('{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}', "holds half a character")],
)
def test_a_line_that_no_reader_takes_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"line 2 {words}"):
        read_questions(file)


def test_files_that_are_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no question"):
        read_questions(write(tmp_path / "empty.jsonl", []))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "binary.jsonl")
    with pytest.raises(ConfigError, match=r"line 1: a choice of \d+ tokens does not fit data.seq_len=8"):
        load(tmp_path, seq_len=8)


def test_a_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    same = [load(tmp_path).fingerprint() for _ in range(2)]
    others = [load(tmp_path, template="{question}"), load(tmp_path, seq_len=39)]
    assert len({*same, *(task.fingerprint() for task in others)}) == 3
