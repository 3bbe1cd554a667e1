"""Log-probabilities against log_softmax of whole logits, for whole and sharded heads, in chunks of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.head import Head
from distill.packing import IGNORE
from distill.token_scores import token_log_probs
from parallel.collectives import shard_range
from parallel.mesh import Axis, Mesh
from tests.workers import run_distributed

NUM_TOKENS, WIDTH, VOCAB = 23, 6, 31


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, bias and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
        for shape in ((NUM_TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    labels = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator)
    labels[:2], labels[-1] = torch.tensor([0, VOCAB - 1]), IGNORE
    labels[5:8] = IGNORE
    return hidden, weight, bias, labels


def _scores(tp: Axis, chunk_tokens: int | None) -> Tensor:
    hidden, weight, bias, labels = _inputs()
    start, stop = shard_range(VOCAB, tp.size, tp.rank)
    head = Head(weight[start:stop], bias[start:stop], scale=0.5, softcap=4.0)
    return token_log_probs(hidden, head, labels, tp=tp, chunk_tokens=chunk_tokens)


def _sharded(world_size: int) -> list[Tensor]:
    mesh = Mesh.create(pp=1, dp=1, tp=world_size)
    return [_scores(mesh.tp, chunk_tokens) for chunk_tokens in (None, 4)]


def test_scores_are_those_of_the_whole_vocabulary() -> None:
    hidden, weight, bias, labels = _inputs()
    logits = 4.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 4.0)
    expected = logits.log_softmax(-1).gather(1, labels.clamp(0)[:, None])[:, 0].where(labels != IGNORE, 0.0)
    whole = [_scores(Axis("tp"), chunk_tokens) for chunk_tokens in (None, 1, 7)]
    ranks = run_distributed(3, _sharded, 3)
    for scores in (*whole, *(each for rank in ranks for each in rank)):
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for rank in ranks for a, b in zip(rank, ranks[0], strict=True))


def test_nothing_to_score_and_labels_outside() -> None:
    hidden, weight, _, labels = _inputs()
    nothing = token_log_probs(hidden, Head(weight), torch.full_like(labels, IGNORE))
    assert nothing.tolist() == [0.0] * NUM_TOKENS
    with pytest.raises(ValueError, match="labels run from"):
        token_log_probs(hidden, Head(weight), torch.full_like(labels, VOCAB))
