"""Parallel layers against torch's own, forward and every gradient, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import shard_sizes
from parallel.embedding import VocabParallelEmbedding
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    ShardSpec,
    WeightGradients,
)
from parallel.mesh import Axis, Mesh
from tests.workers import WorkerError, run_distributed

D, M, V = 6, 10, 13  # 10 and 13 do not divide by 4, 13 not by 2


def _tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _shard(full: Tensor, spec: ShardSpec | None) -> Tensor:
    return full if spec is None else full.narrow(spec.dim, spec.start, spec.stop - spec.start)


def _set(layer: nn.Module, **full: Tensor) -> None:
    with torch.no_grad():
        for name, tensor in full.items():
            getattr(layer, name).copy_(_shard(tensor, layer.shards.get(name)))


def _check(layer: nn.Module, **full_grads: Tensor) -> None:
    for name, grad in full_grads.items():
        torch.testing.assert_close(
            getattr(layer, name).grad, _shard(grad, layer.shards.get(name)), rtol=1e-12, atol=1e-12
        )


def _block(tp: Axis, *, gather: bool, bias: bool) -> None:
    """Two column-parallel readers of one tensor, then a row-parallel layer: the shape of an MLP."""
    x = _tensor(2, 5, D, seed=1).requires_grad_()
    weights = [_tensor(M, D, seed=2), _tensor(M, D, seed=3), _tensor(D, M, seed=4)]
    biases = [_tensor(M, seed=5), _tensor(M, seed=6), _tensor(D, seed=7)]
    plain = [t.clone().requires_grad_() for t in weights + biases]
    chosen = plain[3:] if bias else [None] * 3
    expected = F.linear(
        F.linear(x, plain[0], chosen[0]) * F.linear(x, plain[1], chosen[1]).tanh(), plain[2], chosen[2]
    )
    expected.sin().sum().backward()
    expected_x, x.grad = x.grad, None

    options = {"bias": bias, "tp": tp, "dtype": torch.float64}
    gate = ColumnParallelLinear(D, M, gather_output=gather, **options)
    up = ColumnParallelLinear(D, M, gather_output=gather, **options)
    down = RowParallelLinear(M, D, input_is_parallel=not gather, **options)
    for layer, weight, offset in zip((gate, up, down), weights, biases, strict=True):
        _set(layer, weight=weight, **({"bias": offset} if bias else {}))
    hidden = x * 1.0
    y = down(gate(hidden) * up(hidden).tanh())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.sin().sum().backward()
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-12, atol=1e-12)
    for layer, weight, offset in zip((gate, up, down), plain[:3], plain[3:], strict=True):
        _check(layer, weight=weight.grad, **({"bias": offset.grad} if bias else {}))


def _embedding(tp: Axis, padding_idx: int | None) -> None:
    ids = torch.tensor([[0, 12, 3, 3], [7, 6, 0, 5]])
    reference = nn.Embedding(V, D, padding_idx=padding_idx, dtype=torch.float64)
    full = _tensor(V, D, seed=8)
    with torch.no_grad():
        reference.weight.copy_(full)
    layer = VocabParallelEmbedding(V, D, padding_idx=padding_idx, scale=3.0, tp=tp, dtype=torch.float64)
    _set(layer, weight=full)
    y, expected = layer(ids), reference(ids) * 3.0
    torch.testing.assert_close(y, expected)
    y.cos().sum().backward()
    expected.cos().sum().backward()
    _check(layer, weight=reference.weight.grad)


def _all_checks() -> None:
    mesh = Mesh.create(pp=1, dp=1, tp=torch.distributed.get_world_size())
    for gather in (False, True):
        for bias in (False, True):
            _block(mesh.tp, gather=gather, bias=bias)
    for padding_idx in (None, 3):
        _embedding(mesh.tp, padding_idx)


def test_one_process_runs_the_same_code() -> None:
    for gather in (False, True):
        _block(Axis("tp"), gather=gather, bias=True)
    _embedding(Axis("tp"), None)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_layers_match_torch_with_uneven_shards(tp: int) -> None:
    run_distributed(tp, _all_checks)


def _count_reductions() -> int:
    """Return the all-reduces in the backward of three readers of one tensor."""
    mesh = Mesh.create(pp=1, dp=1, tp=2)
    layers = [ColumnParallelLinear(D, M, tp=mesh.tp) for _ in range(3)]
    hidden = torch.randn(4, D, requires_grad=True) * 1.0
    total = sum(layer(hidden).sum() for layer in layers)
    calls = 0
    original = torch.distributed.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        total.backward()
    finally:
        torch.distributed.all_reduce = original
    return calls


def test_readers_of_one_tensor_share_one_all_reduce() -> None:
    assert run_distributed(2, _count_reductions) == [1, 1]


def _broken_reduction() -> None:
    from parallel import layers

    original = layers.all_reduce_
    layers.all_reduce_ = lambda tensor, axis, **kwargs: original(torch.zeros_like(tensor), axis, **kwargs)
    try:
        _all_checks()
    finally:
        layers.all_reduce_ = original


def test_a_missing_reduction_is_seen() -> None:
    with pytest.raises(WorkerError, match="not close"):
        run_distributed(2, _broken_reduction)


def test_weight_gradients_can_be_held_and_run_later() -> None:
    sink = WeightGradients()
    layer = ColumnParallelLinear(D, M, weight_gradients=sink, dtype=torch.float64)
    x = _tensor(3, D, seed=1).requires_grad_()
    with sink.hold() as held:
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and len(held) == 1
    for work in held:
        work()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(M, D))


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_activation() -> None:
    layer = RowParallelLinear(D, M, bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(3, D, requires_grad=True)
    y = layer(x)
    assert all(saved is None or saved is layer.weight for saved in y.grad_fn.saved_tensors)
    y.sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_gradients_accumulate_into_main_grad_where_it_exists() -> None:
    layer = ColumnParallelLinear(D, M, dtype=torch.bfloat16)
    layer.weight.main_grad = torch.ones(M, D)
    layer(torch.ones(2, D, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad, torch.full((M, D), 3.0))


def test_shards_are_balanced_and_may_be_empty() -> None:
    assert shard_sizes(13, 4) == [4, 3, 3, 3]
    assert shard_sizes(2, 4) == [1, 1, 0, 0]
    layer = ColumnParallelLinear(D, 2, tp=Axis("tp"), bias=True)
    assert layer.weight.shape == (2, D)
