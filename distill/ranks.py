"""Which linears of a student are factored, and to which ranks.

Decides by `student.low_rank`: the linears by name, their ranks by one of three wishes. Singular values are those of the
matrix that is cut (whitened or not), energy is their square, as a share of its own matrix's: matrices write into streams of
other scales, and only shares compare.

    ratio     r = ratio * in * out / (in + out), so that the factors hold that share of the matrix's parameters
    energy    the least r that keeps that share of the matrix's energy
    params    every matrix gets half the rank of an even ratio; then blocks of singular values over all matrices, the ones
              with most energy for a parameter first, until the whole student has that many; a matrix that is taken to
              its end stays dense

A few loud directions can hold nearly all energy of a matrix whose quiet ones matter too. Measured on SmolLM2's feed-forward
matrices at 114.2 M parameters, without training: perplexity 30.4 with one ratio for all, 35.0 with `params`, 41.9 if
`params` had no least rank, 86.2 if energies were not shares; so `ratio` is the first choice for shrinking a whole model evenly.

Ranks are multiples of 8 and of tp (matrix units like them, and shards are then equal); for tp 1, 2, 4 and 8 they do not depend
on tp. Factors that would hold no less than their matrix leave it dense. Assumes a dense student; knows no weights.
Source: Wang et al. 2024 (SVD-LLM); Yuan et al. 2023 (ASVD) for ranks that differ between matrices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from distill.config import ConfigError
from distill.convert import either, show
from distill.structure import MATRICES, Unit
from distill.student_config import LowRank
from parallel.factored import ranks_of
from parallel.model import build_meta_model, stage_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LEAST = 0.5
"""Share of an even ratio's rank that a budget leaves every matrix."""


@dataclass(frozen=True)
class Target:
    """One linear that is to be factored."""

    layer: int
    module: str
    """Name inside the layer, such as mlp.down_proj."""
    name: str
    """Name inside the model, such as model.layers.3.mlp.down_proj."""
    out_features: int
    in_features: int

    @property
    def dense(self) -> int:
        """Parameters of the matrix."""
        return self.out_features * self.in_features

    @property
    def per_rank(self) -> int:
        """Parameters of the factors for each rank."""
        return self.out_features + self.in_features

    def largest_rank(self, step: int) -> int:
        """Return the largest multiple of `step` at which the factors are smaller than the matrix; 0 if there is none."""
        return (self.dense - 1) // self.per_rank // step * step


@dataclass(frozen=True)
class Targets:
    """The linears to factor, and what the whole model holds without it."""

    linears: tuple[Target, ...]
    num_parameters: int


def rank_step(tp: int) -> int:
    """Return what ranks are multiples of."""
    return math.lcm(8, tp)


def find_targets(wanted: LowRank, model_config: PretrainedConfig, *, tp: int) -> Targets:
    """Return the linears that `wanted` names, in the order of layers and modules.

    Args:
        model_config: the student's, dense.
        tp: ranks that share each matrix.
    Raises:
        ConfigError: a layer or a module that is not there, a linear that holds several matrices, a student that is
            factored already, or a number of parameters out of reach.
    """
    if ranks_of(model_config):
        raise ConfigError(
            "student.low_rank: the student is factored already; leave ratio, params and energy null, or give a student "
            "that was exported with export.low_rank=merged"
        )
    model = build_meta_model(model_config)
    names = stage_names(model)
    layers = getattr(getattr(model, names.base), names.layers)
    for layer in wanted.layers or ():
        if layer >= len(layers):
            raise ConfigError(
                f"student.low_rank.layers={show(wanted.layers)} names layer {layer}, but the student's are 0 to "
                f"{len(layers) - 1}"
            )
    linears = []
    for index, layer in enumerate(layers):
        if wanted.layers is not None and index not in wanted.layers:
            continue
        for module, linear in _chosen(wanted.modules, layer, model_config.model_type):
            name = f"{names.base}.{names.layers}.{index}.{module}"
            linears.append(Target(index, module, name, linear.out_features, linear.in_features))
    targets = Targets(tuple(linears), sum(each.numel() for each in model.parameters()))
    if wanted.params is not None:
        _check_reachable(wanted.params, targets, rank_step(tp))
    return targets


def _chosen(wanted: str | tuple[str, ...], layer: nn.Module, family: str) -> list[tuple[str, nn.Linear]]:
    """Return the linears of a layer that the setting names, refusing those that hold several matrices."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    if wanted == "ffn":
        names = [name for name in linears if any(Unit.FFN in side for side in MATRICES.get(name, ()))]
    elif wanted == "attention":
        names = [name for name in linears if name in MATRICES and name.startswith("self_attn.")]
    else:
        names = list(wanted)
    missing = [name for name in names if name not in linears]
    if missing or not names:
        what = f" names {missing[0]}, which" if missing else ", which"
        raise ConfigError(
            f"student.low_rank.modules={show(wanted)}{what} the layers of {family} do not have; use {either(linears)}"
        )
    whole = [name for name in linears if len(MATRICES.get(name, ((), ()))[0]) <= 1]
    for name in names:
        if name not in whole:
            raise ConfigError(
                f"student.low_rank.modules={show(wanted)}: {name} of {family} holds several matrices in one; use "
                f"{either(f'[{other}]' for other in whole)}"
            )
    return [(name, linears[name]) for name in linears if name in names]


def _check_reachable(params: int, targets: Targets, step: int) -> None:
    least = targets.num_parameters
    for target in targets.linears:
        if target.largest_rank(step):
            least += step * target.per_rank - target.dense
    if not least <= params < targets.num_parameters:
        raise ConfigError(
            f"student.low_rank.params={params} is out of reach: with these modules and layers the student has at least "
            f"{least} parameters, and {targets.num_parameters} when nothing is factored; use a number between"
        )


def choose_ranks(
    wanted: LowRank, targets: Targets, singular_values: Mapping[str, Tensor], *, tp: int
) -> dict[str, int]:
    """Return the rank of every linear that is factored, by its name; the others stay dense.

    Args:
        wanted: exactly one of ratio, params and energy is given.
        singular_values: of each target, descending, float64; `ratio` does not look at them.
    """
    step = rank_step(tp)
    if wanted.params is not None:
        ranks = _share_out(wanted.params, targets, singular_values, step)
    elif wanted.energy is not None:
        ranks = {
            target.name: step * math.ceil(_rank_for(wanted.energy, singular_values[target.name]) / step)
            for target in targets.linears
        }
    else:
        assert wanted.ratio is not None, "nothing is asked for"
        ranks = {
            target.name: step * max(1, round(wanted.ratio * target.dense / target.per_rank / step))
            for target in targets.linears
        }
    most = {target.name: target.largest_rank(step) for target in targets.linears}
    return {name: rank for name, rank in ranks.items() if rank <= most[name]}


def _shares(singular_values: Tensor) -> Tensor:
    """Return the share of the energy that the first r singular values hold, for r = 1 to all."""
    energies = singular_values.square()
    total = energies.sum()
    # A matrix of zeros loses nothing at any rank.
    return energies.cumsum(0) / total if total > 0 else energies + 1


def _rank_for(energy: float, singular_values: Tensor) -> int:
    return int((_shares(singular_values) < energy).sum()) + 1


def _blocks(target: Target, singular_values: Tensor, floor: int, step: int) -> list[tuple[float, int]]:
    """Return (energy, parameters) of each block of singular values from `floor` on, the last one being the dense rest."""
    shares = [0.0, *_shares(singular_values).tolist()]
    most = target.largest_rank(step)
    blocks = [
        (shares[rank + step] - shares[rank], step * target.per_rank) for rank in range(floor, most, step)
    ]
    return [*blocks, (1.0 - shares[most], target.dense - most * target.per_rank)]


def _share_out(
    params: int, targets: Targets, singular_values: Mapping[str, Tensor], step: int
) -> dict[str, int]:
    """Give blocks of ranks to the matrix that gains most for a parameter, as long as the number of parameters allows."""
    linears: Sequence[Target] = [target for target in targets.linears if target.largest_rank(step)]
    room = params - targets.num_parameters + sum(each.dense for each in linears)
    floors = _floors(room, linears, step)
    left = room - sum(floor * each.per_rank for floor, each in zip(floors, linears, strict=True))
    blocks = [
        _blocks(target, singular_values[target.name], floor, step)
        for floor, target in zip(floors, linears, strict=True)
    ]
    taken = [0] * len(linears)
    queue = [(-each[0][0] / each[0][1], index) for index, each in enumerate(blocks)]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        cost = blocks[index][taken[index]][1]
        if cost > left:
            continue
        left -= cost
        taken[index] += 1
        if taken[index] < len(blocks[index]):
            energy, cost = blocks[index][taken[index]]
            heapq.heappush(queue, (-energy / cost, index))
    return {
        target.name: floors[index] + step * taken[index]
        for index, target in enumerate(linears)
        if taken[index] < len(blocks[index])
    }


def _floors(room: int, linears: Sequence[Target], step: int) -> list[int]:
    """Return the rank that each matrix has at least: half of what an even ratio gives it, if that fits at all."""
    ratio = room / sum(each.dense for each in linears)
    floors = [max(step, int(_LEAST * ratio * each.dense / each.per_rank) // step * step) for each in linears]
    if sum(floor * each.per_rank for floor, each in zip(floors, linears, strict=True)) <= room:
        return floors
    return [step] * len(linears)
