"""The shapes of a student that meet a budget of parameters (`student.prune.target_params`).

Decides which shapes are worth a look; which of them is best, an evaluation of the cut models says (`distill.candidates`).
Parameters are counted by what their dims run over, a tied head once. A grid over depth, residual width and query groups
is laid, and the feed-forward width is solved for, since the count is linear in it: the widest multiple of 64 (of 32, where
64 misses the budget) that stays below. A shape meets the budget with at most the target and at least 97 % of it, or with
the most that its multiples allow below it.

Published experience (Muralidharan et al. 2024, Minitron) prefers cutting width to cutting depth for what a student reaches
after training, and warns of losing many layers at once. So depth stays at two thirds or more, and of each of a few depths,
evenly spread from the teacher's own down, first the shape whose widths shrink most alike is taken (least sum of squared
logarithms of the shares that stay), then the one that takes most from the feed-forward width, which costs least before
training, then others. Targets that the user sets are fixed, and the rest is searched.

Works on configs alone, reads no weights.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill.budget import budget_of
from distill.config import ConfigError
from distill.cut_config import accepts
from distill.shape import (
    Shape,
    Steps,
    resolve_ffn,
    resolve_groups,
    resolve_hidden,
    resolve_layers,
    resolve_shape,
    widths,
)
from distill.structure import Layout, Sizes, Widths, layout_of
from distill.student_config import Prune
from parallel.model import build_meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MET = 0.97
"""Share of the target that a shape must reach where the multiples allow."""
_SHALLOWEST, _NARROWEST, _THINNEST = 2 / 3, 1 / 4, 1 / 8
"""Shares of the depth, of the residual width and the query groups, and of the feed-forward width that stay at least."""
_PREFERRED_MULTIPLE = 64
_MOST_WIDTHS = 16
"""Residual widths that are looked at."""


@dataclass(frozen=True)
class Candidate:
    """A shape and the parameters that a student of it has."""

    shape: Shape
    num_parameters: int


class Counter:
    """Counts the parameters of students of one teacher.

    Raises:
        ConfigError: the teacher's layers are not alike.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._sizes = Sizes.of(config)
        layouts = [
            layout_of(name, tuple(parameter.shape), self._sizes)
            for name, parameter in build_meta_model(config).named_parameters()
        ]
        self._outside = [each for each in layouts if each.layer is None]
        self._first = [each for each in layouts if each.layer == 0]
        alike = [
            [each.dims for each in layouts if each.layer == layer] == [each.dims for each in self._first]
            for layer in range(self._sizes.layers)
        ]
        if self._sizes.by_layer or not all(alike):
            raise ConfigError(
                "student.prune.target_params needs a teacher whose layers are alike; set the student's sizes instead"
            )

    def line(self, *, hidden: int, groups: int) -> tuple[int, int, int]:
        """Return (a, b, c) of the count a + layers * (b + c * feed-forward width)."""

        def total(layouts: list[Layout], ffn: int) -> int:
            sizes = replace(self._sizes.with_widths([Widths(ffn, groups)]), hidden=hidden)
            return sum(math.prod(sum(map(sizes.width, parts)) for parts in each.dims) for each in layouts)

        without = total(self._first, 0)
        return total(self._outside, 0), without, total(self._first, 1) - without

    def __call__(self, *, hidden: int, ffn: int, groups: int, layers: int) -> int:
        """Return the parameters of a student, tied ones once."""
        outside, without, channel = self.line(hidden=hidden, groups=groups)
        return outside + layers * (without + channel * ffn)


def candidate_shapes(
    config: PretrainedConfig, prune: Prune, *, tp: int, fewest_layers: int = 1
) -> list[Candidate]:
    """Return the shapes to choose the student's from, the first of which changes the teacher's proportions least.

    Args:
        config: the teacher's.
        prune: the keys; without `target_params` they say one shape.
        tp: tensor-parallel size that the student must divide by.
        fewest_layers: layers that the pipeline needs.
    Returns:
        At most `prune.candidates` shapes, the deepest first.
    Raises:
        ConfigError: nothing meets the budget or the other keys.
    """
    if prune.target_params is None:
        shape = resolve_shape(config, prune, tp=tp)
        return [Candidate(shape, 0)]
    count = Counter(config)
    sizes = Sizes.of(config)
    whole = count(hidden=sizes.hidden, ffn=sizes.ffn, groups=sizes.groups, layers=sizes.layers)
    target = budget_of(prune.target_params, whole)
    if target >= whole:
        raise ConfigError(
            f"student.prune.target_params={prune.target_params} must be less than the teacher's {whole:,}"
        )
    found = list(_grid(config, sizes, prune, count, target, tp=tp, fewest_layers=fewest_layers))
    return [_candidate(sizes, prune, each, tp) for each in _spread(sizes, _met(prune, found, target), prune)]


@dataclass(frozen=True)
class _Point:
    """One point of the grid."""

    hidden: int
    ffn: int
    groups: int
    layers: int
    num_parameters: int


def _grid(
    config: PretrainedConfig,
    sizes: Sizes,
    prune: Prune,
    count: Counter,
    target: int,
    *,
    tp: int,
    fewest_layers: int,
) -> Iterator[_Point]:
    """Yield, for each depth, residual width and number of groups, the widest that stays below the target and the next one."""
    fixed = resolve_layers(prune, sizes.layers)
    depth = len(fixed) if fixed is not None else prune.num_layers
    shallowest = max(math.ceil(_SHALLOWEST * sizes.layers), fewest_layers)
    depths = [depth] if depth is not None else range(shallowest, sizes.layers + 1)
    for hidden, groups in _residuals(config, sizes, prune, tp):
        thinnest = max(prune.min_channels, _THINNEST * sizes.ffn)
        all_ffn = [each for each in widths(sizes.ffn, tp)[0] if each >= thinnest] + [sizes.ffn]
        if prune.intermediate_size is not None:
            all_ffn = [resolve_ffn(sizes, prune, tp)]
        outside, without, channel = count.line(hidden=hidden, groups=groups)
        for layers in depths:
            most = ((target - outside) // layers - without) // channel
            place = bisect_right(all_ffn, most)
            chosen = all_ffn[place - 1 : place + 1] if place else all_ffn[:1]
            preferred = most // _PREFERRED_MULTIPLE * _PREFERRED_MULTIPLE
            reached = outside + layers * (without + channel * preferred)
            if place and preferred in all_ffn and reached >= _MET * target:
                chosen[0] = preferred
            for ffn in chosen:
                yield _Point(hidden, ffn, groups, layers, outside + layers * (without + channel * ffn))


def _residuals(config: PretrainedConfig, sizes: Sizes, prune: Prune, tp: int) -> Iterator[tuple[int, int]]:
    """Yield the residual widths and numbers of query groups that go together."""
    heads_given = prune.num_attention_heads is not None or prune.num_key_value_heads is not None
    all_groups = [*range(tp, sizes.groups, tp), sizes.groups]
    if heads_given:
        # A residual width that is searched is fitted to the heads, not the heads to the teacher's.
        free = replace(prune, hidden_size=prune.hidden_size or sizes.hidden)
        all_groups = [resolve_groups(config, sizes, free, tp)]
    below, _ = widths(sizes.hidden, tp)
    step = below.step * math.ceil(len(below) / _MOST_WIDTHS)
    for groups in all_groups:
        if prune.hidden_size is not None:
            yield resolve_hidden(config, sizes, prune, tp, groups), groups
            continue
        if groups < _NARROWEST * sizes.groups and not heads_given:
            continue
        for hidden in [*range(step, sizes.hidden, step), sizes.hidden]:
            if hidden >= _NARROWEST * sizes.hidden and accepts(config, sizes, hidden, groups):
                yield hidden, groups


def _met(prune: Prune, found: list[_Point], target: int) -> list[_Point]:
    """Return the points that meet the budget."""
    below = [each for each in found if each.num_parameters <= target]
    enough = [each for each in below if each.num_parameters >= _MET * target]
    above = [each for each in found if each.num_parameters > target]
    if enough:
        return enough
    if below and above:
        # The multiples leave a gap here; what fills it best stands for the budget.
        most = max(each.num_parameters for each in below)
        return [each for each in below if each.num_parameters >= _MET * most]
    what = f"student.prune.target_params={prune.target_params} ({target:,} parameters)"
    if not found:
        raise ConfigError(f"{what}: no depth and width fit the other keys of student.prune and the mesh")
    nearest = min(found, key=lambda each: abs(each.num_parameters - target))
    raise ConfigError(
        f"{what} cannot be met with the other keys of student.prune and mesh; the nearest that can be had is "
        f"{nearest.num_parameters:,} (num_layers={nearest.layers}, hidden_size={nearest.hidden}, "
        f"intermediate_size={nearest.ffn}, num_key_value_heads={nearest.groups})"
    )


def _spread(sizes: Sizes, points: list[_Point], prune: Prune) -> list[_Point]:
    """Return a handful of the points, over depths and over ways to shrink at each depth."""
    by_depth = {
        depth: _ways(sizes, [each for each in points if each.layers == depth])
        for depth in sorted({each.layers for each in points}, reverse=True)
    }
    depths, wanted = list(by_depth), prune.candidates
    num_depths = min(len(depths), math.ceil(wanted / 2))
    last = max(1, num_depths - 1)
    spread = list(
        dict.fromkeys(depths[round(place * (len(depths) - 1) / last)] for place in range(num_depths))
    )
    chosen: list[_Point] = []
    for few in (spread, depths):
        for number in range(max(map(len, by_depth.values()))):
            chosen += [by_depth[depth][number] for depth in few if number < len(by_depth[depth])]
    chosen = list(dict.fromkeys(chosen))[:wanted]
    return sorted(chosen, key=lambda each: (-each.layers, by_depth[each.layers].index(each)))


def _ways(sizes: Sizes, points: list[_Point]) -> list[_Point]:
    """Return the points of one depth: the most even one, the one that leans on the feed-forward width, then others."""

    def evenness(point: _Point) -> tuple[float, int]:
        odd = sum(width % _PREFERRED_MULTIPLE != 0 for width in (point.hidden, point.ffn))
        return sum(share**2 for share in _logarithms(sizes, point)) + 0.01 * odd, -point.num_parameters

    def leaning(point: _Point) -> tuple[float, int]:
        hidden, _, groups = _logarithms(sizes, point)
        return hidden**2 + groups**2, -point.num_parameters

    even = sorted(points, key=evenness)
    # Of points that differ in little more than the feed-forward width, one is enough.
    widest: dict[int, _Point] = {}
    for point in even:
        widest.setdefault(point.hidden, point)
    return list(dict.fromkeys([even[0], min(points, key=leaning), *widest.values(), *even]))


def _logarithms(sizes: Sizes, point: _Point) -> tuple[float, float, float]:
    """Return the logarithms of the shares of residual width, feed-forward width and groups that stay."""
    pairs = ((point.hidden, sizes.hidden), (point.ffn, sizes.ffn), (point.groups, sizes.groups))
    hidden, ffn, groups = (math.log(left / full) for left, full in pairs)
    return hidden, ffn, groups


def _candidate(sizes: Sizes, prune: Prune, point: _Point, tp: int) -> Candidate:
    steps = Steps(ffn=widths(sizes.ffn, tp)[0].step, groups=tp, min_channels=prune.min_channels)
    shape = Shape(
        hidden_size=point.hidden,
        intermediate_size=point.ffn,
        num_attention_heads=point.groups * sizes.heads_per_group,
        num_key_value_heads=point.groups,
        num_layers=point.layers,
        layers=resolve_layers(prune, sizes.layers),
        per_layer=steps if prune.per_layer else None,
    )
    return Candidate(shape, point.num_parameters)
