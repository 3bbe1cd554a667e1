"""Multiple choice by log-likelihood: which answer a model finds likeliest after the question, on the training layout.

Decides, as lm-eval does, so that its figures can be compared:
- The prompt is the template with the question in it, a choice is scored as a space and its text. The score is the sum of the
  log-probabilities of the choice's tokens, given all before them.
- Prompt and choice are encoded as one text, as a model would see it; the choice's tokens are those after as many as the prompt
  alone has. White space at the prompt's end goes with the choice. An empty prompt is BOS, or EOS where there is none.
- What is longer than a row loses its beginning.
- accuracy: the best score is the answer's. accuracy_norm: the best score for each byte of the choice is (lm-eval's acc_bytes;
  its acc_norm counts characters, the same for ASCII). The standard error is that of a mean over questions.

Several pieces share a row; positions restart at each, which keeps them apart (`distill.packing`). Assumes local JSONL files.

Letters: B rows of a micro-batch, S positions of a row, R rows, N choices of all questions, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.config import ConfigError
from distill.data import MicroBatch
from distill.forward import run_forward
from distill.packing import IGNORE, best_fit
from distill.step import head_of
from distill.token_scores import token_log_probs
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "evaluate.choices"
_WANTS = 'a line is {"question": "...", "choices": ["...", "..."], "answer": index of the right one, from 0}'


class Question(NamedTuple):
    """One line of a file."""

    text: str
    choices: tuple[str, ...]
    answer: int
    place: str
    """File and line, for messages."""


class Piece(NamedTuple):
    """A prompt with one choice, as tokens."""

    token_ids: tuple[int, ...]
    """At most one more than a row holds: the last token is only predicted."""
    num_scored: int
    """Tokens of the choice, at the end."""


@dataclass(frozen=True)
class Task:
    """The questions of one file, encoded."""

    name: str
    """The file's, without its suffix."""
    answers: tuple[int, ...]
    """Of each question, index of the right choice."""
    num_bytes: tuple[tuple[int, ...], ...]
    """Of each choice of each question, in UTF-8."""
    pieces: tuple[Piece, ...]
    """One for each choice of each question, in order."""
    num_cut: int
    """Pieces that have lost their beginning."""

    def fingerprint(self) -> str:
        """Return a hash of all that a model's figures and their names depend on."""
        content = (self.name, self.answers, self.num_bytes, self.pieces)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class ChoiceBatch(MicroBatch):
    """A micro-batch that knows whose tokens it holds."""

    owner_BS: Tensor
    """[B, S] int64: which choice the token belongs to that a position must predict; 0 where there is no label."""

    def to(self, device: torch.device | str) -> ChoiceBatch:
        """Return this micro-batch on a device."""
        columns = (self.input_ids_BS, self.position_ids_BS, self.labels_BS, self.owner_BS)
        return ChoiceBatch(*(column.to(device) for column in columns))


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a JSONL file; `query` and `gold` may stand for `question` and `answer`.

    Raises:
        ConfigError: the file cannot be read, holds no question, or a line (which it names) is none.
    """
    try:
        # Other ends of lines may stand inside a text.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_KEY}={file} cannot be read ({error}); use a JSONL file") from error
    places = [(f"{_KEY}={file}, line {number}", line) for number, line in enumerate(lines, start=1)]
    questions = [_question(line, place) for place, line in places if line.strip()]
    if not questions:
        raise ConfigError(f"{_KEY}={file} holds no question; {_WANTS}")
    return questions


def _question(line: str, place: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); {_WANTS}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is not a JSON object; {_WANTS}")
    text, choices = record.get("question", record.get("query")), record.get("choices")
    answer = record.get("answer", record.get("gold"))
    if not isinstance(text, str):
        raise ConfigError(f"{place}: its question is not text; {_WANTS}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ConfigError(f"{place}: its choices are not a list of two or more texts; {_WANTS}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{place}: its answer={answer!r} is not an index from 0 to {len(choices) - 1}; {_WANTS}"
        )
    try:
        "".join([text, *choices]).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{place} holds half a character ({error.reason}); mend or leave out the line"
        ) from error
    return Question(text, tuple(choices), answer, place)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def load_task(file: Path, tokenizer: PreTrainedTokenizerBase, *, template: str, seq_len: int) -> Task:
    r"""Read a file of questions and encode its choices.

    Args:
        file: JSONL, see `read_questions`.
        tokenizer: the models' own.
        template: of the prompt; `{question}` is replaced by the question, `\n` is a line feed.
        seq_len: S.
    Raises:
        ConfigError: what `read_questions` raises; a choice without a token of its own, or longer than a row.
    """
    questions = read_questions(file)
    # Before the question is in it, whose own backslashes stay what they are.
    form = template.replace("\\n", "\n")
    pieces, num_cut = [], 0
    for question in questions:
        prompt = form.replace("{question}", question.text)
        for piece in _encode(tokenizer, prompt, question):
            if piece.num_scored > seq_len:
                raise ConfigError(
                    f"{question.place}: a choice of {piece.num_scored} tokens does not fit data.seq_len={seq_len}; use a "
                    "longer row or shorter choices"
                )
            num_cut += len(piece.token_ids) > seq_len + 1
            pieces.append(piece._replace(token_ids=piece.token_ids[-(seq_len + 1) :]))
    return Task(
        name=file.stem,
        answers=tuple(question.answer for question in questions),
        num_bytes=tuple(tuple(len(choice.encode()) for choice in each.choices) for each in questions),
        pieces=tuple(pieces),
        num_cut=num_cut,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, question: Question) -> Iterator[Piece]:
    body = prompt.rstrip()
    begin = tokenizer(body)["input_ids"] if body else []
    # What a model has seen before an empty prompt, so that the first token has something to follow.
    before = (
        []
        if begin
        else [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    )
    for choice in question.choices:
        whole = tokenizer(f"{prompt} {choice}", add_special_tokens=bool(begin))["input_ids"]
        if len(whole) <= len(begin):
            raise ConfigError(
                f"{question.place}: the choice {choice!r} has no token of its own after the prompt"
            )
        yield Piece((*before, *whole), len(whole) - len(begin))


def microbatches(
    task: Task, *, seq_len: int, microbatch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> list[ChoiceBatch]:
    """Return this replica's share of a task's rows, in micro-batches that are equally many on every replica.

    Micro-batch m of replica r holds rows (m*dp + r)*B and following; rows that are missing are padding.

    Args:
        seq_len: S.
        microbatch_size: B.
        dp_rank: which share.
        dp_size: number of shares.
    """
    lengths_N = np.array([len(piece.token_ids) - 1 for piece in task.pieces])
    row_of_piece = best_fit(lengths_N, seq_len)
    per_round = microbatch_size * dp_size
    num_rows = -(-(int(row_of_piece.max()) + 1) // per_round) * per_round
    ids_RS, owner_RS = np.zeros((2, num_rows, seq_len), dtype=np.int64)
    labels_RS = np.full_like(ids_RS, IGNORE)
    # Padding has positions of its own, as in `distill.packing`.
    filled_R = np.zeros(num_rows, dtype=np.int64)
    positions_RS = np.empty_like(ids_RS)
    for owner in np.argsort(row_of_piece, kind="stable").tolist():
        (token_ids, num_scored), row, length = task.pieces[owner], row_of_piece[owner], lengths_N[owner]
        start, end = filled_R[row], filled_R[row] + length
        ids_RS[row, start:end] = token_ids[:-1]
        positions_RS[row, start:end] = np.arange(length)
        labels_RS[row, end - num_scored : end] = token_ids[-num_scored:]
        owner_RS[row, start:end] = owner
        filled_R[row] = end
    for row, start in enumerate(filled_R):
        positions_RS[row, start:] = np.arange(seq_len - start)
    columns = [
        torch.from_numpy(column.reshape(-1, dp_size, microbatch_size, seq_len)[:, dp_rank])
        for column in (ids_RS, positions_RS, labels_RS, owner_RS)
    ]
    return [ChoiceBatch(*parts) for parts in zip(*columns, strict=True)]


def score_choices(
    mesh: Mesh,
    links: Links,
    batches: Sequence[ChoiceBatch],
    *,
    num_choices: int,
    students: Sequence[StageModel] = (),
    teacher: StageModel | None = None,
) -> Tensor:
    """Return the log-probability of every choice given its prompt, nats, by the one model that is given.

    Args:
        links: as `run_forward` takes them.
        batches: this replica's share.
        num_choices: N of the whole task.
        students: this rank's stages of the student, in ascending order; or
        teacher: its stage of the teacher.
    Returns:
        [N] float64, on every rank.
    Collectives: those of the forward passes and of `token_log_probs`; one all-reduce over the world.
    """
    judged, kind = (students[-1], Kind.F) if students else (teacher, Kind.K)
    scores_N = torch.zeros(num_choices, dtype=torch.float64)

    def consume(batch: MicroBatch, hidden: dict[Kind, Tensor]) -> None:
        assert isinstance(batch, ChoiceBatch)
        scores_T = token_log_probs(
            hidden[kind].flatten(0, 1), head_of(judged), batch.labels_BS.flatten(), tp=mesh.tp
        )
        scores_N.index_add_(0, batch.owner_BS.flatten().cpu(), scores_T.cpu())

    run_forward(mesh, links, batches, students=students, teacher=teacher, consume=consume)
    total_N = (scores_N / mesh.tp.size).to(mesh.device)
    all_reduce_(total_N, mesh.world)
    return total_N.cpu()


def choice_figures(task: Task, scores_N: Tensor) -> dict[str, float | None]:
    """Return accuracy and its standard error, of scores and of scores a byte, under the names of the logs.

    Args:
        scores_N: what `score_choices` returned.
    Returns:
        `eval/choices/NAME/accuracy` and so on; nan where a score is not a number, None for the error of a single question.
    """
    counts = [len(each) for each in task.num_bytes]
    bytes_N = torch.tensor([count for each in task.num_bytes for count in each], dtype=torch.float64)
    figures: dict[str, float | None] = {}
    for name, values_N in (("accuracy", scores_N), ("accuracy_norm", scores_N / bytes_N)):
        best = [int(values.argmax()) for values in values_N.split(counts)]
        num_right = sum(ours == right for ours, right in zip(best, task.answers, strict=True))
        share = num_right / len(counts) if bool(values_N.isfinite().all()) else math.nan
        figures[f"eval/choices/{task.name}/{name}"] = share
        figures[f"eval/choices/{task.name}/{name}_stderr"] = (
            math.sqrt(share * (1 - share) / (len(counts) - 1)) if len(counts) > 1 else None
        )
    return figures
