"""The vocabulary-parallel embedding.

Decides as `parallel.layers` does: shards are balanced and unpadded, and the weight gradient is a piece of work handed to
`WeightGradients`; autograd itself sees none.
Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import all_reduce_
from parallel.gradients import WeightGradients, grad_target
from parallel.layers import SINGLE, ShardSpec
from parallel.mesh import Axis


class _EmbeddingFunction(torch.autograd.Function):
    """Row lookup of the ids this rank owns, zero elsewhere, summed over tp."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, module: VocabParallelEmbedding) -> Tensor:
        shard = module.shards["weight"]
        owned = (ids >= shard.start) & (ids < shard.stop)
        ctx.ids, ctx.owned, ctx.module = ids, owned, module
        if module.tp.size == 1:
            return F.embedding(ids, weight)
        rows = weight.new_zeros((*ids.shape, module.embedding_dim))
        rows[owned] = weight[ids[owned] - shard.start]
        all_reduce_(rows, module.tp)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        module: VocabParallelEmbedding = ctx.module
        if ctx.needs_input_grad[1]:
            used = ctx.owned
            if module.padding_idx is not None:
                used = used & (ctx.ids != module.padding_idx)
            work = partial(
                _accumulate_rows, module.weight, ctx.ids[used] - module.shards["weight"].start, grad[used]
            )
            module.weight_gradients.submit(work)
        return None, None, None


def _accumulate_rows(weight: nn.Parameter, rows: Tensor, grad: Tensor) -> None:
    target = grad_target(weight)
    target.index_add_(0, rows, grad.to(target.dtype))


class VocabParallelEmbedding(nn.Module):
    """Embedding whose vocabulary is cut over tp.

        y[t] = scale * E[id_t]     every rank looks up the ids it owns; the sum over ranks joins them

    Args:
        num_embeddings, embedding_dim: global sizes; `num_embeddings` need not be divisible by tp.
        padding_idx: id whose row receives no gradient from here, as in `nn.Embedding`.
        scale: factor on the output (Gemma); applied in the weight's dtype.
        tp, weight_gradients: as in `ColumnParallelLinear`.
    Shapes: ids [..] -> [.., D] replicated; weight [V/tp, D].
    Collectives: forward all-reduce.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        tp: Axis = SINGLE,
        weight_gradients: WeightGradients | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.scale, self.tp = padding_idx, scale, tp
        self.weight_gradients = weight_gradients or WeightGradients()
        shard = ShardSpec.of(0, num_embeddings, tp)
        self.shards = {"weight": shard}
        self.weight = nn.Parameter(
            torch.empty(shard.stop - shard.start, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows from a standard normal distribution, as `nn.Embedding` does."""
        nn.init.normal_(self.weight)

    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        """Look up integer ids of any shape."""
        rows = _EmbeddingFunction.apply(ids, self.weight, self)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tp={self.tp.size}"
