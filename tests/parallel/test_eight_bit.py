"""8-bit moments: read and written back bit for bit, the same wherever ranges are cut, and AdamW but for their rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from parallel.flat_state import Part, Store
from parallel.update_rules import OptimizerOptions, Range, Updater, element_bytes, make_updater

pytest.importorskip("bitsandbytes")
NUMEL = 1024


def _updater(name: str, cuts: list[int], flat: Tensor, gradient: Tensor) -> Updater:
    ranges = []
    for start, stop in itertools.pairwise(cuts):
        parameter = nn.Parameter(flat[start:stop])
        parameter.grad = gradient[start:stop]
        ranges.append(Range(parameter, stop <= 512, slice(start, stop)))
    updater = make_updater(OptimizerOptions(name=name, betas=(0.8, 0.95), weight_decay=0.1), ranges, NUMEL)
    updater.set_rate(0.01)
    return updater


def _gradients(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, NUMEL, generator=generator) * torch.logspace(-4, 0, NUMEL)


def _steps(name: str, cuts: list[int], steps: int = 6) -> tuple[Tensor, dict[str, Store], int]:
    flat, gradient = torch.ones(NUMEL), torch.zeros(NUMEL)
    updater = _updater(name, cuts, flat, gradient)
    for each in _gradients(steps):
        gradient.copy_(each)
        updater.optimizer.step()
    return flat, updater.stores, sum(store.nbytes for store in updater.stores.values())


def test_eight_bits_are_adamw_but_for_rounding_wherever_ranges_are_cut() -> None:
    values, stores, nbytes = _steps("adamw8bit", [0, 512, 1024])
    exact, full, full_bytes = _steps("adamw", [0, 512, 1024])
    assert nbytes < 0.26 * full_bytes and nbytes == NUMEL * element_bytes(
        OptimizerOptions(name="adamw8bit"), torch.float32
    )
    assert 0 < (values - exact).abs().max() < 0.2 * (exact - 1).abs().max()
    everything = slice(0, NUMEL)
    for kind, store in stores.items():
        found, wanted = store.read(everything), full[kind].read(everything)
        assert (found - wanted).norm() < 0.1 * wanted.norm()
    cut, others, _ = _steps("adamw8bit", [0, 256, 512, 768, 1024])
    assert torch.equal(cut, values)
    assert all(
        torch.equal(others[kind].read(everything), store.read(everything)) for kind, store in stores.items()
    )


def test_a_fresh_rule_goes_on_with_the_state_and_the_count_of_another() -> None:
    flats, gradients = ([torch.full((NUMEL,), value) for _ in range(2)] for value in (1.0, 0.0))
    whole, fresh = (
        _updater("adamw8bit", [0, 512, 1024], flat, gradient)
        for flat, gradient in zip(flats, gradients, strict=True)
    )
    first, second, third = _gradients(3)
    for each in (first, second):
        gradients[0].copy_(each)
        whole.optimizer.step()
    flats[1].copy_(flats[0])
    everything = slice(0, NUMEL)
    for kind, store in fresh.stores.items():
        store.write(everything, whole.stores[kind].read(everything).clone())
    fresh.set_updates(2)
    assert fresh.num_updates == 2
    for gradient, updater in zip(gradients, (whole, fresh), strict=True):
        gradient.copy_(third)
        updater.optimizer.step()
    assert torch.equal(*flats)
    for kind, store in fresh.stores.items():
        assert torch.equal(store.read(everything), whole.stores[kind].read(everything)), kind


def test_what_is_read_is_written_back_bit_for_bit() -> None:
    from parallel.eight_bit import EightBitStore

    generator = torch.Generator().manual_seed(1)
    for signed in (True, False):
        store = EightBitStore(NUMEL, signed=signed, device=torch.device("cpu"))
        assert not store.read(slice(0, NUMEL)).any()
        values = torch.randn(NUMEL, generator=generator) * torch.logspace(-6, 2, NUMEL)
        # The largest of a block is negative in some of them, and one block is all zero.
        values[:256] = 0
        store.write(slice(0, NUMEL), values if signed else values.abs())
        numbers = store.read(slice(0, NUMEL)).clone()
        codes, scales = store.codes.clone(), store.scales.clone()
        for _ in range(3):
            store.write(slice(0, NUMEL), store.read(slice(0, NUMEL)).clone())
        assert torch.equal(store.read(slice(0, NUMEL)), numbers) and torch.equal(store.scales, scales)
        assert torch.equal(store.codes[256:], codes[256:]) and not numbers[:256].any()
        part = Part(3, 300, store, 256)
        part.write(part.read().clone())
        assert torch.equal(store.read(slice(0, NUMEL)), numbers), "a part whose last block holds more"
        store.zero_()
        assert not store.read(slice(0, NUMEL)).any()


def test_parts_begin_with_blocks() -> None:
    from parallel.eight_bit import EightBitStore

    store = EightBitStore(NUMEL, signed=True, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="does not begin with a block"):
        store.read(slice(7, 256))
    with pytest.raises(AssertionError, match="not whole blocks"):
        EightBitStore(100, signed=True, device=torch.device("cpu"))
