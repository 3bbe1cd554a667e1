"""What all shards of a vocabulary know of a chunk's tokens, and what a divergence must say to be computed from it.

Decides the pieces (`Divergence`): each sees blocks of one shard, and only numbers a token travel between shards. Knows no
divergence (`distill.divergences`) and does not walk a chunk (`distill.vocab_chunks`).

Letters: C tokens of a chunk, B tokens of a block, V vocabulary, R ranks of tp. "Tempered" logits are z / T; p and q are the
teacher's and the student's softmax of them.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

NO_MAXIMUM = -1e30  # of no ids at all: finite, because inf - inf is nan; its exponential is 0


class Shards(NamedTuple):
    """What every shard knows of each token, [R, C] float64 but for `own`.

    Sums are of exponentials of tempered logits less the shard's own maximum.
    """

    max_q: Tensor
    sum_q: Tensor
    sum_hard: Tensor
    """Untempered: of exp(T * (z / T - max_q))."""
    label_q: Tensor
    """Tempered logit of the label where the shard owns it, else 0."""
    max_p: Tensor
    sum_p: Tensor
    own: Tensor
    """[R, n, C]: the divergence's own numbers, as its `shard_numbers_` filled them."""

    def whole_q(self) -> Tensor:
        """Return [C] sums over all shards for the student, relative to the largest maximum."""
        return (self.sum_q * torch.exp(self.max_q - self.max_q.amax(0))).sum(0)

    def whole_p(self) -> Tensor:
        """Return [C] sums over all shards for the teacher, relative to the largest maximum."""
        return (self.sum_p * torch.exp(self.max_p - self.max_p.amax(0))).sum(0)

    def whole_hard(self, temperature: float) -> Tensor:
        """Return [C] untempered sums over all shards for the student, relative to the largest maximum."""
        return (self.sum_hard * torch.exp(temperature * (self.max_q - self.max_q.amax(0)))).sum(0)

    def cross_entropy(self, temperature: float) -> Tensor:
        """Return [C] untempered cross-entropy of the student with the labels, nats."""
        return self.whole_hard(temperature).log() - temperature * (self.label_q.sum(0) - self.max_q.amax(0))


class Factors(NamedTuple):
    """What turns tempered logits into probabilities, [C, 1] each, in the buffers' dtype."""

    top_q: Tensor
    """Largest logit of all shards."""
    inverse_q: Tensor
    """One over the sum of exponentials relative to it."""
    inverse_hard: Tensor
    top_p: Tensor
    inverse_p: Tensor
    log_ratio: Tensor
    """log of the student's sum over the teacher's."""


class Block(NamedTuple):
    """Some rows of a chunk on one shard once the normalisers are known, [B, V/tp] each."""

    student: Tensor
    """Tempered logits."""
    teacher: Tensor | None
    """Tempered logits, until a second pass has written its own over them; None without a teacher."""
    factors: Factors
    scratch: Tensor
    """[3, B, V/tp]; the third belongs to the hard term in `gradient`."""

    def q(self) -> Tensor:
        """Return the student's probabilities, in scratch 0."""
        q = torch.sub(self.student, self.factors.top_q, out=self.scratch[0])
        return q.exp_().mul_(self.factors.inverse_q)

    def p(self) -> Tensor:
        """Return the teacher's probabilities, in scratch 1."""
        p = torch.sub(self.teacher, self.factors.top_p, out=self.scratch[1])
        return p.exp_().mul_(self.factors.inverse_p)

    def log_ratio(self) -> Tensor:
        """Return log(q / p) as a difference of logits, exactly 0 for equal models, in scratch 2; uses scratch 1."""
        log_q = torch.sub(self.student, self.factors.top_q, out=self.scratch[2])
        log_p = torch.sub(self.teacher, self.factors.top_p, out=self.scratch[1])
        return log_q.sub_(log_p).sub_(self.factors.log_ratio)


class Settled(NamedTuple):
    """A divergence of a chunk's tokens, and what its gradient must know of each."""

    value_C: Tensor
    """Nats, float64."""
    factors: tuple[Tensor, ...] = ()
    """[C, any] each."""


class Divergence(Protocol):
    """A divergence of the teacher's p and the student's q, in the pieces in which a chunk is walked.

    First pass: `shard_numbers_` of each block, before the normalisers are known; one gather. Second pass, if
    `num_sums`: `shard_sums_` of each block; one more gather. Then `settle`, and for each block `gradient_`.
    """

    num_numbers: ClassVar[int] = 0
    """Numbers a token that `shard_numbers_` fills; 0 leaves it out."""
    num_sums: ClassVar[int] = 0
    """Sums a token that `shard_sums_` returns; 0 leaves the second pass out, and its gather."""
    fewest_ids: ClassVar[int] = 1
    """Smallest vocabulary it is defined for."""

    def shard_numbers_(
        self,
        out_nB: Tensor,
        exp_p: Tensor,
        log_ratio: Tensor,
        student: Tensor,
        teacher: Tensor,
        first_id: int,
    ) -> None:
        """Fill a block's numbers.

        Args:
            out_nB: [n, B] float64.
            exp_p: [B, V/tp] exponentials of the teacher's tempered logits less the shard's maximum.
            log_ratio: [B, V/tp] log of `exp_p` over the same of the student; may be overwritten, `exp_p` too.
            student, teacher: [B, V/tp] tempered logits; to be left as they are.
            first_id: of this shard.
        """

    def shard_sums_(self, block: Block) -> Tensor:
        """Return [num_sums, B] sums over a shard; may write over `block.teacher` what `gradient_` needs."""

    def settle(self, shards: Shards, sums: Tensor | None, rank: int, ids: range) -> Settled:
        """Return the chunk's values from all shards.

        Args:
            sums: [num_sums, C] float64, over all shards; None without a second pass.
            rank, ids: this shard's.
        """

    def gradient_(self, q: Tensor, block: Block, factors: tuple[Tensor, ...]) -> Tensor:
        """Return d value / d tempered student logits, [B, V/tp], in scratch 0 or 1.

        Args:
            q: `block.q()`, in scratch 0; may be overwritten.
            factors: of the block's tokens, from `settle`.
        """
