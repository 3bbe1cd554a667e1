"""Divergences of the teacher's and the student's distribution of a token, cut over the vocabulary, with gradients.

    forward_kl   KL(p || q) = sum_v p * log(p / q)
    reverse_kl   KL(q || p)
    jsd          beta * KL(p || m) + (1 - beta) * KL(q || m),   m = beta * p + (1 - beta) * q
    skew_kl      KL(p || m),                                    m = skew * p + (1 - skew) * q
    tvd          1/2 sum_v |p - q|
    top_k_kl     KL of k + 1 categories: the teacher's k most likely ids, and all others as one

p the teacher, q the student, nats. Decides how each is computed in the pieces of `vocab_shards.Divergence`, so that a shard of
the vocabulary gives a few numbers a token. Sums are of terms that are never negative and are formed from log(q / p), a
difference of logits: equal models give exactly 0, a small divergence keeps its digits, and probabilities that underflow
on both sides meet no inf - inf. Only the value of forward_kl, which takes one pass, is a difference of two sums and keeps
1e-7 nats or so a token, which T^2 multiplies in the loss; its gradient keeps its digits. Does not know how logits come
about, nor chunks (`distill.vocab_chunks`).

Letters: C tokens of a chunk, B tokens of a block, V vocabulary, R ranks of tp, k of top-k, N any number of ids.
"Tempered" logits are z / T; p and q are their softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from distill.config import Loss
from distill.vocab_shards import NO_MAXIMUM, Block, Divergence, Settled, Shards


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q), in one pass: its shards' sums are relative to their own maxima and are shifted afterwards.

    d KL / d s_v = q_v - p_v,  s the student's tempered logits.
    """

    num_numbers: ClassVar[int] = 1

    def shard_numbers_(
        self,
        out_nB: Tensor,
        exp_p: Tensor,
        log_ratio: Tensor,
        student: Tensor,
        teacher: Tensor,
        first_id: int,
    ) -> None:
        """Fill the sums of exp_p * log_ratio."""
        out_nB[0] = log_ratio.mul_(exp_p).sum(1)

    def settle(self, shards: Shards, sums: Tensor | None, rank: int, ids: range) -> Settled:
        """Shift the shards' sums to the whole vocabulary's maxima, and normalise."""
        rise_p = shards.max_p - shards.max_p.amax(0)
        rise_q = shards.max_q - shards.max_q.amax(0)
        whole = (rise_p.exp() * (shards.own[:, 0] + shards.sum_p * (rise_p - rise_q))).sum(0)
        return Settled(whole / shards.whole_p() + torch.log(shards.whole_q() / shards.whole_p()))

    def gradient_(self, q: Tensor, block: Block, factors: tuple[Tensor, ...]) -> Tensor:
        """Return q - p."""
        p = block.p()
        return torch.sub(q, p, out=p)


FORWARD_KL = ForwardKL()


@dataclass(frozen=True)
class ForwardKLAndEntropy(ForwardKL):
    """KL(p || q), and beside it the teacher's entropy -sum_v p * log p: [C, 1] nats, the one factor that is settled."""

    num_numbers: ClassVar[int] = 2

    def shard_numbers_(
        self,
        out_nB: Tensor,
        exp_p: Tensor,
        log_ratio: Tensor,
        student: Tensor,
        teacher: Tensor,
        first_id: int,
    ) -> None:
        """Fill the sums of exp_p * log_ratio and of exp_p * log(exp_p)."""
        super().shard_numbers_(out_nB, exp_p, log_ratio, student, teacher, first_id)
        if teacher.shape[1]:
            shifted = torch.sub(teacher, teacher.amax(1, keepdim=True), out=log_ratio)
            out_nB[1] = shifted.mul_(exp_p).sum(1)

    def settle(self, shards: Shards, sums: Tensor | None, rank: int, ids: range) -> Settled:
        """Shift both sums to the whole vocabulary's maxima, and normalise."""
        rise_p, whole_p = shards.max_p - shards.max_p.amax(0), shards.whole_p()
        mean_log_exp = (rise_p.exp() * (shards.own[:, 1] + shards.sum_p * rise_p)).sum(0) / whole_p
        value_C = super().settle(shards, sums, rank, ids).value_C
        return Settled(value_C, ((whole_p.log() - mean_log_exp)[:, None],))


FORWARD_KL_AND_ENTROPY = ForwardKLAndEntropy()


@dataclass(frozen=True)
class FDivergence(Divergence):
    """sum_v p * f(q / p) with a convex f, f(1) = 0, in a second pass over p and q.

        d / d s_v = q_v * (f'(q_v / p_v) - sum_u q_u * f'(q_u / p_u)),  s the student's tempered logits

    Args:
        terms: [B, V/tp] p, q, log(q / p), `fall_of` it -> p * f(q / p) up to multiples of q - p, which sum to 0; and
            f'(q / p) up to a constant, which cancels. Both are 0 where p = q.
    """

    terms: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    num_sums: ClassVar[int] = 2

    def shard_sums_(self, block: Block) -> Tensor:
        """Return the sums of p * f and of q * f'; writes f' over the teacher's logits."""
        log_ratio = block.log_ratio()
        q = block.q()
        value, slope = self.terms(block.p(), q, log_ratio, fall_of(log_ratio))
        block.teacher.copy_(slope)
        return torch.stack([value.sum(1), q.mul_(slope).sum(1)])

    def settle(self, shards: Shards, sums: Tensor | None, rank: int, ids: range) -> Settled:
        """Take the sums as they are."""
        return Settled(sums[0], (sums[1][:, None],))

    def gradient_(self, q: Tensor, block: Block, factors: tuple[Tensor, ...]) -> Tensor:
        """Return q * (f' - mean of f' under q)."""
        (mean,) = factors
        return torch.sub(block.teacher, mean.to(q.dtype), out=block.scratch[1]).mul_(q)


def reverse_kl_terms(p: Tensor, q: Tensor, log_ratio: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """q * log(q / p) + p - q; its derivative by q is log(q / p)."""
    return (q * log_ratio).sub_(difference(p, q, log_ratio, fall)), log_ratio


def jsd_terms(p: Tensor, q: Tensor, log_ratio: Tensor, fall: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta * p * log(p / m) + (1 - beta) * q * log(q / m); its derivative by q is (1 - beta) * log(q / m).

    The weight beta is the teacher's, in m and outside: D_JSD(beta)(p || q) of Agarwal et al. 2024 (GKD). Divided by beta it
    tends to KL(p || q) as beta goes to 0, and divided by 1 - beta to KL(q || p) as beta goes to 1; undivided, as here, to 0
    at both ends. TRL's `generalized_jsd_loss` is the same between the ends, and at them takes the two KLs undivided.
    At 0.5 it is symmetric and at most log 2.
    """
    over_p, over_q = _log_mixture(log_ratio, fall, beta)
    value = over_p.mul_(p).mul_(-beta).sub_((q * over_q).mul_(1 - beta))
    return value, over_q.mul_(beta - 1)


def skew_kl_terms(
    p: Tensor, q: Tensor, log_ratio: Tensor, fall: Tensor, *, skew: float
) -> tuple[Tensor, Tensor]:
    """p * log(p / m) + m - p; its derivative by q is (1 - skew)**2 * (q - p) / m, up to a constant.

    Tends to KL(p || q) as skew goes to 0; at most log(1 / skew). Source: Ko et al. 2024 (DistiLLM), section 3.1.
    """
    over_p, _ = _log_mixture(log_ratio, fall, skew)
    value = difference(p, q, log_ratio, fall).mul_(1 - skew).sub_(over_p.mul_(p))
    # (q - p) / max(p, q) over m / max(p, q)
    slope = (log_ratio.sign() * fall).div_(_weight_of_smaller(log_ratio, skew).mul_(fall).add_(1))
    return value, slope.mul_(-((1 - skew) ** 2))


def tvd_terms(p: Tensor, q: Tensor, log_ratio: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """|q - p| / 2; its derivative by q is sign(q - p) / 2, taken as 0 where they are equal."""
    return difference(p, q, log_ratio, fall).abs_().div_(2), log_ratio.sign().div_(2)


def fall_of(log_ratio: Tensor) -> Tensor:
    """Return min(p, q) / max(p, q) - 1 out of log(q / p)."""
    return log_ratio.abs().neg_().expm1_()


def difference(p: Tensor, q: Tensor, log_ratio: Tensor, fall: Tensor) -> Tensor:
    """Return q - p, of which a small one keeps its digits."""
    return torch.maximum(p, q).mul_(fall).mul_(log_ratio.sign()).neg_()


def _weight_of_smaller(log_ratio: Tensor, weight: float) -> Tensor:
    """Return the weight in m = weight * p + (1 - weight) * q of whichever of p and q is smaller."""
    return (log_ratio <= 0).to(log_ratio.dtype).mul_(1 - 2 * weight).add_(weight)


def _log_mixture(log_ratio: Tensor, fall: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return log(m / p) and log(m / q), m = weight * p + (1 - weight) * q.

    log(m / max(p, q)) = log(1 + w * (min(p, q) / max(p, q) - 1)), w the weight of the smaller: it never overflows.
    """
    below = _weight_of_smaller(log_ratio, weight).mul_(fall).log1p_()
    return log_ratio.relu().add_(below), log_ratio.neg().relu_().add_(below)


@dataclass(frozen=True)
class TopKKL(Divergence):
    """KL(P || Q) of k + 1 categories: the teacher's k most likely ids of the whole vocabulary, and the rest as one.

        d / d s_v = q_v - p_v for the k ids,  q_v * (1 - P_rest / Q_rest) for the others

    Of equally likely ids the lowest count. One pass: a shard gives its own k candidates with both logits, and the sums
    over its other ids; the rest of the vocabulary is those and the candidates that were not taken.
    """

    k: int

    @property
    def num_numbers(self) -> int:
        """Teacher's logit, id and student's logit of each candidate; maximum and sum over the others of both models."""
        return 3 * self.k + 4

    @property
    def fewest_ids(self) -> int:
        """One more than k: with no id left there is no last category, and the divergence is forward_kl."""
        return self.k + 1

    def shard_numbers_(
        self,
        out_nB: Tensor,
        exp_p: Tensor,
        log_ratio: Tensor,
        student: Tensor,
        teacher: Tensor,
        first_id: int,
    ) -> None:
        """Fill the candidates, those that a short shard lacks with logits that weigh nothing, and the sums."""
        width = teacher.shape[1]
        candidates_3kB, others_4B = out_nB[: 3 * self.k].unflatten(0, (3, self.k)), out_nB[3 * self.k :]
        candidates_3kB.fill_(NO_MAXIMUM)
        columns = most_likely_columns(teacher, min(self.k, width))
        for row, of_columns in zip(
            candidates_3kB,
            (teacher.gather(1, columns), columns + first_id, student.gather(1, columns)),
            strict=True,
        ):
            row[: columns.shape[1]] = of_columns.T
        for (top, total), logits in zip(others_4B.unflatten(0, (2, 2)), (student, teacher), strict=True):
            if width <= self.k:
                top.fill_(NO_MAXIMUM)
                total.zero_()
                continue
            others = log_ratio.copy_(logits).scatter_(1, columns, NO_MAXIMUM)
            largest = others.amax(1, keepdim=True)
            top.copy_(largest[:, 0])
            total.copy_(others.sub_(largest).exp_().sum(1))

    def settle(self, shards: Shards, sums: Tensor | None, rank: int, ids: range) -> Settled:
        """Take the k most likely of all shards' candidates, and form the k + 1 categories."""
        k = self.k
        by_shard_R3kC = shards.own[:, : 3 * k].unflatten(1, (3, k))
        teacher, chosen_id, student = by_shard_R3kC.transpose(0, 1).flatten(1, 2)
        by_id = chosen_id.argsort(0)
        order = by_id.gather(0, teacher.gather(0, by_id).argsort(dim=0, descending=True, stable=True))
        teacher, chosen_id, student = (each.gather(0, order) for each in (teacher, chosen_id, student))
        max_q, sum_q, max_p, sum_p = shards.own[:, 3 * k :].unbind(1)
        rest_max_q, rest_sum_q = _join(student[k:], max_q, sum_q)
        rest_max_p, rest_sum_p = _join(teacher[k:], max_p, sum_p)
        log_whole_p = shards.max_p.amax(0) + shards.whole_p().log()
        shift = shards.max_q.amax(0) - shards.max_p.amax(0) + torch.log(shards.whole_q() / shards.whole_p())

        rest_ratio = rest_max_q - rest_max_p + torch.log(rest_sum_q / rest_sum_p)
        log_ratio = torch.cat([student[:k] - teacher[:k], rest_ratio[None]]) - shift
        log_p = torch.cat([teacher[:k], (rest_max_p + rest_sum_p.log())[None]]) - log_whole_p
        p, q = log_p.exp(), (log_p + log_ratio).exp()
        gap = difference(p, q, log_ratio, fall_of(log_ratio))
        value = (gap - p * log_ratio).sum(0)

        own_teacher, own_id, own_student = by_shard_R3kC[rank, :, : min(k, len(ids))]
        taken = (own_teacher > teacher[k - 1]) | (
            (own_teacher == teacher[k - 1]) & (own_id <= chosen_id[k - 1])
        )
        own_ratio = own_student - own_teacher - shift
        own_log_p = own_teacher - log_whole_p
        own_p, own_q = own_log_p.exp(), (own_log_p + own_ratio).exp()
        own_gap = difference(own_p, own_q, own_ratio, fall_of(own_ratio))
        factors = (rest_max_q, gap[-1] / rest_sum_q, (own_id - ids.start).long(), taken, own_gap)
        return Settled(value, tuple(factor[:, None] if factor.ndim == 1 else factor.T for factor in factors))

    def gradient_(self, q: Tensor, block: Block, factors: tuple[Tensor, ...]) -> Tensor:
        """Return q - p at the k ids, and the rest's difference shared out by the student's probabilities elsewhere."""
        rest_max, rest_scale, columns, taken, gap = factors
        rest = torch.sub(block.student, rest_max.to(q.dtype), out=block.scratch[1])
        grad = rest.exp_().mul_(rest_scale.to(q.dtype))
        # What was taken may have overflowed above, and is written over here.
        return grad.scatter_(1, columns, torch.where(taken, gap.to(q.dtype), grad.gather(1, columns)))


def most_likely_columns(logits_BV: Tensor, k: int) -> Tensor:
    """Return [B, k] columns of the k largest logits in no order, the lowest columns among equal ones."""
    values, columns = logits_BV.topk(k, dim=1)
    if k == 0:
        return columns
    last = values[:, -1:]
    ambiguous = (logits_BV >= last).sum(1) > k
    if ambiguous.any():
        logits, last = logits_BV[ambiguous], last[ambiguous]
        above, equal = logits > last, logits == last
        room = k - above.sum(1, keepdim=True)
        taken = above | (equal & (equal.cumsum(1) <= room))
        columns[ambiguous] = taken.nonzero()[:, 1].view(-1, k)
    return columns


def _join(values_NC: Tensor, max_RC: Tensor, sum_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return maximum, and sum of exponentials relative to it, [C] each, of single logits and of shards' other ids."""
    top = torch.cat([values_NC, max_RC]).amax(0)
    return top, (values_NC - top).exp().sum(0) + (sum_RC * (max_RC - top).exp()).sum(0)


def divergence_of(loss: Loss) -> Divergence:
    """Return the divergence that the settings name.

    Raises:
        ValueError: a kind that is not known.
    """
    makers: dict[str, Callable[[], Divergence]] = {
        "forward_kl": lambda: FORWARD_KL,
        "reverse_kl": lambda: FDivergence(reverse_kl_terms),
        "jsd": lambda: FDivergence(partial(jsd_terms, beta=loss.beta)),
        "skew_kl": lambda: FDivergence(partial(skew_kl_terms, skew=loss.skew)),
        "tvd": lambda: FDivergence(tvd_terms),
        "top_k_kl": lambda: TopKKL(loss.top_k),
    }
    if loss.kind not in makers:
        raise ValueError(f"loss kind {loss.kind!r} is not one of {', '.join(makers)}")
    return makers[loss.kind]()
