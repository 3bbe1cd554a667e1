"""The inputs of one loss call: checked against each other, reduced to the valid tokens, walked chunk by chunk.

Decides which tokens count (labels that are not `IGNORE`), and that the others are dropped before any product
with a head. Every rank of tp sees the same labels, so all of them walk the same chunks, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distill.head import Head, compute_dtype
from distill.packing import IGNORE
from distill.vocab_chunks import VocabChunk
from distill.vocab_shards import Divergence, Shards
from parallel.collectives import all_reduce_
from parallel.mesh import Axis


class Part(NamedTuple):
    """The valid tokens of one chunk."""

    positions_C: Tensor
    labels_C: Tensor
    hidden_CD: Tensor
    shards: Shards


class TokenBatch:
    """Hidden states, heads and labels of one call on this rank of tp.

    Raises:
        ValueError: half a teacher, or shapes that do not fit.
    """

    def __init__(
        self,
        student_hidden_TD: Tensor,
        student_head: Head,
        teacher_hidden_TE: Tensor | None,
        teacher_head: Head | None,
        labels_T: Tensor,
        tp: Axis,
    ) -> None:
        self.student_hidden_TD, self.student_head = student_hidden_TD, student_head
        self.teacher_hidden_TE, self.teacher_head = teacher_hidden_TE, teacher_head
        self.tp = tp
        self._check(labels_T)
        self.positions = (labels_T != IGNORE).nonzero()[:, 0]
        self.labels = labels_T[self.positions]

    def _check(self, labels_T: Tensor) -> None:
        if (self.teacher_hidden_TE is None) != (self.teacher_head is None):
            raise ValueError("a teacher is its hidden states and its head; only one of them was given")
        sides = [("student", self.student_hidden_TD, self.student_head)]
        if self.teacher_hidden_TE is not None:
            sides.append(("teacher", self.teacher_hidden_TE, self.teacher_head))
        width = self.student_head.weight_VD.shape[0]
        for name, hidden, head in sides:
            if hidden.shape != (len(labels_T), head.weight_VD.shape[1]):
                raise ValueError(
                    f"{name} hidden {tuple(hidden.shape)} does not fit {len(labels_T)} labels and a head of "
                    f"{tuple(head.weight_VD.shape)}"
                )
            if head.weight_VD.shape[0] != width:
                raise ValueError(
                    f"the teacher's head has {head.weight_VD.shape[0]} ids here, the student's {width}"
                )

    def _vocab_size(self) -> int:
        """Return V over all ranks of tp. Collectives: one all-reduce unless the student's head says it."""
        if self.student_head.vocab_size is not None:
            return self.student_head.vocab_size
        size = torch.tensor(self.student_head.weight_VD.shape[0], device=self.labels.device)
        all_reduce_(size, self.tp)
        return int(size)

    def chunks(
        self, *, temperature: float, divergence: Divergence, chunk_tokens: int | None
    ) -> Iterator[tuple[VocabChunk, Part]]:
        """Yield the valid tokens chunk by chunk, with their logits in the chunk's buffers.

        Collectives: `VocabChunk.gather` for each; at first those of the vocabulary size. None without tokens.
        """
        if len(self.positions) == 0:
            return
        vocab_size = self._vocab_size()
        low, high = self.labels.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"labels run from {low} to {high}; valid are 0..{vocab_size - 1} and {IGNORE}")
        chunk = VocabChunk(
            self.student_head,
            self.teacher_head,
            tp=self.tp,
            vocab_size=vocab_size,
            temperature=temperature,
            divergence=divergence,
            dtype=compute_dtype(self.student_hidden_TD),
            num_tokens=len(self.positions),
            chunk_tokens=chunk_tokens,
        )
        for start in range(0, len(self.positions), chunk.chunk_tokens):
            rows = slice(start, start + chunk.chunk_tokens)
            positions_C, labels_C = self.positions[rows], self.labels[rows]
            hidden_CD = self.student_hidden_TD[positions_C]
            teacher_CE = None if self.teacher_hidden_TE is None else self.teacher_hidden_TE[positions_C]
            shards = chunk.gather(hidden_CD, teacher_CE, labels_C)
            yield chunk, Part(positions_C, labels_C, hidden_CD, shards)
