from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

import distill.balance
import parallel.model
from distill.balance import split_models
from distill.config import Config, Data, Loss, MeshShape, Train
from distill.profiling import measure, samples, scaled
from parallel.mesh import Axis
from parallel.model import build_meta_model, build_stage
from parallel.pipeline.partition import Layers
from tests.families import tiny_config

CONFIG = Config(
    mesh=MeshShape(pp=2, dp=1, tp=1),
    data=Data(seq_len=128),
    train=Train(global_batch_size=4, dtype="float32"),
)
STUDENT = tiny_config(
    "llama",
    hidden_size=256,
    head_dim=32,
    intermediate_size=768,
    num_hidden_layers=6,
    max_position_embeddings=256,
)
TEACHER = tiny_config(
    "qwen3",
    hidden_size=256,
    head_dim=32,
    intermediate_size=1536,
    num_hidden_layers=4,
    max_position_embeddings=256,
)


def median_s(work: Callable[[], object]) -> float:
    """Seconds of the middle one of some repetitions."""
    times_s = []
    for _ in range(7):
        start_s = time.process_time()
        work()
        times_s.append(time.process_time() - start_s)
    return statistics.median(times_s)


def test_parts_add_up_to_a_real_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    # The time that this process gets does not depend on what else the machine does.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    stage = build_stage(STUDENT, pp=Axis("stage", 2, 0), tp=Axis("tp"), owned=range(6))
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids_BS, positions_BS = torch.zeros(1, 128, dtype=torch.long), torch.arange(128)[None]
    output = stage(ids_BS, positions_BS)
    grad = torch.ones_like(output)

    def ratios() -> list[float]:
        profile = measure(CONFIG, TEACHER, STUDENT)
        assert [len(getattr(profile, name).layer_s) for name in ("forward", "step", "teacher")] == [6, 6, 4]
        others = (profile.backward_input.last_s, profile.teacher.first_s, profile.step.last_s)
        assert min(others) > 0
        forward_s = profile.call_s + profile.forward.first_s + sum(profile.forward.layer_s)
        input_s, weight_s = sum(profile.backward_input.layer_s), sum(profile.backward_weight.layer_s)
        return [
            forward_s / median_s(lambda: stage(ids_BS, positions_BS)),
            (input_s + weight_s) / median_s(lambda: torch.autograd.backward(output, grad, retain_graph=True)),
            # About 1: both parts are real work.
            weight_s / input_s,
        ]

    for _ in range(4):
        seen = ratios()
        if all(0.75 < ratio < 1.35 for ratio in seen[:2]) and 0.2 < seen[2] < 5:
            return
    pytest.fail(f"measured parts are {seen} of the whole")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_every_family_recomputation_and_dtype(recompute: str) -> None:
    for index, family in enumerate(("llama", "gemma2", "granite", "starcoder2")):
        dtype = "bfloat16" if index % 2 else "float64"
        config = replace(
            CONFIG,
            data=Data(seq_len=4),
            loss=Loss(alpha=1.0 if index == 0 else 0.5),
            train=replace(CONFIG.train, dtype=dtype, recompute=recompute, microbatch_size=2),
        )
        profile = measure(config, tiny_config("qwen3"), tiny_config(family))
        parts = [getattr(profile, each.name) for each in fields(profile)]
        assert all(min(part.layer_s) > 0 for part in parts if isinstance(part, Layers)), family
        split_models(config, tiny_config("qwen3"), tiny_config(family), profile=profile)


def test_layers_of_different_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wide layer among six, as a config of each layer's own would make it."""

    def with_a_wide_layer(config: PretrainedConfig) -> PreTrainedModel:
        model = build_meta_model(config)
        if config.model_type == "llama":
            wide = tiny_config("llama", hidden_size=256, head_dim=32, intermediate_size=3072)
            model.model.layers[4] = build_meta_model(wide).model.layers[0]
        return model

    monkeypatch.setattr(time, "perf_counter", time.process_time)
    monkeypatch.setattr(distill.balance, "build_meta_model", with_a_wide_layer)
    monkeypatch.setattr(parallel.model, "build_meta_model", with_a_wide_layer)
    profile = measure(CONFIG, TEACHER, STUDENT)
    narrow_s, wide_s = profile.student.layer_s[0], profile.student.layer_s[4]
    assert wide_s > 1.5 * narrow_s
    assert profile.student.layer_s == pytest.approx([narrow_s] * 4 + [wide_s] + [narrow_s])


def test_layers_that_are_not_measured_are_scaled_from_the_nearest() -> None:
    counted = [10.0, 20.0, 30.0, 10.0, 50.0, 40.0, 48.0]
    assert samples(counted) == [0, 5, 4]
    measured = {0: 1.0, 5: 3.0, 4: 5.0}
    assert scaled(measured, counted) == pytest.approx([1.0, 2.0, 2.25, 1.0, 5.0, 3.0, 4.8])
    assert samples([7.0] * 3) == [0] and scaled({0: 0.5}, [7.0] * 3) == [0.5] * 3
