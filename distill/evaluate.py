"""Judge a model on held-out text with the training layout: perplexity, KL and agreement with the teacher.

Token sums run over all replicas and are divided once, so the figures do not depend on the layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data import MicroBatch
from distill.forward import run_forward
from distill.losses import ENTROPY_BOUNDS, BucketSums, evaluate_tokens
from distill.step import head_of
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links
from parallel.weights import parameter_table


@dataclass(frozen=True)
class EntropyBucket:
    """What a model reaches on the tokens whose teacher's entropy (untempered) lies in [low, high) nats."""

    low: float
    high: float
    loss: float
    kl: float
    agreement: float
    """As in `Quality`."""
    num_tokens: int


@dataclass(frozen=True)
class Quality:
    """What a model reaches on a text."""

    loss: float
    """Cross-entropy with the text, nats per token."""
    accuracy: float
    """Share of tokens that are the model's most likely one."""
    kl: float
    """KL(teacher || model) at temperature 1, nats per token; 0 for the teacher itself."""
    agreement: float
    """Share of tokens on which model and teacher have the same most likely id; 1 for the teacher itself."""
    num_tokens: int
    by_entropy: tuple[EntropyBucket, ...] = ()
    """Of each bucket that has tokens, from sure to unsure; empty for the teacher itself."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def whole(self) -> dict[str, float]:
        """Return the figures over all tokens under the names of the logs."""
        return {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/kl": self.kl,
            "eval/agreement": self.agreement,
            "eval/accuracy": self.accuracy,
        }

    def named(self) -> dict[str, float]:
        """Return all figures under the names of the logs."""
        named = self.whole()
        for bucket in self.by_entropy:
            group = f"eval/entropy_{bucket.low:g}_{bucket.high:g}"
            named |= {
                f"{group}/loss": bucket.loss,
                f"{group}/kl": bucket.kl,
                f"{group}/agreement": bucket.agreement,
                f"{group}/tokens": bucket.num_tokens,
            }
        return named


def evaluate(
    mesh: Mesh,
    links: Links,
    microbatches: Sequence[MicroBatch],
    *,
    students: Sequence[StageModel] = (),
    teacher: StageModel | None = None,
) -> Quality:
    """Judge the student against the teacher, or the one model that is given alone.

    Args:
        links: as `run_forward` takes them.
        microbatches: this replica's share of the text.
        students: this rank's stages of the student, in ascending order.
    Returns:
        The quality over all replicas' tokens, on every rank.
    Raises:
        ValueError: no token to judge.
    Collectives: those of the forward passes; one all-reduce over the world.
    """
    judged, reference = (students[-1], teacher) if students else (teacher, None)
    judged_kind = Kind.F if students else Kind.K
    sums = torch.zeros(5, dtype=torch.float64)
    by_entropy = torch.zeros(len(ENTROPY_BOUNDS) + 1, len(BucketSums._fields), dtype=torch.float64)

    def consume(batch: MicroBatch, hidden: dict[Kind, Tensor]) -> None:
        stats = evaluate_tokens(
            hidden[judged_kind].flatten(0, 1),
            head_of(judged),
            None if reference is None else hidden[Kind.K].flatten(0, 1),
            None if reference is None else head_of(reference),
            batch.labels_BS.flatten(),
            tp=mesh.tp,
        )
        sums.add_(
            torch.tensor(
                [stats.nll_sum, stats.kl_sum, stats.agreement_count, stats.correct_count, stats.num_tokens],
                dtype=torch.float64,
            )
        )
        if stats.by_entropy:
            by_entropy.add_(torch.tensor(stats.by_entropy, dtype=torch.float64))

    run_forward(mesh, links, microbatches, students=students, teacher=teacher, consume=consume)
    total = (torch.cat([sums, by_entropy.flatten()]) / mesh.tp.size).to(mesh.device)
    all_reduce_(total, mesh.world)
    nll, kl, agreement, correct, count = total[:5].tolist()
    if count == 0:
        raise ValueError("the text has no token to judge")
    alone = reference is None
    return Quality(
        loss=nll / count,
        accuracy=correct / count,
        kl=0.0 if alone else kl / count,
        agreement=1.0 if alone else agreement / count,
        num_tokens=round(count),
        by_entropy=_buckets(total[5:].view_as(by_entropy).tolist()),
    )


def _buckets(rows: list[list[float]]) -> tuple[EntropyBucket, ...]:
    """Return the figures of the buckets that have tokens, from their sums."""
    edges = itertools.pairwise((0.0, *ENTROPY_BOUNDS, math.inf))
    return tuple(
        EntropyBucket(
            low=low,
            high=high,
            loss=sums.nll_sum / sums.num_tokens,
            kl=sums.kl_sum / sums.num_tokens,
            agreement=sums.agreement_count / sums.num_tokens,
            num_tokens=round(sums.num_tokens),
        )
        for (low, high), sums in zip(edges, (BucketSums(*row) for row in rows), strict=True)
        if sums.num_tokens > 0
    )


def num_parameters(stages: Sequence[StageModel], mesh: Mesh) -> int:
    """Return the parameters of the whole model, tied ones once. Collectives: one all-reduce over pp x tp."""
    count = sum(
        entry.parameter.numel()
        for stage in stages
        for entry in parameter_table(stage)
        if not entry.is_tied_copy and (entry.shard is not None or mesh.tp.is_first)
    )
    total = torch.tensor(count, device=mesh.device)
    all_reduce_(total, mesh.model)
    return int(total)
