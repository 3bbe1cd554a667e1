"""Random problems for the distillation loss, the formula they are held against, and the comparison."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.config import Loss
from distill.divergences import divergence_of
from distill.head import Head
from distill.losses import fused_distillation_loss
from distill.packing import IGNORE
from parallel.collectives import shard_range
from parallel.mesh import Axis

EXACT = 1e-12


@dataclass(frozen=True)
class Case:
    """A random problem, the same on every rank; sizes are odd on purpose."""

    temperature: float = 2.0
    alpha: float = 0.3
    vocab: int = 37
    tokens: int = 13
    student_width: int = 5
    teacher_width: int = 7
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    lopsided: bool = False
    """Teacher's mass on the lowest ids, student's on the highest: every shard has another share."""
    tied: bool = False
    """Few different teacher logits, so that any top-k ends among equal ones; for every other token all are equal."""
    chunk: int | None = 4
    kind: str = "forward_kl"
    beta: float = 0.3
    skew: float = 0.1
    top_k: int = 5

    @property
    def loss(self) -> Loss:
        return Loss(kind=self.kind, beta=self.beta, skew=self.skew, top_k=self.top_k)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        labels = torch.randint(0, self.vocab, (self.tokens,), generator=generator)
        labels[[0, 4, 5]] = IGNORE
        lean = torch.linspace(3, -3, self.vocab, dtype=torch.float64).to(dtype) * self.lopsided
        biased = self.bias or self.lopsided
        tensors = {
            "hidden": draw(self.tokens, self.student_width),
            "weight": draw(self.vocab, self.student_width),
            "bias": draw(self.vocab) - lean if biased else None,
            "teacher_hidden": draw(self.tokens, self.teacher_width),
            "teacher_weight": draw(self.vocab, self.teacher_width),
            "teacher_bias": draw(self.vocab) + lean if biased else None,
            "labels": labels,
        }
        if self.tied:
            # Exact in binary, so that products of any order are equal.
            steps = torch.arange(self.vocab) * 5 % 4 / 2
            tensors["teacher_weight"] = steps[:, None].expand(-1, self.teacher_width).to(dtype)
            tensors["teacher_hidden"] = (
                (torch.arange(self.tokens) % 2)[:, None].expand(-1, self.teacher_width).to(dtype)
            )
        return tensors


KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "top_k_kl")
TEMPERATURES = (1.0, 2.0, 5.0)
ODD_CASES = [
    Case(bias=True),
    Case(scale=0.25, teacher_scale=0.25),
    Case(bias=True, scale=1.5, softcap=4.0, teacher_scale=0.7),
    Case(bias=True, teacher_scale=1.5, teacher_softcap=4.0),
    Case(lopsided=True),
    Case(temperature=0.5, lopsided=True),
    Case(vocab=3, top_k=2),
    Case(tokens=6, chunk=1),
    Case(chunk=None),
]
CASES = [
    *(Case(temperature=t, alpha=a) for t, a in itertools.product(TEMPERATURES, (0.0, 0.3, 1.0))),
    *ODD_CASES,
]
OTHER_CASES = [
    *(
        Case(kind=k, temperature=t, alpha=a)
        for k, t, a in itertools.product(KINDS[1:], TEMPERATURES, (0.0, 0.3))
    ),
    *(replace(case, kind=kind) for kind in KINDS[1:] for case in ODD_CASES),
    *(Case(kind="jsd", lopsided=True, beta=beta) for beta in (0.001, 0.5, 0.999)),
    *(Case(kind="skew_kl", lopsided=True, skew=skew) for skew in (0.001, 0.999)),
    # One id; more than a shard of 4 ranks or of 2 has; all but one.
    *(Case(kind="top_k_kl", lopsided=True, top_k=top_k) for top_k in (1, 12, 20, 36)),
    *(Case(kind="top_k_kl", tied=True, top_k=top_k) for top_k in (1, 3, 12, 20, 36)),
]


def student_logits(tensors: dict[str, Any], case: Case) -> Tensor:
    return _logits(tensors["hidden"], tensors["weight"], tensors["bias"], case.scale, case.softcap)


def teacher_logits(tensors: dict[str, Any], case: Case) -> Tensor:
    hidden, weight, bias = (tensors[f"teacher_{name}"] for name in ("hidden", "weight", "bias"))
    return _logits(hidden, weight, bias, case.teacher_scale, case.teacher_softcap)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_divergence(case: Case, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of one token as its formula, from log-probabilities of all ids."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum()

    def mixture(weight: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))

    def categories(log_a: Tensor) -> Tensor:
        ids = sorted(range(case.vocab), key=lambda v: (-log_p[v].item(), v))
        return torch.cat([log_a[ids[: case.top_k]], log_a[ids[case.top_k :]].logsumexp(0)[None]])

    match case.kind:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jsd":
            log_m = mixture(case.beta)
            return case.beta * kl(log_p, log_m) + (1 - case.beta) * kl(log_q, log_m)
        case "skew_kl":
            return kl(log_p, mixture(case.skew))
        case "tvd":
            return (log_p.exp() - log_q.exp()).abs().sum() / 2
        case "top_k_kl":
            return kl(categories(log_p), categories(log_q))
    raise ValueError(case.kind)


def plain_loss(case: Case, tensors: dict[str, Any], num_valid_tokens: int) -> dict[str, Tensor]:
    """The formula, token by token and id by id, in float64 and differentiated by autograd."""
    wide = {
        k: v.detach().double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()
    }
    inputs = {k: wide[k].requires_grad_() for k in ("hidden", "weight", "bias") if wide[k] is not None}
    student, teacher = student_logits(wide, case), teacher_logits(wide, case)
    hard = soft = torch.zeros((), dtype=torch.float64)
    for s, t, label in zip(student, teacher, wide["labels"].tolist(), strict=True):
        if label == IGNORE:
            continue
        hard = hard - (s[label] - torch.logsumexp(s, 0))
        log_p = t / case.temperature - torch.logsumexp(t / case.temperature, 0)
        log_q = s / case.temperature - torch.logsumexp(s / case.temperature, 0)
        soft = soft + case.temperature**2 * plain_divergence(case, log_p, log_q)
    total = (case.alpha * hard + (1 - case.alpha) * soft) / num_valid_tokens
    grads = torch.autograd.grad(total, list(inputs.values()))
    if case.alpha == 1:
        soft = torch.zeros_like(soft)
    return {
        "hard": hard.detach() / num_valid_tokens,
        "soft": soft.detach() / num_valid_tokens,
        **{f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)},
    }


def heads(case: Case, tensors: dict[str, Any], tp: Axis) -> tuple[Head, Head]:
    own = slice(*shard_range(case.vocab, tp.size, tp.rank))

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[own].clone()

    student = Head(cut(tensors["weight"]), cut(tensors["bias"]), case.scale, case.softcap)
    teacher = Head(
        cut(tensors["teacher_weight"]),
        cut(tensors["teacher_bias"]),
        case.teacher_scale,
        case.teacher_softcap,
        case.vocab,
    )
    return student, teacher


def sharded_loss(
    case: Case, tensors: dict[str, Any], tp: Axis, num_valid_tokens: int, **options: Any
) -> dict[str, Tensor]:
    """What `fused_distillation_loss` gives on this rank, under the names of `plain_loss`."""
    student, teacher = heads(case, tensors, tp)
    wide = torch.float64 if tensors["hidden"].dtype == torch.float64 else torch.float32
    grad_weight = torch.zeros_like(student.weight_VD, dtype=wide)
    grad_bias = None if student.bias_V is None else torch.zeros_like(student.bias_V, dtype=wide)
    result = fused_distillation_loss(
        tensors["hidden"],
        student,
        tensors["teacher_hidden"],
        teacher,
        tensors["labels"],
        divergence=divergence_of(case.loss),
        temperature=case.temperature,
        alpha=case.alpha,
        num_valid_tokens=num_valid_tokens,
        tp=tp,
        **{"chunk_tokens": case.chunk, "grad_weight_out_VD": grad_weight, "grad_bias_out_V": grad_bias}
        | options,
    )
    found = {"hard": result.hard, "soft": result.soft, "grad_weight": grad_weight}
    if result.grad_hidden_TD is not None:
        found["grad_hidden"] = result.grad_hidden_TD
    if grad_bias is not None:
        found["grad_bias"] = grad_bias
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where one is not a number, which would pass a comparison of maxima."""
    if expected.numel() == 0:
        return 0.0
    return (found - expected).abs().nan_to_num(nan=torch.inf).max().item()


def errors(case: Case, tp: Axis) -> dict[str, float]:
    """Largest differences between the sharded loss and the formula, by name, on this rank."""
    tensors = case.tensors()
    # More tokens than there are here: the denominator is the step's, not the micro-batch's.
    expected = plain_loss(case, tensors, num_valid_tokens=29)
    found = sharded_loss(case, tensors, tp, num_valid_tokens=29)
    own = slice(*shard_range(case.vocab, tp.size, tp.rank))
    for name in ("grad_weight", "grad_bias"):
        if name in expected:
            expected[name] = expected[name][own]
    assert found.keys() == expected.keys()
    return {name: distance(found[name], expected[name]) for name in found}
