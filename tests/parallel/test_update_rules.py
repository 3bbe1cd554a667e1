"""Rules over ranges of flat buffers are torch's own on whole parameters, wherever the ranges are cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from parallel.update_rules import RULES, OptimizerOptions, Range, element_bytes, make_updater

OPTIONS = OptimizerOptions(betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, momentum=0.6)
NUMEL, DECAYS = 1024, slice(0, 768)


def _gradient(step: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _in_ranges(
    options: OptimizerOptions, cuts: list[int], steps: int
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return what the steps make of ones, the state, and the updates it has seen."""
    flat, gradient = torch.ones(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    ranges = []
    for start, stop in itertools.pairwise(cuts):
        parameter = nn.Parameter(flat[start:stop])
        parameter.grad = gradient[start:stop]
        ranges.append(Range(parameter, stop <= DECAYS.stop, slice(start, stop)))
    updater = make_updater(options, ranges, NUMEL)
    for step in range(steps):
        gradient.copy_(_gradient(step))
        updater.set_rate(0.01 * (step + 1))
        updater.optimizer.step()
        updater.num_updates += 1
    return (
        flat,
        {kind: store.read(slice(0, NUMEL)) for kind, store in updater.stores.items()},
        updater.num_updates,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("name", RULES)
def test_cuts_change_nothing(name: str, momentum: float) -> None:
    options = replace(OPTIONS, name=name, momentum=momentum)
    rule = RULES[name]
    parameters = [nn.Parameter(torch.ones(768, dtype=torch.float64)), nn.Parameter(torch.ones(256).double())]
    plain = rule.optimizer(
        [
            {"params": [parameter], "weight_decay": decay}
            for parameter, decay in zip(parameters, (OPTIONS.weight_decay, 0.0), strict=True)
        ],
        lr=0.0,
        **rule.settings(options),
    )
    for step in range(4):
        for parameter, gradient in zip(parameters, _gradient(step).split([768, 256]), strict=True):
            parameter.grad = gradient.clone()
        for group in plain.param_groups:
            group["lr"] = 0.01 * (step + 1)
        plain.step()
    expected = torch.cat([parameter.detach() for parameter in parameters])
    assert not torch.equal(expected, torch.ones(NUMEL, dtype=torch.float64))
    for cuts in ([0, 768, 1024], [0, 256, 512, 768, 1024]):
        values, state, num_updates = _in_ranges(options, cuts, 4)
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)
        assert num_updates == 4 and tuple(state) == rule.kinds(options)
        for kind, found in state.items():
            wanted = torch.cat([plain.state[parameter][kind] for parameter in parameters])
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    left = {key for each in plain.state.values() for key, value in each.items() if torch.is_tensor(value)} - {
        "step"
    }
    assert left <= set(rule.kinds(options)), "a checkpoint holds all of the state"


@pytest.mark.parametrize("name", ["adamw", "radam", "sgd"])
def test_updates_that_were_seen_count(name: str) -> None:
    parameter = nn.Parameter(torch.ones(256))
    parameter.grad = torch.ones(256)
    updater = make_updater(replace(OPTIONS, name=name), [Range(parameter, True, slice(0, 256))], 256)
    updater.set_updates(7)
    assert updater.num_updates == 7
    steps = [state["step"].item() for state in updater.optimizer.state.values() if "step" in state]
    assert steps == ([7] if RULES[name].counts else [])


def test_bytes_of_an_element_are_those_that_are_held() -> None:
    parameter = nn.Parameter(torch.ones(256))
    parameter.grad = torch.ones(256)
    for name in RULES:
        options = replace(OPTIONS, name=name)
        updater = make_updater(options, [Range(parameter, True, slice(0, 256))], 256)
        held = sum(store.nbytes for store in updater.stores.values()) / 256
        assert element_bytes(options, torch.float32) == held
        assert element_bytes(options, torch.bfloat16) == held + 4
        assert element_bytes(replace(options, engine="deepspeed"), torch.float32) == held + 4
