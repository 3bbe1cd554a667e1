"""One model's output head on this rank, and the three matrix products with it.

Decides in which type the products are computed: the head's own, but for half precision on a processor without
units for it. A head that must be converted is converted by blocks of rows, never whole. Assumes that the
gradient and the logits come in the type the loss computes in (float32 or float64). Does not know how the
shards of a vocabulary fit together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20  # several operations pass over a block, so it should stay in a core's cache
_ACCELERATOR_BLOCK_BYTES = 256 << 20  # an accelerator has no such cache and pays for every launch


@dataclass(frozen=True)
class Head:
    """One model's output head on this rank.

    z = hidden @ weight.T + bias,  logits = softcap * tanh(scale * z / softcap)
    """

    weight_VD: Tensor
    """[V/tp, D]."""
    bias_V: Tensor | None = None
    """[V/tp]."""
    scale: float = 1.0
    """Factor on z (granite: 1 / logits_scaling)."""
    softcap: float | None = None
    """None means logits = scale * z (gemma2 has one)."""
    vocab_size: int | None = None
    """V over all ranks of tp; None sums the shards, one small all-reduce a call."""


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of everything between a hidden state and its loss: float32, float64 for float64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def row_blocks(num_rows: int, row_bytes: int, block_bytes: int = _BLOCK_BYTES) -> Iterator[slice]:
    """Yield slices of rows whose bytes together make a block."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _product_dtype(weight: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in: the head's own, but no half type on a processor without units for it.

    There a half product takes 7 to 70 times as long as the same in float32 (measured with AVX2 only).
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight.dtype
    short = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    units = torch.cpu.get_capabilities()
    return weight.dtype if units.get(f"amx_{short}") or units.get(f"avx512_{short}") else compute_dtype


class HeadProducts:
    """The three matrix products with one head; what must be converted is converted by blocks, never whole."""

    def __init__(self, head: Head, compute_dtype: torch.dtype) -> None:
        self.weight_VD = head.weight_VD
        self.dtype = _product_dtype(head.weight_VD, compute_dtype)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        weight = self.weight_VD
        if weight.dtype == self.dtype:
            yield slice(0, weight.shape[0]), weight
            return
        for ids in row_blocks(weight.shape[0], weight.shape[1] * self.dtype.itemsize):
            yield ids, weight[ids].to(self.dtype)

    def logits_(self, hidden_CD: Tensor, out_CV: Tensor) -> None:
        """Write hidden @ weight.T into `out_CV`."""
        hidden_CD = hidden_CD.to(self.dtype)
        for ids, weight in self._blocks():
            if out_CV.dtype == self.dtype:
                torch.mm(hidden_CD, weight.t(), out=out_CV[:, ids])
            else:
                out_CV[:, ids] = hidden_CD @ weight.t()

    def hidden_gradient(self, grad_CV: Tensor) -> Tensor:
        """Return grad @ weight, [C, D] in grad's dtype."""
        total = grad_CV.new_zeros(grad_CV.shape[0], self.weight_VD.shape[1])
        for ids, weight in self._blocks():
            if grad_CV.dtype == self.dtype:
                total.addmm_(grad_CV[:, ids], weight)
            else:
                total += grad_CV[:, ids].to(self.dtype) @ weight
        return total

    def add_weight_gradient_(self, target_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        """Add grad.T @ hidden to `target_VD`, in the target's precision."""
        hidden_CD = hidden_CD.to(self.dtype)
        if target_VD.dtype == grad_CV.dtype == self.dtype:
            target_VD.addmm_(grad_CV.t(), hidden_CD)
            return
        row_bytes = target_VD.shape[1] * self.dtype.itemsize
        block_bytes = _BLOCK_BYTES if target_VD.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
        for ids in row_blocks(target_VD.shape[0], row_bytes, block_bytes):
            target_VD[ids] += grad_CV[:, ids].to(self.dtype).t() @ hidden_CD
