"""How likely a model finds given tokens: one log-probability a token, exact under a sharded vocabulary.

Decides nothing about vocabularies and chunks: `distill.token_batch` and `distill.vocab_chunks` do, as for the loss.
Only [T] numbers leave; no logits outlive their chunk.

Letters: T tokens, D residual width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.divergences import FORWARD_KL
from distill.head import Head
from distill.losses import SINGLE
from distill.token_batch import TokenBatch
from parallel.mesh import Axis


@torch.no_grad()
def token_log_probs(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, *, tp: Axis = SINGLE, chunk_tokens: int | None = None
) -> Tensor:
    """Return log softmax(logits)[label] of each token, nats.

    Args:
        hidden_TD: [T, D] final hidden states, the same on every rank of tp.
        head: this rank's shard of the head.
        labels_T: [T] ids; `IGNORE` positions cost nothing.
        chunk_tokens: most tokens whose logits exist at once; None lets bytes decide.
    Returns:
        [T] float64, 0 at `IGNORE` positions; the same on every rank of tp.
    Raises:
        ValueError: shapes that do not fit, or a label outside the vocabulary.
    Collectives: for each chunk, tp all-gather [6, C] float64; none without a token.
    """
    scores_T = torch.zeros(len(labels_T), dtype=torch.float64, device=labels_T.device)
    batch = TokenBatch(hidden_TD, head, None, None, labels_T, tp)
    # Without a teacher the divergence is never formed.
    for _, part in batch.chunks(temperature=1.0, divergence=FORWARD_KL, chunk_tokens=chunk_tokens):
        scores_T[part.positions_C] = -part.shards.cross_entropy(1.0)
    return scores_T
