"""Parameters are views of one buffer, their gradients of another, wherever the parameters move."""

from __future__ import annotations

import torch

from parallel.buckets import lay_out
from parallel.flat import FlatBuffers
from parallel.mesh import Axis
from parallel.model import build_stage
from parallel.weights import parameter_table
from tests.families import tiny_config


def test_parameters_and_gradients_are_views() -> None:
    stage = build_stage(tiny_config("llama"), pp=Axis("pp"), tp=Axis("tp"), dtype=torch.bfloat16)
    for entry in parameter_table(stage):
        torch.nn.init.normal_(entry.parameter)
    before = {entry.name: entry.parameter.detach().clone() for entry in parameter_table(stage)}
    buffers = FlatBuffers(lay_out([parameter_table(stage)], Axis("tp"), 1), torch.device("cpu"))
    assert buffers.flat_grad.dtype == buffers.main_dtype == torch.float32 and not buffers.flat_grad.any()
    for slot in buffers.slots:
        parameter = slot.entry.parameter
        assert torch.equal(parameter.detach(), before[slot.entry.name])
        assert parameter.data_ptr() == buffers.flat[slot.start :].data_ptr()
        (parameter * 2).sum().backward()
        assert parameter.grad is None and torch.equal(
            parameter.main_grad, torch.full_like(parameter.main_grad, 2)
        )
        assert parameter.main_grad.data_ptr() == buffers.flat_grad[slot.start :].data_ptr()
    inside = sum(slot.stop - slot.start for slot in buffers.slots)
    assert buffers.flat_grad.sum() == 2 * inside, "the gaps stay zero"
    elsewhere = buffers.flat.clone()
    buffers.move(lambda slot: elsewhere[slot.start : slot.stop])
    assert buffers.flat.numel() == 0
    for slot in buffers.slots:
        assert slot.entry.parameter.data_ptr() == elsewhere[slot.start :].data_ptr()
        assert torch.equal(slot.entry.parameter.detach(), before[slot.entry.name])
