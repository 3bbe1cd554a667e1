"""Benchmark `tp`: a Llama decoder layer on our parallel layers against the same layer under torch's DTensor.

Both sides run transformers' own `LlamaDecoderLayer` (attention and MLP) with the same weights, forward and backward, on
gloo with one thread a rank. The peer is `torch.distributed.tensor.parallel.parallelize_module` with the plan that
torch's documentation gives for a Llama block. The two alternate, one step each, in one process group; the figure is the
median step time, the slower rank's.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from launch.benchmarks._options import read_options
from parallel.gradients import WeightGradients
from parallel.mesh import Mesh
from parallel.plan import parallelize

_PLAN = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
_CASES = ((64, 2, 32), (128, 4, 64), (512, 4, 256))
"""(hidden size, sequences, tokens in each), as in the trial that set the targets."""


def _layer(config: LlamaConfig) -> LlamaDecoderLayer:
    torch.manual_seed(0)
    return LlamaDecoderLayer(config, 0)


def _ours(config: LlamaConfig, mesh: Mesh) -> nn.Module:
    layer = _layer(config)
    whole = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    parallelize(layer.to("meta"), _PLAN, mesh.tp, WeightGradients())
    layer.to_empty(device="cpu")
    for name, parameter in layer.named_parameters():
        module_name, _, child = name.rpartition(".")
        shard = getattr(layer.get_submodule(module_name), "shards", {}).get(child)
        full = whole[name]
        with torch.no_grad():
            parameter.copy_(
                full if shard is None else full.narrow(shard.dim, shard.start, shard.stop - shard.start)
            )
    return layer


def _dtensor(config: LlamaConfig) -> nn.Module:
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(_layer(config), mesh, {name: styles[style]() for name, style in _PLAN.items()})


def _step(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    x = hidden.clone().requires_grad_()

    def run() -> Tensor:
        layer.zero_grad(set_to_none=False)
        x.grad = None
        # What enters a layer inside a model is the output of the one before, not a leaf.
        layer(x * 1.0, position_embeddings=rotary).square().sum().backward()
        return x.grad

    return run


def _measure(rank: int, world_size: int, store: str, steps: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = Mesh.create(pp=1, dp=1, tp=world_size)
    for hidden_size, sequences, tokens in _CASES:
        config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_attention_heads=8,
            num_key_value_heads=4,
            attn_implementation="sdpa",
        )
        hidden = torch.randn(sequences, tokens, hidden_size, generator=torch.Generator().manual_seed(1))
        rotary = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
        sides = [
            _step(_ours(config, mesh), hidden, rotary),
            _step(_dtensor(copy.deepcopy(config)), hidden, rotary),
        ]
        torch.testing.assert_close(sides[0](), sides[1](), rtol=1e-3, atol=1e-4)
        times: list[list[float]] = [[], []]
        for _ in range(steps):
            for side, run in enumerate(sides):
                dist.barrier()
                start_s = time.perf_counter()
                run()
                elapsed = torch.tensor(time.perf_counter() - start_s)
                dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
                times[side].append(elapsed.item())
        if rank == 0:
            results.append((hidden_size, *(statistics.median(side[2:]) for side in times)))
    dist.destroy_process_group()


@dataclass(frozen=True)
class _Options:
    tp: int = 2
    steps: int = 30


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each hidden size: seconds of forward + backward of ours and of DTensor.

    Args:
        options: `tp` (2) ranks, `steps` (30) repetitions.
    """
    chosen = read_options(_Options, options, least={"tp": 1, "steps": 3})
    world_size, steps = chosen.tp, chosen.steps
    bounds = {64: 0.5, 128: 0.5, 512: 1.0}
    with multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.list()
        multiprocessing.spawn(_measure, (world_size, f"{folder}/store", steps, results), nprocs=world_size)
        return [
            {
                "case": f"decoder layer, hidden {hidden_size}, tp {world_size}, s",
                "ours": ours,
                "peer": peer,
                "peer_name": "torch DTensor",
                "ratio": ours / peer,
                "bound": bounds[hidden_size],
            }
            for hidden_size, ours, peer in results
        ]
