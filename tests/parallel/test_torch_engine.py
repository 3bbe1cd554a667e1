"""The norm of a long buffer, and how much state a replica holds."""

from __future__ import annotations

from dataclasses import replace

import torch

from parallel.buckets import ALIGNED
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.torch_engine import square_sum
from parallel.update_rules import OptimizerOptions
from tests.families import tiny_config


def test_the_norm_of_a_long_buffer_is_exact() -> None:
    flat = torch.randn(ALIGNED * 8000, generator=torch.Generator().manual_seed(0))
    exact = flat.double().square().sum()
    torch.testing.assert_close(square_sum(flat), exact, rtol=1e-8, atol=0)
    assert abs(torch.linalg.vector_norm(flat).double() ** 2 - exact) > 1e-6 * exact, "torch's own is not"
    assert torch.equal(square_sum(flat), square_sum(flat))
    assert square_sum(flat[:0]) == 0 and square_sum(torch.full((ALIGNED,), float("nan"))).isnan()


def _state_bytes(dp: Axis, dtype: torch.dtype, stage: int, name: str = "adamw") -> tuple[int, int]:
    """Return the bytes of masters and state, and the elements of the flat buffers."""
    mesh = Mesh.single()
    mesh = replace(mesh, dp=dp, gradients=replace(mesh.gradients, dp=dp))
    model = build_stage(tiny_config("llama"), pp=Axis("pp"), tp=Axis("tp"), dtype=dtype)
    options = OptimizerOptions(name=name, zero_stage=stage)
    optimizer = StageOptimizer.of_stages([model], mesh, options, LearningRate(1e-3, 0, 1))
    return optimizer.state_bytes, optimizer.flat_grad.numel()


def test_a_replica_holds_its_part_of_masters_and_state() -> None:
    for size in (2, 4):
        dp = Axis("dp", size, size - 1)
        whole, numel = _state_bytes(dp, torch.bfloat16, 0)
        assert whole == 12 * numel
        assert _state_bytes(dp, torch.bfloat16, 1) == (whole // size, numel)
        assert _state_bytes(dp, torch.float32, 1) == (8 * numel // size, numel), (
            "parameters are their own masters"
        )
        assert _state_bytes(dp, torch.float32, 1, "sgd") == (4 * numel // size, numel)
