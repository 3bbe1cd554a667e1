"""How runs lie in DeepSpeed's groups; what it makes of them is compared in `tests/equivalence/test_engines.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.buckets import ALIGNED, lay_out, runs
from parallel.deepspeed_engine import _place
from parallel.flat import FlatBuffers
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.weights import parameter_table
from tests.families import tiny_config


@pytest.mark.parametrize("size", [1, 3])
def test_each_run_is_in_one_group_and_partitions_are_whole_blocks(size: int) -> None:
    dp = Axis("dp", size)
    mesh = replace(Mesh.single(), gradients=replace(Mesh.single().gradients, dp=dp))
    stage = build_stage(tiny_config("qwen3"), pp=Axis("pp"), tp=Axis("tp"))
    chunks = lay_out([parameter_table(stage)], mesh.tp, 1, num_parts=size)
    buffers = FlatBuffers(chunks, torch.device("cpu"))
    seen = []
    for decays in (False, True):
        at = 0
        for each in _place(buffers, mesh, decays=decays):
            assert each.start == at and each.group == decays
            at = each.stop
            if each.run is not None:
                assert each.run.decays == decays
                assert each.parameter.data_ptr() == buffers.flat[each.run.start :].data_ptr()
                assert each.parameter.numel() == each.run.stop - each.run.start
                seen.append(each.run)
            else:
                assert not each.parameter.any()
        assert at % (ALIGNED * size) == 0
    assert sorted(seen) == list(runs(chunks, mesh.tp))
