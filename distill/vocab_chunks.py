"""Logits of a vocabulary-parallel head, a chunk of tokens at a time, and what a loss must know of them.

Decides how a distribution over a vocabulary that is cut over tp is handled without ever holding it: each rank
computes the logits of its own ids for one chunk, reduces every token to a handful of numbers relative to its
own shard's maximum (sums of exponentials, the label's logit), and one gather of these numbers tells every
rank the whole. The gradient of its own shard then follows in closed form, so nothing of a reduction is left
to autograd. Assumes that every rank of tp sees the same hidden states and labels, and that both models'
vocabularies are cut by `shard_range`. Does not know what the loss is (`distill.losses` does), nor any divergence:
one says in the pieces of `Divergence` what it sums before the normalisers are known, and whether it must look at
the chunk a second time when they are (`distill.divergences`).

Elementwise work runs over blocks of rows that stay in a core's cache, in place, on the chunk's own buffers.

Letters: C tokens of a chunk, B tokens of a block, D residual width, V vocabulary, R ranks of tp. "Tempered"
logits are z / T; p and q are the teacher's and the student's softmax of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.head import Head, HeadProducts, row_blocks
from distill.vocab_shards import NO_MAXIMUM, Block, Divergence, Factors, Settled, Shards
from parallel.collectives import all_gather, shard_range
from parallel.mesh import Axis

_CHUNK_BYTES = 64 << 20  # both models' logits of a chunk; more gains no speed (python -m launch.bench loss)
_ACCELERATOR_CHUNK_BYTES = (
    512 << 20
)  # every chunk reads both heads and the gradient, which takes as long as 250 tokens or so
_MIN_CHUNK_TOKENS = 64  # below this a matrix product spends its time on reading the head


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class VocabChunk:
    """One chunk of tokens at a time, in buffers that all chunks share.

    Invariant: after `gather` the buffers hold tempered logits; a second pass overwrites the teacher's, and
    `gradient` the student's.

    Args:
        tp: the axis that cuts the vocabulary; size 1 runs the same path.
        vocab_size: V over all ranks.
        temperature: T > 0, for both models.
        divergence: the soft term; unused without a teacher.
        dtype: float32 or float64, of everything but the products with a half-precision head.
        num_tokens: tokens that will come; chunks are balanced, because a short last one would read the heads
            for little work.
        chunk_tokens: most tokens in a chunk; None lets bytes decide.
    Raises:
        ValueError: a head that is not this rank's `shard_range` of the vocabulary, or a vocabulary that is too small
            for the divergence.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        *,
        tp: Axis,
        vocab_size: int,
        temperature: float,
        divergence: Divergence,
        dtype: torch.dtype,
        num_tokens: int,
        chunk_tokens: int | None,
    ) -> None:
        self.ids = range(*shard_range(vocab_size, tp.size, tp.rank))
        width, device = student.weight_VD.shape[0], student.weight_VD.device
        if width != len(self.ids):
            raise ValueError(
                f"a head of {width} ids, where rank {tp.rank} of tp owns {self.ids.start}..{self.ids.stop - 1}"
            )
        if vocab_size < divergence.fewest_ids:
            raise ValueError(
                f"{divergence} needs {divergence.fewest_ids} ids or more; there are {vocab_size}"
            )
        self.student, self.teacher, self.tp = student, teacher, tp
        self.temperature, self.divergence = temperature, divergence
        if chunk_tokens is None:
            # By the longest shard: ranks whose shards differ by one id must still cut the tokens alike.
            token_bytes = _ceil_div(vocab_size, tp.size) * dtype.itemsize * (1 if teacher is None else 2)
            chunk_bytes = _CHUNK_BYTES if device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
            chunk_tokens = max(_MIN_CHUNK_TOKENS, chunk_bytes // token_bytes)
        self.chunk_tokens = _ceil_div(num_tokens, _ceil_div(num_tokens, chunk_tokens))
        # An accelerator has no such cache and pays for every launch: there a block is the whole chunk.
        self._row_bytes = width * dtype.itemsize if device.type == "cpu" else 0
        block = next(row_blocks(self.chunk_tokens, self._row_bytes)).stop
        self._scratch = torch.empty(3, block, width, dtype=dtype, device=device)
        self.student_CV = torch.empty(self.chunk_tokens, width, dtype=dtype, device=device)
        self.teacher_CV = None if teacher is None else torch.empty_like(self.student_CV)
        self.products = HeadProducts(student, dtype)
        self._teacher_products = None if teacher is None else HeadProducts(teacher, dtype)

    def gather(self, hidden_CD: Tensor, teacher_hidden_CE: Tensor | None, labels_C: Tensor) -> Shards:
        """Compute the chunk's tempered logits, and return what all shards know of them.

        Collectives: tp all-gather [6 + n, C] float64, n the divergence's own numbers.
        """
        num_own = 0 if self.teacher is None else self.divergence.num_numbers
        numbers = torch.zeros(1, 6 + num_own, len(labels_C), dtype=torch.float64, device=labels_C.device)
        own = Shards(*numbers[0, :6], numbers[0, 6:])
        if self.student_CV.shape[1] == 0:
            own.max_q.fill_(NO_MAXIMUM)
            own.max_p.fill_(NO_MAXIMUM)
            if num_own:
                empty = self.student_CV[: len(labels_C)]
                self.divergence.shard_numbers_(own.own, empty, empty, empty, empty, self.ids.start)
        else:
            self.products.logits_(hidden_CD, self.student_CV[: len(labels_C)])
            if self._teacher_products is not None:
                self._teacher_products.logits_(teacher_hidden_CE, self.teacher_CV[: len(labels_C)])
            for rows in row_blocks(len(labels_C), self._row_bytes):
                part = Shards(*(number[..., rows] for number in own))
                self._reduce_student(rows, labels_C[rows], part)
                if self.teacher is not None:
                    self._reduce_teacher(rows, part)
        gathered = all_gather(numbers, self.tp, dim=0, sizes=[1] * self.tp.size)
        return Shards(*gathered[:, :6].unbind(1), gathered[:, 6:])

    def settle(self, shards: Shards) -> Settled:
        """Return the divergence of the chunk's tokens, and what `gradient` must know of it.

        Args:
            shards: what `gather` returned for this chunk, which has a teacher.
        Collectives: tp all-gather [n, C] float64, n the divergence's sums, unless it has none.
        """
        sums, num_tokens = None, shards.max_q.shape[1]
        if self.divergence.num_sums:
            numbers = shards.max_q.new_empty(1, self.divergence.num_sums, num_tokens)
            for rows, block in self._blocks(shards, num_tokens):
                numbers[0, :, rows] = self.divergence.shard_sums_(block)
            sums = all_gather(numbers, self.tp, dim=0, sizes=[1] * self.tp.size).sum(0)
        return self.divergence.settle(shards, sums, self.tp.rank, self.ids)

    def gradient(
        self,
        shards: Shards,
        labels_C: Tensor,
        settled: Settled | None,
        *,
        hard_weight: float,
        soft_weight: float,
    ) -> Tensor:
        """Return d (hard_weight * CE + soft_weight * divergence) / d z, [C, V/tp], in the student's buffer.

        Args:
            shards: what `gather` returned for this chunk.
            settled: what `settle` returned for it; None without a teacher.
            hard_weight, soft_weight: of one token's terms; a hard term of weight 0 is not computed.
        """
        if self.student_CV.shape[1]:
            for rows, block in self._blocks(shards, len(labels_C)):
                own = None if settled is None else tuple(factor[rows] for factor in settled.factors)
                self._write_gradient(block, labels_C[rows], own, hard_weight, soft_weight)
        return self.student_CV[: len(labels_C)]

    def most_likely(self, logits_CV: Tensor) -> Tensor:
        """Return [C] ids of the largest logits over all shards, the lowest of equals.

        Collectives: tp all-gather [2, C] float64.
        """
        best = torch.full((1, 2, len(logits_CV)), NO_MAXIMUM, dtype=torch.float64, device=logits_CV.device)
        if logits_CV.shape[1]:
            values, columns = logits_CV.max(1)
            best[0] = torch.stack([values.double(), columns.double() + self.ids.start])
        values, ids = all_gather(best, self.tp, dim=0, sizes=[1] * self.tp.size).unbind(1)
        return torch.where(values == values.amax(0), ids, torch.inf).amin(0).long()

    def _temper_(self, z_BV: Tensor, head: Head) -> None:
        """Turn raw products into logits / T, in place."""
        if head.bias_V is not None:
            z_BV += head.bias_V
        if head.softcap is not None:
            z_BV.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / self.temperature)
        elif head.scale != self.temperature:
            z_BV *= head.scale / self.temperature

    def _own_label(self, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels' columns in this shard [B, 1], and whether they are in it."""
        width = self.student_CV.shape[1]
        column = (labels_B - self.ids.start)[:, None]
        return column.clamp(0, width - 1), (column >= 0) & (column < width)

    def _reduce_student(self, rows: slice, labels_B: Tensor, out: Shards) -> None:
        """Temper a block of student logits and fill its numbers; leaves logits - maxima in scratch 0."""
        logits = self.student_CV[rows]
        shifted, exponentials, _ = self._scratch[:, : len(logits)]
        self._temper_(logits, self.student)
        column, owned = self._own_label(labels_B)
        out.label_q.copy_(torch.where(owned, logits.gather(1, column), 0.0)[:, 0])
        top = logits.amax(1, keepdim=True)
        torch.sub(logits, top, out=shifted)
        out.max_q.copy_(top[:, 0])
        out.sum_q.copy_(torch.exp(shifted, out=exponentials).sum(1))
        if self.temperature == 1:
            out.sum_hard.copy_(out.sum_q)
        else:
            out.sum_hard.copy_(torch.mul(shifted, self.temperature, out=exponentials).exp_().sum(1))

    def _reduce_teacher(self, rows: slice, out: Shards) -> None:
        """Temper a block of teacher logits and fill its numbers; reads the student's from scratch 0."""
        logits = self.teacher_CV[rows]
        student_shifted, shifted, log_ratio = self._scratch[:, : len(logits)]
        self._temper_(logits, self.teacher)
        top = logits.amax(1, keepdim=True)
        torch.sub(logits, top, out=shifted)
        torch.sub(shifted, student_shifted, out=log_ratio)
        shifted.exp_()
        out.max_p.copy_(top[:, 0])
        out.sum_p.copy_(shifted.sum(1))
        if len(out.own):
            student = self.student_CV[rows]
            self.divergence.shard_numbers_(out.own, shifted, log_ratio, student, logits, self.ids.start)

    def _blocks(self, shards: Shards, num_tokens: int) -> Iterator[tuple[slice, Block]]:
        """Yield the chunk's blocks of rows with what turns their logits into probabilities."""
        whole_q, whole_p = shards.whole_q(), shards.whole_p()
        columns = (
            shards.max_q.amax(0),
            1 / whole_q,
            1 / shards.whole_hard(self.temperature),
            shards.max_p.amax(0),
            1 / whole_p,
            torch.log(whole_q / whole_p),
        )
        factors = [column.to(self.student_CV.dtype)[:, None] for column in columns]
        for rows in row_blocks(num_tokens, self._row_bytes):
            student = self.student_CV[rows]
            teacher = None if self.teacher_CV is None else self.teacher_CV[rows]
            own = Factors(*(factor[rows] for factor in factors))
            yield rows, Block(student, teacher, own, self._scratch[:, : len(student)])

    def _write_gradient(
        self,
        block: Block,
        labels_B: Tensor,
        settled: tuple[Tensor, ...] | None,
        hard_weight: float,
        soft_weight: float,
    ) -> None:
        """Overwrite a block of tempered student logits with the gradient of z."""
        logits, factors = block.student, block.factors
        q, _, total = block.scratch
        torch.sub(logits, factors.top_q, out=q)
        # The hard term sees untempered logits, T times the tempered ones: so is its gradient by the latter.
        hard_weight *= self.temperature
        if hard_weight:
            torch.mul(q, self.temperature, out=total).exp_().mul_(factors.inverse_hard * hard_weight)
            column, owned = self._own_label(labels_B)
            total.scatter_add_(1, column, owned.to(total.dtype) * -hard_weight)
        else:
            total.zero_()
        if settled is not None:
            q.exp_().mul_(factors.inverse_q)
            total.add_(self.divergence.gradient_(q, block, settled), alpha=soft_weight)
        slope = self.student.scale / self.temperature
        if self.student.softcap is not None:
            # d tanh(x) / dx = 1 - tanh(x)**2, and the logits still hold the tanh.
            torch.mul(logits, self.temperature / self.student.softcap, out=q)
            total.mul_(q.square_().neg_().add_(1))
        torch.mul(total, slope, out=logits)
