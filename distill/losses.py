"""The distillation loss: both heads, both terms and their gradients in one function; the same for evaluation.

    loss = alpha * CE(student, labels) + (1 - alpha) * T**2 * D(softmax(teacher / T), softmax(student / T))

summed over valid tokens and divided by the number of valid tokens of the whole step, which is given. Decides
which tokens count, how the two terms are weighted, and that gradients are computed during the forward pass, so that no logits outlive their chunk: memory beyond inputs and
gradients is O(chunk * V/tp). Assumes that every rank of tp passes the same hidden states and labels, and its
`shard_range` of both vocabularies. Computes in float32, or in float64 for float64 inputs. Does not count
tokens over micro-batches or replicas, and does not reduce weight gradients over dp. How a sharded vocabulary
is handled is `distill.vocab_chunks`, which D there are `distill.divergences`.

Letters: T tokens, C tokens of a chunk, D and E residual width of student and teacher, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.divergences import FORWARD_KL, FORWARD_KL_AND_ENTROPY
from distill.head import Head, compute_dtype
from distill.packing import IGNORE
from distill.token_batch import TokenBatch
from distill.vocab_shards import Divergence
from parallel.collectives import all_reduce_
from parallel.mesh import Axis

SINGLE = Axis("tp")
ENTROPY_BOUNDS = (0.5, 1.5, 3.0, 5.0)
"""Nats: bucket i of the teacher's entropy runs from bound i - 1 (or 0) up to, not including, bound i (or infinity)."""


@dataclass(frozen=True)
class LossResult:
    """The two terms of a micro-batch, the same on every rank of tp, and the gradient of their total."""

    hard: Tensor
    """Cross-entropy's share of the step's mean, nats, 0-dim float64; not weighted by alpha."""
    soft: Tensor
    """T**2 times the divergence's share of the step's mean, likewise; 0 when alpha is 1."""
    grad_hidden_TD: Tensor | None
    """d total / d student hidden, summed over tp, in the hidden's dtype; None without `need_grad`."""

    def total(self, alpha: float) -> Tensor:
        """Return alpha * hard + (1 - alpha) * soft."""
        return alpha * self.hard + (1 - alpha) * self.soft


class BucketSums(NamedTuple):
    """Sums over the valid tokens of one bucket of the teacher's entropy, as `TokenStats` has them over all."""

    nll_sum: float = 0.0
    kl_sum: float = 0.0
    agreement_count: float = 0.0
    num_tokens: float = 0.0


@dataclass(frozen=True)
class TokenStats:
    """Sums over the valid tokens of a batch, the same on every rank of tp; add over batches, then divide."""

    nll_sum: float
    """Cross-entropy of the student with the labels, nats."""
    kl_sum: float
    """KL(teacher || student) at temperature 1, nats; 0 without a teacher."""
    agreement_count: int
    """Tokens on which student and teacher hold the same id most likely; 0 without a teacher."""
    correct_count: int
    """Tokens whose label the student holds most likely. Of equally likely ids the lowest counts."""
    num_tokens: int
    by_entropy: tuple[BucketSums, ...] = ()
    """By the teacher's entropy, cut at `ENTROPY_BOUNDS`; empty without a teacher."""


@torch.no_grad()
def fused_distillation_loss(
    student_hidden_TD: Tensor,
    student_head: Head,
    teacher_hidden_TE: Tensor | None,
    teacher_head: Head | None,
    labels_T: Tensor,
    *,
    divergence: Divergence = FORWARD_KL,
    temperature: float,
    alpha: float,
    num_valid_tokens: int,
    tp: Axis = SINGLE,
    chunk_tokens: int | None = None,
    grad_weight_out_VD: Tensor | None = None,
    grad_bias_out_V: Tensor | None = None,
    need_grad: bool = True,
) -> LossResult:
    """Compute the loss of a micro-batch and its gradients, outside autograd.

        d loss / d s = (alpha * (softmax(s) - onehot) + (1 - alpha) * T * dD / d (s/T)) / N

    with s and t the logits of student and teacher; for forward_kl dD / d (s/T) is softmax(s/T) - softmax(t/T).

    Args:
        student_hidden_TD: [T, D] final hidden states, the same on every rank of tp.
        student_head: this rank's shard of the head.
        teacher_hidden_TE, teacher_head: likewise, [T, E]; not touched when alpha is 1, and may be None then.
        labels_T: [T] ids, already shifted; `IGNORE` positions contribute nothing and cost nothing.
        divergence: D of the soft term.
        temperature: T > 0; the T**2 is applied here and nowhere else.
        alpha: weight of the hard term, 0 to 1.
        num_valid_tokens: N, valid tokens of the whole step over micro-batches and replicas.
        chunk_tokens: most tokens whose logits exist at once; None lets bytes decide.
        grad_weight_out_VD: [V/tp, D], usually float32: the weight gradient is added to it. None: frozen head.
        grad_bias_out_V: [V/tp], likewise.
        need_grad: False computes the values alone.
    Returns:
        The terms and the hidden gradient. Without a valid token: zeros, and no collective on any rank.
    Raises:
        ValueError: shapes that do not fit, T <= 0, alpha outside 0..1, a label outside 0..V-1,
            a vocabulary that is too small for the divergence.
    Collectives: for each chunk, tp all-gather [6 + n, C] float64 (forward_kl: n = 1); for divergences of two passes tp
        all-gather [2, C] float64; all-reduce sum [C, D] (asynchronous).
    Source: Hinton et al. 2015, section 2 (T**2); Shoeybi et al. 2019 (vocabulary split).
    """
    _check_loss(temperature, alpha)
    if alpha == 1:
        # Nothing is tempered then, and the chunks skip what only tempering needs.
        teacher_hidden_TE, teacher_head, temperature = None, None, 1.0
    elif teacher_hidden_TE is None:
        raise ValueError(
            f"alpha={alpha} gives the soft term weight, but there is no teacher; only alpha=1 needs none"
        )
    batch = TokenBatch(student_hidden_TD, student_head, teacher_hidden_TE, teacher_head, labels_T, tp)
    grad_hidden_TD = torch.zeros_like(student_hidden_TD) if need_grad else None
    hard, soft = torch.zeros(2, dtype=torch.float64, device=labels_T.device)
    pending: _PendingGradient | None = None
    for chunk, part in batch.chunks(
        temperature=temperature, divergence=divergence, chunk_tokens=chunk_tokens
    ):
        hard += part.shards.cross_entropy(temperature).sum() / num_valid_tokens
        settled = None
        if teacher_head is not None:
            settled = chunk.settle(part.shards)
            soft += settled.value_C.sum() * (temperature**2 / num_valid_tokens)
        if grad_hidden_TD is None:
            continue
        grad_CV = chunk.gradient(
            part.shards,
            part.labels_C,
            settled,
            hard_weight=alpha / num_valid_tokens,
            soft_weight=(1 - alpha) * temperature**2 / num_valid_tokens,
        )
        grad_CD = chunk.products.hidden_gradient(grad_CV)
        arriving = _PendingGradient(part.positions_C, grad_CD, all_reduce_(grad_CD, tp, async_op=True))
        if grad_weight_out_VD is not None:
            chunk.products.add_weight_gradient_(grad_weight_out_VD, grad_CV, part.hidden_CD)
        if grad_bias_out_V is not None:
            grad_bias_out_V += grad_CV.sum(0)
        if pending is not None:
            pending.store_(grad_hidden_TD)
        pending = arriving
    if pending is not None:
        pending.store_(grad_hidden_TD)
    return LossResult(hard, soft, grad_hidden_TD)


def distillation_loss(
    student_hidden_TD: Tensor,
    student_head: Head,
    teacher_hidden_TE: Tensor | None,
    teacher_head: Head | None,
    labels_T: Tensor,
    *,
    divergence: Divergence = FORWARD_KL,
    temperature: float,
    alpha: float,
    num_valid_tokens: int | None = None,
    tp: Axis = SINGLE,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the loss as a scalar that autograd differentiates (once) by the student's hidden state and head.

    The gradients exist when this returns; `backward` only scales them. The hidden gradient is complete on
    every rank of tp, those of weight and bias are this rank's shard.

    Args: as `fused_distillation_loss`, but
        num_valid_tokens: None counts the labels given.
    Returns:
        0-dim, float32 (float64 for float64 inputs), identical on every rank of tp.
    Raises, Collectives: as `fused_distillation_loss`; none in backward.
    """
    if num_valid_tokens is None:
        num_valid_tokens = max(1, int((labels_T != IGNORE).sum()))
    compute = partial(
        fused_distillation_loss,
        divergence=divergence,
        temperature=temperature,
        alpha=alpha,
        num_valid_tokens=num_valid_tokens,
        tp=tp,
        chunk_tokens=chunk_tokens,
    )
    inputs = (student_head, teacher_hidden_TE, teacher_head, labels_T, alpha, compute)
    return _DistillationLoss.apply(student_hidden_TD, student_head.weight_VD, student_head.bias_V, inputs)


@torch.no_grad()
def evaluate_tokens(
    student_hidden_TD: Tensor,
    student_head: Head,
    teacher_hidden_TE: Tensor | None,
    teacher_head: Head | None,
    labels_T: Tensor,
    *,
    tp: Axis = SINGLE,
    chunk_tokens: int | None = None,
) -> TokenStats:
    """Compare a model's predictions with the labels and, if given, with a teacher's, untempered.

    Args: as `fused_distillation_loss`; without a teacher both its arguments are None.
    Raises:
        ValueError: shapes that do not fit, or a label outside the vocabulary.
    Collectives: for each chunk, tp all-gathers [6, C] (with a teacher [8, C]), [2, C] and, with a teacher, [2, C], all float64.
    """
    batch = TokenBatch(student_hidden_TD, student_head, teacher_hidden_TE, teacher_head, labels_T, tp)
    bounds = torch.tensor(ENTROPY_BOUNDS, dtype=torch.float64, device=labels_T.device)
    by_entropy = bounds.new_zeros(len(bounds) + 1, len(BucketSums._fields))
    nll = correct = 0.0
    for chunk, part in batch.chunks(
        temperature=1.0, divergence=FORWARD_KL_AND_ENTROPY, chunk_tokens=chunk_tokens
    ):
        ids_C = chunk.most_likely(chunk.student_CV[: len(part.labels_C)])
        nll_C = part.shards.cross_entropy(1.0)
        nll += nll_C.sum()
        correct += (ids_C == part.labels_C).sum()
        if chunk.teacher_CV is not None:
            settled = chunk.settle(part.shards)
            (entropy,) = settled.factors
            agrees_C = ids_C == chunk.most_likely(chunk.teacher_CV[: len(ids_C)])
            columns = (nll_C, settled.value_C, agrees_C.double(), torch.ones_like(nll_C))
            bucket_C = torch.bucketize(entropy[:, 0], bounds, right=True)
            by_entropy.index_add_(0, bucket_C, torch.stack(columns, 1))
    _, kl, agreement, _ = by_entropy.sum(0).tolist()
    buckets = () if teacher_head is None else tuple(BucketSums(*sums) for sums in by_entropy.tolist())
    return TokenStats(float(nll), kl, round(agreement), int(correct), len(batch.positions), buckets)


def _check_loss(temperature: float, alpha: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in 0..1")


class _PendingGradient(NamedTuple):
    """A chunk's hidden gradient on its way over tp."""

    positions_C: Tensor
    grad_CD: Tensor
    reduction: Any
    """What `all_reduce_` returned: the work to wait for, or None at tp size 1."""

    def store_(self, grad_hidden_TD: Tensor) -> None:
        """Write the gradient to its positions once it has arrived."""
        if self.reduction is not None:
            self.reduction.wait()
        grad_hidden_TD.index_copy_(0, self.positions_C, self.grad_CD.to(grad_hidden_TD.dtype))


class _DistillationLoss(torch.autograd.Function):
    """`fused_distillation_loss` as an autograd node: gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: tuple[Any, ...]
    ) -> Tensor:
        head, teacher_hidden, teacher_head, labels, alpha, compute = inputs
        dtype = compute_dtype(hidden)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        result = compute(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            labels,
            grad_weight_out_VD=grad_weight,
            grad_bias_out_V=grad_bias,
            need_grad=any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(result.grad_hidden_TD, grad_weight, grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return result.total(alpha).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None
