"""What all recorders share: which positions count, and hooks that do not stay behind."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from distill.data import IGNORE, MicroBatch
from distill.recording import Recorder

LABELS = torch.tensor([[5, IGNORE, 7], [IGNORE, IGNORE, 3]])


class Inputs(Recorder):
    """Keeps the rows that a module reads."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen: list[Tensor] = []

    def __enter__(self) -> Self:
        self._hooks.append(self.module.register_forward_pre_hook(self._look))
        return self

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen.append(self._rows(args[0]))


def test_positions_with_a_label_count_in_float32_at_least() -> None:
    module, x_BSK = nn.Identity(), torch.arange(12.0).view(2, 3, 2)
    with Inputs(module) as inputs:
        inputs.look_at(MicroBatch(LABELS, LABELS, LABELS))
        module(x_BSK.bfloat16())
        module(x_BSK.double())
    module(x_BSK)
    expected = torch.tensor([[0.0, 1.0], [4.0, 5.0], [10.0, 11.0]])
    assert [each.dtype for each in inputs.seen] == [torch.float32, torch.float64]
    assert all(torch.equal(each.float(), expected) for each in inputs.seen)


def test_hooks_are_gone_after_an_error_too() -> None:
    module = nn.Identity()
    with pytest.raises(AssertionError, match="was not called before the forward"), Inputs(module):
        module(torch.zeros(2, 3, 2))
    assert not module._forward_pre_hooks
