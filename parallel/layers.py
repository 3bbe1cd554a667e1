"""Tensor-parallel linears, column- and row-parallel.

    Y = X A with A cut by columns: [A_1 .. A_n]    ColumnParallelLinear   Y_i = X A_i            X replicated
    Y = X A with A cut by rows:    [A_1; ..; A_n]  RowParallelLinear      Y = sum_i X_i A_i      X cut like A

Decides how gradients are formed, because the schedule needs the two halves of a backward apart:

- The input gradient is autograd's. Column-parallel layers that read the same tensor (q, k and v; gate and up) share one
  entry into the tensor-parallel region, so their input gradients are added first and all-reduced once.
- The weight gradient is a piece of work handed to `WeightGradients`. It is accumulated directly into
  `parameter.main_grad` where that exists, else into `parameter.grad`; autograd itself sees no gradient for the weight,
  so `torch.autograd.grad` with respect to a weight returns nothing. While the shared all-reduce travels, the weight
  gradients of the layers behind it are computed.
- A frozen weight costs no weight gradient and keeps no activation for it.
- torch.compile leaves these layers alone (a tracer would drop the weight gradients) and compiles what lies between.

Shards are balanced and unpadded (`collectives.shard_range`): a size that tp does not divide works, and no padding is
visible in a parameter or an output. At tp size 1 the same code runs without collectives. Sequence parallelism will
change `_enter_region` and `_LinearFunction`'s reduction, nothing else.
Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import all_reduce_, gather_from_tp, shard_range, shard_sizes, split_to_tp
from parallel.gradients import WeightGradients, accumulate_outer_, grad_target
from parallel.mesh import Axis
from parallel.recompute import OutputCache

SINGLE = Axis("tp")


@dataclass(frozen=True)
class ShardSpec:
    """The part [start, stop) along `dim` of a parameter of length `full` that a rank owns."""

    dim: int
    start: int
    stop: int
    full: int

    @staticmethod
    def of(dim: int, full: int, tp: Axis) -> ShardSpec:
        """Return this rank's balanced shard of a dim of length `full`."""
        start, stop = shard_range(full, tp.size, tp.rank)
        return ShardSpec(dim, start, stop, full)


def _accumulate_linear(
    weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor | None, grad: Tensor
) -> None:
    grad = grad.reshape(-1, grad.shape[-1])
    if x is not None:
        accumulate_outer_(grad_target(weight), grad, x.reshape(-1, x.shape[-1]))
    if bias is not None and bias.requires_grad:
        grad_target(bias).add_(grad.sum(dim=0, dtype=grad_target(bias).dtype))


@dataclass
class _Region:
    """One entry of a replicated tensor into the tensor-parallel region, shared by the layers that read it."""

    axis: Axis
    entered: Tensor
    pending: list[tuple[WeightGradients, Callable[[], None]]] = field(default_factory=list)


class _EnterRegion(torch.autograd.Function):
    """Identity; the backward all-reduces the input gradient and computes pending weight gradients meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, pending: list[Any]) -> Tensor:
        ctx.axis, ctx.pending = axis, pending
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Every reader's input gradient is a fresh product, so this sum belongs to nobody else.
        grad = grad.contiguous()
        reduction = all_reduce_(grad, ctx.axis, async_op=True)
        pending, ctx.pending[:] = list(ctx.pending), []
        for sink, work in pending:
            sink.submit(work)
        reduction.wait()
        return grad, None, None


def _enter_region(x: Tensor, axis: Axis) -> tuple[Tensor, _Region | None]:
    """Return `x` inside the region, with the entry if gradients will flow; readers of one tensor share it.

    Collectives: backward all-reduce over `axis`, one for all readers of `x`.
    """
    if axis.size == 1 or not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    region: _Region | None = getattr(x, "_tp_region", None)
    if region is None or region.axis is not axis:
        pending: list[Any] = []
        region = _Region(axis, _EnterRegion.apply(x, axis, pending), pending)
        # The tensor carries its entry so that siblings find it; the entry dies with the tensor.
        x._tp_region = region
    return region.entered, region


class _LinearFunction(torch.autograd.Function):
    """x @ weight.T, summed over `reduce_axis`, plus bias; the weight gradient goes to the region or the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        reduce_axis: Axis,
        sink: WeightGradients,
        region: _Region | None,
        cache: OutputCache,
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        # Not a saved tensor: checkpointing hands back a detached copy of those, and gradients would go to the copy.
        ctx.weight, ctx.bias, ctx.sink, ctx.region = weight, bias, sink, region

        def compute() -> Tensor:
            if reduce_axis.size == 1:
                return F.linear(x, weight, bias)
            y = F.linear(x, weight)
            all_reduce_(y, reduce_axis)
            return y if bias is None else y.add_(bias)

        return cache.output(compute)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            work = partial(_accumulate_linear, weight, ctx.bias, x, grad)
            if ctx.region is not None and grad_x is not None:
                ctx.region.pending.append((ctx.sink, work))
            else:
                ctx.sink.submit(work)
        return grad_x, None, None, None, None, None, None


def _uniform_(weight: Tensor, bias: Tensor | None, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


class ColumnParallelLinear(nn.Module):
    """Linear layer whose output features are cut over tp.

        y_i = x @ A_i + b_i        A_i: this rank's columns of A, stored transposed as [out/tp, in]

    Args:
        in_features, out_features: global sizes; `out_features` need not be divisible by tp.
        bias: whether there is one; it is cut like the output.
        tp: the axis; size 1 by default.
        gather_output: return the whole output on every rank instead of this rank's shard.
        weight_gradients: where weight-gradient work goes; at once by default.
    Shapes: x [.., in] replicated -> [.., out/tp], or [.., out] with `gather_output`.
    Collectives: backward all-reduce of the input gradient (one for all layers that read x); with `gather_output` a
        forward all-gather.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        tp: Axis = SINGLE,
        gather_output: bool = False,
        weight_gradients: WeightGradients | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp, self.gather_output = tp, gather_output
        self.weight_gradients = weight_gradients or WeightGradients()
        self.output_cache = OutputCache()
        shard = ShardSpec.of(0, out_features, tp)
        rows = shard.stop - shard.start
        self.shards = {"weight": shard, "bias": shard}
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does (uniform, from the global fan-in)."""
        _uniform_(self.weight, self.bias, self.in_features)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [.., in]."""
        x, region = _enter_region(x, self.tp)
        y = _LinearFunction.apply(
            x, self.weight, self.bias, SINGLE, self.weight_gradients, region, self.output_cache
        )
        if self.gather_output:
            y = gather_from_tp(y, self.tp, shard_sizes(self.out_features, self.tp.size))
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, tp={self.tp.size}, gather_output={self.gather_output}"
        )


class RowParallelLinear(nn.Module):
    """Linear layer whose input features are cut over tp.

        y = sum_i x_i @ A_i + b    A_i: this rank's rows of A, stored transposed as [out, in/tp]

    Args:
        in_features, out_features: global sizes; `in_features` need not be divisible by tp.
        bias: whether there is one; it is replicated and added once, after the sum.
        tp: the axis; size 1 by default.
        input_is_parallel: x is already this rank's shard [.., in/tp]; otherwise x is whole and is sliced here.
        weight_gradients: where weight-gradient work goes; at once by default.
    Shapes: x [.., in/tp] or [.., in] -> [.., out] replicated.
    Collectives: forward all-reduce; without `input_is_parallel` a backward all-gather of the input gradient.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        tp: Axis = SINGLE,
        input_is_parallel: bool = True,
        weight_gradients: WeightGradients | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp, self.input_is_parallel = tp, input_is_parallel
        self.weight_gradients = weight_gradients or WeightGradients()
        self.output_cache = OutputCache()
        shard = ShardSpec.of(1, in_features, tp)
        self.shards = {"weight": shard}
        self.weight = nn.Parameter(
            torch.empty(out_features, shard.stop - shard.start, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does (uniform, from the global fan-in)."""
        _uniform_(self.weight, self.bias, self.in_features)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [.., in/tp], or to [.., in] when the input is not parallel."""
        if not self.input_is_parallel:
            x = split_to_tp(x, self.tp, shard_sizes(self.in_features, self.tp.size))
        return _LinearFunction.apply(
            x, self.weight, self.bias, self.tp, self.weight_gradients, None, self.output_cache
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tp={self.tp.size}, input_is_parallel={self.input_is_parallel}"
