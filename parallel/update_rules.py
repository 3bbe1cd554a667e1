"""The rules by which weights are updated: torch's own, and bitsandbytes' AdamW with 8-bit moments, over flat ranges.

Decides: a rule must work element by element, for a rank updates ranges of flat buffers that begin and end anywhere in a
matrix; rules that look at whole matrices are not offered. The state of a rule has one flat buffer for each of its kinds, of
which each range has its part; so what a rule holds, and a checkpoint of it, is known before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from parallel.flat_state import PlainStore, Store
from parallel.gradients import main_dtype


@dataclass(frozen=True)
class OptimizerOptions:
    """Who updates the weights, and the hyperparameters of the rule; weight decay applies to matrices only."""

    name: str = "adamw"
    """A key of `RULES`, or `adamw8bit` (`parallel.eight_bit`)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.9
    clip: float = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""
    engine: str = "torch"
    """`torch` (`parallel.torch_engine`) or `deepspeed` (`parallel.deepspeed_engine`)."""
    zero_stage: int = 1
    """0: every replica has all masters and state; 1: each has its own part; 2: DeepSpeed's reduces gradients to their owners."""
    offload: bool = False
    """Whether DeepSpeed keeps masters and state on the CPU."""


@dataclass(frozen=True)
class Rule:
    """One of torch's rules."""

    optimizer: Callable[..., torch.optim.Optimizer]
    """Takes groups, `lr` and what `settings` returns."""
    kinds: Callable[[OptimizerOptions], tuple[str, ...]]
    """Names of its state's tensors, beside the number of updates."""
    settings: Callable[[OptimizerOptions], dict[str, Any]]
    counts: bool = True
    """Whether it looks at the number of updates."""


def _adam(options: OptimizerOptions) -> dict[str, Any]:
    return {"betas": options.betas, "eps": options.eps}


def _fused_adam(options: OptimizerOptions) -> dict[str, Any]:
    return {**_adam(options), "fused": True}


def _moments(options: OptimizerOptions) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


def _momentum(options: OptimizerOptions) -> tuple[str, ...]:
    return ("momentum_buffer",) if options.momentum else ()


RULES: Mapping[str, Rule] = {
    "adamw": Rule(torch.optim.AdamW, _moments, _fused_adam),
    "adam": Rule(torch.optim.Adam, _moments, _fused_adam),
    "radam": Rule(torch.optim.RAdam, _moments, _adam),
    "adamax": Rule(torch.optim.Adamax, lambda options: ("exp_avg", "exp_inf"), _adam),
    "adagrad": Rule(torch.optim.Adagrad, lambda options: ("sum",), lambda options: {"eps": options.eps}),
    "rmsprop": Rule(
        torch.optim.RMSprop,
        lambda options: ("square_avg", *_momentum(options)),
        lambda options: {"alpha": options.betas[1], "eps": options.eps, "momentum": options.momentum},
    ),
    "sgd": Rule(torch.optim.SGD, _momentum, lambda options: {"momentum": options.momentum}, counts=False),
}
EIGHT_BIT = "adamw8bit"
_EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)
"""Two codes, and their part of the scales of 256 elements."""


class Range(NamedTuple):
    """A part of the flat buffers that is updated in one piece."""

    parameter: nn.Parameter
    """Has its gradient."""
    decays: bool
    """Whether weight decay applies."""
    place: slice
    """Its part of the state's buffers."""


def groups_of(ranges: Sequence[Range], weight_decay: float) -> list[dict[str, Any]]:
    """Return torch's parameter groups: the ranges that decay, and those that do not."""
    groups = [
        {
            "params": [each.parameter for each in ranges if each.decays == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (False, True)
    ]
    return [group for group in groups if group["params"]]


class Updater(Protocol):
    """A rule over ranges of flat buffers, with its state."""

    stores: dict[str, Store]
    """The state by kind."""
    num_updates: int
    """That the state has seen."""
    keeps_zero: bool
    """Whether what is 0, with a state and a gradient of 0, stays exactly 0."""

    optimizer: torch.optim.Optimizer
    """What updates the ranges by their gradients."""

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""

    def set_updates(self, count: int) -> None:
        """Tell the rule how many updates its state has seen."""


class TorchUpdater:
    """One of torch's rules over ranges of flat buffers.

    Args:
        numel: length of the state's buffers, all zero at first.
    """

    keeps_zero = True

    def __init__(self, options: OptimizerOptions, ranges: Sequence[Range], numel: int) -> None:
        rule = RULES[options.name]
        like = ranges[0].parameter
        flats = {kind: like.new_zeros(numel) for kind in rule.kinds(options)}
        self.stores: dict[str, Store] = {kind: PlainStore(flat) for kind, flat in flats.items()}
        self.num_updates = 0
        self._counts: list[Tensor] = []
        self.optimizer = rule.optimizer(
            groups_of(ranges, options.weight_decay), lr=0.0, **rule.settings(options)
        )
        for each in ranges:
            state = {kind: flat[each.place] for kind, flat in flats.items()}
            if rule.counts:
                self._counts.append(torch.zeros((), device=like.device))
                state["step"] = self._counts[-1]
            self.optimizer.state[each.parameter] = state

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def set_updates(self, count: int) -> None:
        """Tell the rule how many updates its state has seen."""
        self.num_updates = count
        for each in self._counts:
            each.fill_(count)


def element_bytes(options: OptimizerOptions, dtype: torch.dtype) -> float:
    """Return the bytes of master and state for each element of parameters of a dtype, all replicas together."""
    main = main_dtype(dtype)
    master = main.itemsize if main != dtype or options.engine == "deepspeed" else 0
    if options.name == EIGHT_BIT:
        return master + _EIGHT_BIT_BYTES
    return master + main.itemsize * len(RULES[options.name].kinds(options))


def make_updater(options: OptimizerOptions, ranges: Sequence[Range], numel: int) -> Updater:
    """Return the rule that the options name, with a state of `numel` elements of each kind."""
    if options.name == EIGHT_BIT:
        from parallel.eight_bit import EightBitUpdater

        return EightBitUpdater(options, ranges, numel)
    return TorchUpdater(options, ranges, numel)
