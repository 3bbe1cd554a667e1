"""Linears in two factors: where a config names them, how tensor parallelism cuts them, how they become one matrix again.

    y = (x @ first.T) @ second.T + bias        first [r, in], second [out, r]        dense: out * in, factored: r * (in + out)

A config says it itself: `reflux_low_rank = {"model.layers.3.mlp.down_proj": r, ...}`, so every reader of a folder agrees. The
factors are two linears of the dense layer's own kinds. The pair of styles is decided by what the dense layer has outside:

    dense                  first                  second                 forward                        backward
    colwise                colwise_gather_output  colwise                gather [T, r]                  sum [T, r], sum [T, in]
    colwise_gather_output  colwise_gather_output  colwise_gather_output  gather [T, r], gather [T, out] sum [T, r], sum [T, in]
    rowwise                rowwise                colwise_gather_output  sum [T, r], gather [T, out]    sum [T, r]
    rowwise_split_input    rowwise_split_input    colwise_gather_output  as rowwise                     sum [T, r], gather [T, in]

Both factors are sharded everywhere, so weights, optimizer and products shrink by tp as those of the dense layer do. A
replicated factor would save some of the small messages, but from tp 2 on it would compute more than the dense matrix did
(its share of the work does not shrink), which is what the factors are there to avoid. In units of (tp - 1)/tp * T numbers
sent by a rank (a sum is twice a gather), forward and backward together: colwise 2 in dense, 2 in + 3 r here, the sum over
`in` still shared by all that read the same tensor; rowwise 2 out dense, out + 4 r here, less from r < out / 4 on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from parallel.gradients import main_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_KEY = "reflux_low_rank"
"""Attribute of a model's config: name of a linear -> rank of its factors."""

STYLES_OF_FACTORS: dict[str | None, tuple[str | None, str | None]] = {
    None: (None, None),
    "colwise": ("colwise_gather_output", "colwise"),
    "colwise_gather_output": ("colwise_gather_output", "colwise_gather_output"),
    "rowwise": ("rowwise", "colwise_gather_output"),
    "rowwise_split_input": ("rowwise_split_input", "colwise_gather_output"),
}
"""Style of a dense linear -> styles of its factors."""


class FactoredLinear(nn.Module):
    """A linear of two factors, each a linear of its own (plain, or parallel once the model is cut).

    Args:
        first: in -> r, without bias.
        second: r -> out, with the bias if there is one.
    Shapes: x as `first` takes it -> y as `second` gives it.
    Collectives: those of the two.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Apply both factors."""
        return self.second(self.first(x))


def ranks_of(config: PretrainedConfig) -> dict[str, int]:
    """Return the factored linears of a model by their names, with their ranks; empty for a dense one."""
    return dict(getattr(config, CONFIG_KEY, None) or {})


def factorise_linears(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put two plain linears, with weights of no meaning yet, in the place of each linear that `ranks` names.

    Raises:
        ValueError: a name that is no linear of the model, or a rank that is no whole number of 1 or more.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, rank in ranks.items():
        if name not in linears:
            raise ValueError(
                f"{CONFIG_KEY} of config.json names {name!r}, which is no linear of {type(model).__name__}"
            )
        if type(rank) is not int or rank < 1:
            raise ValueError(
                f"{CONFIG_KEY} of config.json gives {name} the rank {rank!r}; 1 or more is right"
            )
        linear = linears[name]
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        first = nn.Linear(linear.in_features, rank, bias=False, **place)
        second = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **place)
        model.set_submodule(name, FactoredLinear(first, second))


def merge_factors(
    tensors: Iterable[tuple[str, Tensor]], factored: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model with W = second @ first in place of each pair of factors, its bias under the dense name.

    Args:
        tensors: whole, by name; the first factor of a linear comes before its second.
        factored: names of the factored linears.
    Returns:
        The products in float32 at least, for the caller to round once.
    """
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        factor, _, leaf = name.rpartition(".")
        linear, _, which = factor.rpartition(".")
        if linear not in factored:
            yield name, tensor
        elif leaf == "bias":
            yield f"{linear}.bias", tensor
        elif which == "first":
            waiting[linear] = tensor
        else:
            left, right = (each.to(main_dtype(tensor.dtype)) for each in (tensor, waiting.pop(linear)))
            yield f"{linear}.weight", left @ right
    assert not waiting, f"first factors without a second: {sorted(waiting)}"
