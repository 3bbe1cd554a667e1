"""The shape of a pruned student: from the keys of `student.prune` to a smaller transformers config.

Decides how targets are rounded and what a bare `pruning_ratio` means. Rounding goes to the nearest size, up at a tie,
among the sizes that fit: residual and feed-forward widths are multiples of 32 (below that, GGUF quantisation falls
back and files grow) and of tp; heads go in whole query groups, a multiple of tp of them; and the family's config class
accepts the result (Llama's and Gemma 2's refuse a hidden size that is not a multiple of the heads, even with head_dim
set). A target of the teacher's own size cuts nothing and is taken as it is; a target that would only round to it is an
error. Widths of 32 and less, as in tests, go by multiples of 8 instead. The head width is never changed, because rotary
positions live in it. With `per_layer` the targets are means over the layers: each layer's own width is a multiple of the
same numbers, and which layers get more is the scores' choice (`distill.prune`).

Works on configs alone, reads no weights, and knows nothing of importance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distill.config import ConfigError
from distill.cut_config import accepts, student_config
from distill.kept import Kept
from distill.structure import Sizes, Widths
from distill.student_config import Prune

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WIDTH_MULTIPLE = 32
_SMALL_WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class Steps:
    """What the widths of single layers are multiples of, and how far a layer may go down; None for what is not cut."""

    ffn: int | None
    groups: int | None
    min_channels: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a student, under the names of the config keys; a layer of the teacher that is narrower stays as it is."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_layers: int
    layers: tuple[int, ...] | None
    """The teacher's layers to keep, where they are named; None leaves the choice to their scores."""
    per_layer: Steps | None = None
    """Set where layers get widths of their own: feed-forward width and heads are then means over the layers."""


def resolve_shape(config: PretrainedConfig, prune: Prune, *, tp: int) -> Shape:
    """Return the student's shape that `student.prune` asks for.

    Targets win: with any of num_layers, layers, hidden_size, intermediate_size, num_attention_heads and
    num_key_value_heads set, exactly these are cut and `pruning_ratio` plays no part. Without a target, `pruning_ratio` is
    the share of feed-forward channels to remove, never fewer than `min_channels` left: of the cuts measured without
    training this one costs least, while depth, width and heads are cut only when asked for.

    Args:
        config: the teacher's.
        prune: the keys; their types and ranges are already checked (`distill.checks`).
        tp: tensor-parallel size that the student must divide by.
    Raises:
        ConfigError: a target is out of range, cannot be met, or would round to the teacher's own size.
    """
    sizes = Sizes.of(config)
    layers = resolve_layers(prune, sizes.layers)
    if prune.per_layer:
        sizes = _mean(sizes)
    groups = resolve_groups(config, sizes, prune, tp)
    cuts_ffn = prune.intermediate_size is not None or not prune.sizes
    cuts_groups = prune.num_attention_heads is not None or prune.num_key_value_heads is not None
    steps = Steps(
        ffn=widths(sizes.ffn, tp)[0].step if cuts_ffn else None,
        groups=tp if cuts_groups else None,
        min_channels=prune.min_channels,
    )
    return Shape(
        hidden_size=resolve_hidden(config, sizes, prune, tp, groups),
        intermediate_size=resolve_ffn(sizes, prune, tp),
        num_attention_heads=groups * sizes.heads_per_group,
        num_key_value_heads=groups,
        num_layers=len(layers) if layers is not None else prune.num_layers or sizes.layers,
        layers=layers,
        per_layer=steps if prune.per_layer else None,
    )


def _mean(sizes: Sizes) -> Sizes:
    """Return the sizes of a decoder whose layers all have the mean width."""
    if not sizes.by_layer:
        return sizes
    means = (round(sum(each) / sizes.layers) for each in zip(*sizes.by_layer, strict=True))
    return sizes.with_widths([Widths(*means)] * sizes.layers)


def _nearest(
    what: str, target: float, full: int, candidates: Iterable[int], why: str, fits: Callable[[int], bool]
) -> int:
    """Return the fitting candidate nearest to the target; `what` and `why` are the message's words."""
    if target == full:
        return full
    if not 0 < target < full:
        raise ConfigError(f"{what} must be between 1 and the teacher's {full}")
    fitting = (
        size for size in sorted(candidates, key=lambda size: (abs(size - target), -size)) if fits(size)
    )
    best = next(fitting, None)
    if best is None:
        raise ConfigError(f"{what}: nothing smaller than the teacher's {full} is {why}")
    if full - target <= abs(best - target):
        others = sorted([best, *(size for size, _ in zip(fitting, range(3), strict=False))])
        raise ConfigError(
            f"{what} would round to the teacher's own {full}, which cuts nothing; use {full} or one that is {why}: "
            + ", ".join(map(str, others))
        )
    return best


def widths(full: int, tp: int) -> tuple[range, str]:
    """Return the widths below `full` that may be cut to, and the words for them."""
    multiple = math.lcm(_WIDTH_MULTIPLE, tp)
    if multiple >= full:
        multiple = math.lcm(_SMALL_WIDTH_MULTIPLE, tp)
    return range(multiple, full, multiple), f"a multiple of {multiple} (mesh.tp={tp})"


def resolve_layers(prune: Prune, num_layers: int) -> tuple[int, ...] | None:
    """Return the layers that the user names, None if it does not; arguments and errors as `resolve_shape`."""
    if prune.layers is not None:
        layers = tuple(prune.layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
            raise ConfigError(
                f"student.prune.layers={list(layers)} must name layers of the teacher to keep, 0 to {num_layers - 1}, "
                "each once, ascending"
            )
        if prune.num_layers not in (None, len(layers)):
            raise ConfigError(
                f"student.prune.num_layers={prune.num_layers} but student.prune.layers names {len(layers)}; set one of them"
            )
        return layers
    if prune.num_layers is not None and not 1 <= prune.num_layers <= num_layers:
        raise ConfigError(
            f"student.prune.num_layers={prune.num_layers} must be between 1 and the teacher's {num_layers}"
        )
    return None


def resolve_groups(config: PretrainedConfig, sizes: Sizes, prune: Prune, tp: int) -> int:
    """Return the number of query groups that the keys ask for; arguments and errors as `resolve_shape`."""
    heads, groups, share = prune.num_attention_heads, prune.num_key_value_heads, sizes.heads_per_group
    if heads is None and groups is None:
        return sizes.groups
    if heads is not None and groups is not None and heads != groups * share:
        raise ConfigError(
            f"student.prune.num_attention_heads={heads} with num_key_value_heads={groups}: the teacher has {share} query "
            f"heads to a key/value head and whole groups are cut; use {groups * share} with {groups}, or set one of them"
        )
    # The unit of the search is the key that the user set.
    key, target, unit = (
        ("num_attention_heads", heads, share) if heads is not None else ("num_key_value_heads", groups, 1)
    )
    assert target is not None

    def fits(size: int) -> bool:
        # A hidden size that is a target itself is fitted to the heads afterwards.
        return prune.hidden_size is not None or accepts(config, sizes, sizes.hidden, size // unit)

    why = f"whole groups of {share} query heads, a multiple of mesh.tp={tp} of them"
    why += (
        ""
        if prune.hidden_size is not None
        else f", and taken by {type(config).__name__} with hidden_size={sizes.hidden}"
    )
    full = sizes.groups * unit
    return (
        _nearest(f"student.prune.{key}={target}", target, full, range(tp * unit, full, tp * unit), why, fits)
        // unit
    )


def resolve_hidden(config: PretrainedConfig, sizes: Sizes, prune: Prune, tp: int, groups: int) -> int:
    """Return the residual width that the keys ask for with `groups` query groups; else as `resolve_shape`."""
    if prune.hidden_size is None:
        return sizes.hidden
    candidates, why = widths(sizes.hidden, tp)
    why += f" taken by {type(config).__name__} with {groups * sizes.heads_per_group} query heads"
    what = f"student.prune.hidden_size={prune.hidden_size}"
    hidden = _nearest(
        what,
        prune.hidden_size,
        sizes.hidden,
        candidates,
        why,
        lambda size: accepts(config, sizes, size, groups),
    )
    if not accepts(config, sizes, hidden, groups):
        raise ConfigError(f"{what} is not {why}")
    return hidden


def resolve_ffn(sizes: Sizes, prune: Prune, tp: int) -> int:
    """Return the feed-forward width that the keys ask for; arguments and errors as `resolve_shape`."""
    candidates, why = widths(sizes.ffn, tp)
    if prune.intermediate_size is not None:
        target: float = prune.intermediate_size
        what = f"student.prune.intermediate_size={target}"
        if target < prune.min_channels:
            raise ConfigError(f"{what} is less than student.prune.min_channels={prune.min_channels}")
    elif not prune.sizes:
        target = sizes.ffn * (1 - prune.pruning_ratio)
        what = f"student.prune.pruning_ratio={prune.pruning_ratio} ({target:.0f} of {sizes.ffn} feed-forward channels)"
    else:
        return sizes.ffn
    why += f" and at least student.prune.min_channels={prune.min_channels}"
    return _nearest(what, target, sizes.ffn, candidates, why, lambda size: size >= prune.min_channels)


def planned_config(config: PretrainedConfig, shape: Shape) -> PretrainedConfig:
    """Return the config of a student of this shape before it is known which units it keeps.

    Layers that are to have widths of their own have the mean one.

    Raises:
        ConfigError: as `student_config`.
    """
    # Which units does not matter for sizes; these are as good as any.
    layers = shape.layers or tuple(range(shape.num_layers))
    own = {layer: Sizes.of(config).at(layer) for layer in layers}
    kept = Kept(
        hidden=torch.arange(shape.hidden_size),
        ffn={layer: torch.arange(min(shape.intermediate_size, own[layer].ffn)) for layer in layers},
        groups={layer: torch.arange(min(shape.num_key_value_heads, own[layer].groups)) for layer in layers},
        layers=layers,
    )
    return student_config(config, kept)
