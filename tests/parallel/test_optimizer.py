"""The flat optimizer against torch's AdamW and clip_grad_norm_, and the learning rate's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.optimizer import AdamWOptions, LearningRate, NonFiniteGradient, StageOptimizer
from parallel.weights import load_weights
from tests.families import save_tiny, tiny_config, tiny_model

OPTIONS = AdamWOptions(betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3, clip=0.05)
RATE = LearningRate(peak=0.01, warmup_steps=2, total_steps=6)


def _stage(tmp_path: Path, dtype: torch.dtype):
    config = tiny_config("qwen3", tie_word_embeddings=True)
    save_tiny(tmp_path, config)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=dtype)
    load_weights(stage, tmp_path)
    return config, stage


def test_five_steps_equal_torch_with_clipping_active(tmp_path: Path) -> None:
    config, stage = _stage(tmp_path, torch.float64)
    optimizer = StageOptimizer.of_stage(stage, Mesh.single(), OPTIONS, RATE)
    model = tiny_model(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIONS.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=OPTIONS.betas,
        eps=OPTIONS.eps,
    )
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9).expand(2, 9)
    for step in range(5):
        optimizer.zero_grad()
        stage.head(stage(ids, positions)).sin().sum().backward()
        optimizer.reduce()
        norm = optimizer.norm()
        rate = optimizer.step(step, norm)
        optimizer.gather()

        reference.zero_grad()
        model(input_ids=ids, use_cache=False).logits.sin().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        assert expected > OPTIONS.clip
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for (entry, views), _ in zip(optimizer.state(), range(1000), strict=False):
        assert torch.equal(views["weight"], entry.parameter)
        torch.testing.assert_close(
            entry.parameter.detach(), model.get_parameter(entry.name).detach(), rtol=1e-9, atol=1e-12
        )


def test_bf16_parameters_follow_a_float32_master(tmp_path: Path) -> None:
    _, stage = _stage(tmp_path, torch.bfloat16)
    optimizer = StageOptimizer.of_stage(stage, Mesh.single(), OPTIONS, LearningRate(1e-5, 0, 10))
    before = optimizer.master.clone()
    for step in range(3):
        optimizer.zero_grad()
        optimizer.flat_grad.fill_(0.01)
        optimizer.step(step, optimizer.norm())
        optimizer.gather()
    assert optimizer.flat_grad.dtype == optimizer.master.dtype == torch.float32
    assert not torch.equal(optimizer.master, before)
    assert torch.equal(optimizer.flat, optimizer.master.bfloat16())


def test_a_gradient_that_is_not_finite_ends_the_step(tmp_path: Path) -> None:
    _, stage = _stage(tmp_path, torch.float32)
    optimizer = StageOptimizer.of_stage(stage, Mesh.single(), OPTIONS, RATE)
    optimizer.flat_grad[3] = float("nan")
    before = optimizer.master.clone()
    with pytest.raises(NonFiniteGradient, match="step 8"):
        optimizer.step(7, optimizer.norm())
    assert torch.equal(optimizer.master, before)


def test_learning_rate_warms_up_and_decays() -> None:
    rate = LearningRate(1.0, warmup_steps=4, total_steps=14, schedule="cosine", min_ratio=0.1)
    assert [rate.at(step) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert rate.at(9) == pytest.approx(0.55)
    assert rate.at(14) == rate.at(100) == pytest.approx(0.1)
    assert LearningRate(1.0, 0, 10, "linear").at(5) == pytest.approx(0.5)
    assert LearningRate(1.0, 0, 10, "constant").at(9) == 1.0
