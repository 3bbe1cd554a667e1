"""Factored linears against the dense matrices that they make: outputs, every gradient, and the way back to one matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from parallel.factored import CONFIG_KEY, factorise_linears, merge_factors
from parallel.mesh import Axis, Mesh
from parallel.model import build_meta_model, build_stage
from parallel.plan import UnsupportedModel
from parallel.weights import export_weights, gather_tensor, load_weights, parameter_table
from tests.families import factored_config, save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

IDS = torch.tensor([[5, 17, 33, 2, 9, 61, 80, 96], [7, 7, 8, 2, 44, 51, 0, 4]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], list(range(8))])
# All styles of a linear, with and without biases; ranks that tp divides and one that it does not.
RANKS = {
    "llama": {"self_attn.q_proj": 8, "self_attn.o_proj": 8, "mlp.up_proj": 7, "mlp.down_proj": 8},
    "qwen3": {"self_attn.k_proj": 8, "mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.down_proj": 5},
    "phi3": {"self_attn.qkv_proj": 8, "self_attn.o_proj": 7, "mlp.down_proj": 8},
}


def _dense(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the dense model whose matrices are the products of the factors, and the factored model's tensors."""
    tensors = {name: each.detach() for name, each in tiny_model(_config(family)).named_parameters()}
    dense = tiny_model(tiny_config(family))
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(".second.weight"):
            linear = name.removesuffix(".second.weight")
            state[f"{linear}.weight"] = tensor @ tensors[f"{linear}.first.weight"]
        elif not name.endswith(".first.weight"):
            state[name.replace(".second.bias", ".bias")] = tensor
    dense.load_state_dict(state)
    return dense, tensors


def _config(family: str):
    return factored_config(family, RANKS[family])


def _reference(family: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients by the chain rule: dL/dsecond = G first^T, dL/dfirst = second^T G, G = dL/dW."""
    dense, tensors = _dense(family)
    logits = dense(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    logits.sin().sum().backward()
    of_dense = {name: each.grad for name, each in dense.named_parameters()}
    grads = {}
    for name in tensors:
        linear, _, which = name.removesuffix(".weight").rpartition(".")
        if name.endswith(".second.bias"):
            grads[name] = of_dense[name.replace(".second.bias", ".bias")]
        elif which == "second":
            grads[name] = of_dense[f"{linear}.weight"] @ tensors[f"{linear}.first.weight"].T
        elif which == "first":
            grads[name] = tensors[f"{linear}.second.weight"].T @ of_dense[f"{linear}.weight"]
        else:
            grads[name] = of_dense[name]
    return logits.detach(), grads


def _run(folders: dict[str, str], tp: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    mesh = Mesh.create(pp=1, dp=1, tp=tp) if tp > 1 else Mesh.single()
    results = {}
    for family, folder in folders.items():
        for recompute in ("none", "selective", "full"):
            stage = build_stage(
                _config(family), pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, recompute=recompute
            )
            load_weights(stage, Path(folder))
            logits = stage.transform(stage.head(stage(IDS, POSITIONS)))
            logits.sin().sum().backward()
            grads = {}
            for entry in parameter_table(stage):
                grad = entry.parameter.grad
                if entry.tp_partial_grad:
                    torch.distributed.all_reduce(grad, group=mesh.tp.group)
                grads[entry.name] = gather_tensor(grad, entry)
                sharded = entry.shard is not None or ".first." not in entry.name
                assert tp == 1 or sharded, f"{entry.name} is whole on every rank"
            results[f"{family}, {recompute}"] = logits.detach(), grads
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("factored")
    return {family: str(save_tiny(root / family, _config(family))) for family in RANKS}


@pytest.mark.parametrize(
    "tp", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_factors_compute_and_learn_what_their_matrix_does(tp: int, folders: dict[str, str]) -> None:
    results = run_distributed(tp, _run, folders, tp) if tp > 1 else [_run(folders, tp)]
    for family in RANKS:
        logits, grads = _reference(family)
        # The norms compute in float32 even here, and the product of the factors is rounded at another place.
        near = {"rtol": 1e-6, "atol": 1e-7}
        for rank in results:
            for recompute in ("none", "selective", "full"):
                mine, my_grads = rank[f"{family}, {recompute}"]
                torch.testing.assert_close(mine, logits, **near)
                assert my_grads.keys() == grads.keys()
                for name, grad in my_grads.items():
                    torch.testing.assert_close(
                        grad, grads[name], **near, msg=lambda m, f=family, n=name: f"{f} {n}: {m}"
                    )


def _merge(folder: str, target: str) -> None:
    mesh = Mesh.create(pp=1, dp=1, tp=2)
    stage = build_stage(_config("llama"), pp=mesh.pp, tp=mesh.tp, dtype=torch.float64)
    load_weights(stage, Path(folder))
    export_weights([stage], mesh, Path(target), dtype=torch.float64, merge_factors=True)


def test_merging_writes_the_dense_model(folders: dict[str, str], tmp_path: Path) -> None:
    run_distributed(2, _merge, folders["llama"], str(tmp_path))
    expected, _ = _dense("llama")
    stage = build_stage(tiny_config("llama"), pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64)
    load_weights(stage, tmp_path)
    for entry in parameter_table(stage):
        tensor = expected.get_parameter(entry.name).detach()
        torch.testing.assert_close(entry.parameter.detach(), tensor, rtol=1e-13, atol=1e-14)


def test_merging_rounds_the_product_once() -> None:
    first, second, other = torch.randn(8, 64).bfloat16(), torch.randn(64, 8).bfloat16(), torch.zeros(1)
    tensors = {"a.first.weight": first, "b.weight": other, "a.second.weight": second, "a.second.bias": other}
    merged = dict(merge_factors(tensors.items(), {"a"}))
    assert list(merged) == ["b.weight", "a.weight", "a.bias"]
    assert merged["b.weight"] is other and merged["a.bias"] is other
    torch.testing.assert_close(
        merged["a.weight"].double(), second.double() @ first.double(), rtol=0, atol=1e-5
    )


def test_parameters_are_those_of_the_factors() -> None:
    dense, factored = (build_meta_model(each) for each in (tiny_config("llama"), _config("llama")))
    # Three layers: q and o [64, 32] and [32, 64], up [48, 32], down [32, 48].
    saved = 3 * (2 * (64 * 32 - 8 * 96) + (48 * 32 - 7 * 80) + (48 * 32 - 8 * 80))
    counts = [sum(each.numel() for each in model.parameters()) for model in (dense, factored)]
    assert counts[0] - counts[1] == saved


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"model.layers.0.mlp.middle": 8}, r"'model\.layers\.0\.mlp\.middle', which is no linear"),
        ({"model.layers.0.mlp": 8}, r"'model\.layers\.0\.mlp', which is no linear"),
        ({"model.layers.0.mlp.up_proj": 0}, r"up_proj the rank 0; 1 or more"),
        ({"model.layers.0.mlp.up_proj": "8"}, r"up_proj the rank '8'; 1 or more"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(ranks: dict[str, object], words: str) -> None:
    config = tiny_config("llama")
    setattr(config, CONFIG_KEY, ranks)
    with pytest.raises(UnsupportedModel, match=words):
        build_stage(config, pp=Axis("pp"), tp=Axis("tp"))
    with pytest.raises(ValueError, match=words):
        factorise_linears(build_meta_model(tiny_config("llama")), ranks)
