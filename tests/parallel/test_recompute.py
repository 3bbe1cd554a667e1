from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel import layers
from parallel.mesh import Mesh
from parallel.model import build_stage
from parallel.recompute import LinearOutputs, Recompute
from parallel.weights import load_weights, parameter_table
from tests.families import FAMILIES, save_tiny, tiny_config

IDS = torch.arange(3, 19).view(2, 8)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], list(range(8))])


def _train(family: str, folder: Path, mode: Recompute) -> tuple[Tensor, dict[str, Tensor]]:
    mesh = Mesh.single()
    stage = build_stage(tiny_config(family), pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, recompute=mode)
    load_weights(stage, folder)
    hidden = stage(IDS, POSITIONS)
    hidden.sin().sum().backward()
    grads = {entry.name: entry.parameter.grad for entry in parameter_table(stage)}
    return hidden.detach(), {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_run_once_where_only_the_rest_is_recomputed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, tiny_config(family))
    calls: list[int] = []
    linear = layers.F.linear

    def counted(*args: Tensor) -> Tensor:
        calls.append(1)
        return linear(*args)

    monkeypatch.setattr(layers.F, "linear", counted)
    results, counts = {}, {}
    for mode in ("none", "selective", "full"):
        calls.clear()
        results[mode] = _train(family, tmp_path, mode)
        counts[mode] = len(calls)
    assert counts["none"] == counts["selective"] < counts["full"] <= 2 * counts["none"]
    hidden, grads = results["none"]
    for mode in ("selective", "full"):
        assert torch.equal(results[mode][0], hidden)
        assert results[mode][1].keys() == grads.keys()
        assert [name for name, grad in grads.items() if not torch.equal(grad, results[mode][1][name])] == []


def test_outputs_come_back_in_order_and_only_in_a_recomputation() -> None:
    outputs = LinearOutputs()
    first, again = outputs.contexts()
    second, _ = outputs.contexts()
    with first:
        kept = [outputs.output(lambda i=i: torch.full((2,), float(i))) for i in range(3)]
    with second:
        outputs.output(lambda: torch.zeros(2))
    with again:
        assert [outputs.output(lambda: pytest.fail("computed again")).tolist() for _ in range(2)] == [
            tensor.tolist() for tensor in kept[:2]
        ]
    assert outputs.output(lambda: torch.ones(1)).item() == 1


def test_an_output_changed_in_place_is_not_given_out() -> None:
    outputs = LinearOutputs()
    first, again = outputs.contexts()
    with first:
        outputs.output(lambda: torch.ones(2)).add_(1)
    with again, pytest.raises(AssertionError, match="modified in place"):
        outputs.output(lambda: torch.ones(2))
