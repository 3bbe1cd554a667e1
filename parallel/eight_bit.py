"""AdamW with 8-bit moments: bitsandbytes' block-wise rule over flat ranges. The only file that imports bitsandbytes.

Decides that a moment is stored as bitsandbytes has it, a code for each element and a scale for each block of 256, and read
and written as float32, so that checkpoints are those of AdamW and fit every layout. Blocks are never cut: ranges and
parameters start on multiples of 256 elements. The code book of the first moment begins with -1 in place of
bitsandbytes' -0.993: then the largest magnitude of a block is its scale whatever its sign, and numbers that are read and
written again are the same codes, bit for bit.

Source: Dettmers et al. 2022 (8-bit optimizers via block-wise quantization); bitsandbytes 0.50.
"""

from __future__ import annotations

from collections.abc import Sequence

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import Tensor

from parallel.flat_state import Store
from parallel.update_rules import OptimizerOptions, Range, groups_of

BLOCK = 256
"""Elements that share a scale, in bitsandbytes' rule."""


class EightBitStore:
    """A flat buffer of 8-bit codes.

    Args:
        numel: a multiple of `BLOCK`.
        signed: whether there are numbers below 0.
    """

    def __init__(self, numel: int, *, signed: bool, device: torch.device) -> None:
        assert numel % BLOCK == 0, f"{numel} elements are not whole blocks"
        self.book = functional.create_dynamic_map(signed=signed).to(device)
        if signed:
            self.book[0] = -1
        self.codes = torch.zeros(numel, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(numel // BLOCK, dtype=torch.float32, device=device)
        self.zero_()

    def read(self, where: slice) -> Tensor:
        """Return the numbers of a range that begins with a block, float32."""
        blocks = _blocks(where)
        return self._numbers(blocks).flatten()[: where.stop - where.start]

    @torch.no_grad()
    def write(self, where: slice, values: Tensor) -> None:
        """Replace the numbers of a range that begins with a block; what else its last block has stays."""
        blocks = _blocks(where)
        numbers = self._numbers(blocks)
        numbers.flatten()[: where.stop - where.start].copy_(values)
        scales = numbers.abs().amax(dim=1)
        # Nearest codes, which bitsandbytes' table on a CPU does not always find for numbers far below the scale.
        scaled = numbers / scales.masked_fill(scales == 0, 1)[:, None]
        codes = torch.bucketize(scaled, (self.book[1:] + self.book[:-1]) / 2)
        self.codes[_elements(blocks)].copy_(codes.flatten())
        self.scales[blocks].copy_(scales)

    def zero_(self) -> None:
        """Set everything to 0."""
        self.codes.fill_(int(self.book.abs().argmin()))
        self.scales.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scales.nbytes

    def _numbers(self, blocks: slice) -> Tensor:
        """Return the numbers of whole blocks, [blocks, 256]."""
        codes = self.codes[_elements(blocks)].view(-1, BLOCK).long()
        return self.book[codes] * self.scales[blocks, None]


def _blocks(where: slice) -> slice:
    assert where.start % BLOCK == 0, f"{where} does not begin with a block"
    return slice(where.start // BLOCK, -(-where.stop // BLOCK))


def _elements(blocks: slice) -> slice:
    return slice(blocks.start * BLOCK, blocks.stop * BLOCK)


class _AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' rule, on a GPU in the order of the current stream.

    Its kernels run on the default stream whatever the current one is, and its own `step` waits for the whole device after each
    range, also for messages that are to be taken only after this update.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all ranges, whose gradients and states are there."""
        assert closure is None
        device = self.param_groups[0]["params"][0].device
        current = default = None
        if device.type == "cuda":
            current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
            default.wait_stream(current)
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self.update_step(group, parameter, number, place)
        if current is not None and default is not None:
            current.wait_stream(default)


class EightBitUpdater:
    """bitsandbytes' `AdamW8bit` over ranges of flat buffers.

    On a CPU it rounds a moment of 0 to the code next to 0 when others of its block are not 0.

    Args:
        numel: length of the state's buffers, all zero at first.
    """

    keeps_zero = False

    def __init__(self, options: OptimizerOptions, ranges: Sequence[Range], numel: int) -> None:
        device = ranges[0].parameter.device
        first = EightBitStore(numel, signed=True, device=device)
        second = EightBitStore(numel, signed=False, device=device)
        self.stores: dict[str, Store] = {"exp_avg": first, "exp_avg_sq": second}
        self.num_updates = 0
        self.optimizer = _AdamW8bit(
            groups_of(ranges, options.weight_decay), lr=0.0, betas=options.betas, eps=options.eps
        )
        self._states = [self.optimizer.state[each.parameter] for each in ranges]
        for state, each in zip(self._states, ranges, strict=True):
            blocks = _blocks(each.place)
            state["step"] = 0
            for number, store in ((1, first), (2, second)):
                state[f"state{number}"] = store.codes[each.place]
                state[f"absmax{number}"] = store.scales[blocks]
                state[f"qmap{number}"] = store.book

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def set_updates(self, count: int) -> None:
        """Tell the rule how many updates its state has seen."""
        self.num_updates = count
        for state in self._states:
            state["step"] = count
