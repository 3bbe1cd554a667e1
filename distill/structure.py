"""What each parameter of a causal LM's decoder means for structured cuts.

Decides, for every dim of every parameter, which units it runs over: residual channels, feed-forward channels, query
heads, key/value heads, the vocabulary, or one head's own width (which is never cut, because rotary positions live in
it). Fused projections are runs of parts: qkv_proj is [query, key/value, key/value], gate_up_proj is [ffn, ffn]. One
table by module name serves all families; where a name has two meanings (q_norm is one head wide in qwen3, all heads
wide in olmo2) the size decides. Assumes the parameter names that transformers publishes. A name or a size that is not
known is an error: nothing is left uncut by chance. Cuts of weights, of later rounds' students and of the optimizer's moments all
go through `layout_of`, so one permutation reaches everything it touches.

Legend: D residual width, M feed-forward width, N query heads, G key/value heads, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distill.config import ConfigError
from distill.kept import Kept
from parallel.factored import ranks_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Unit(Enum):
    """What one part of a dim counts; the value is the word for it in messages."""

    HIDDEN = "residual channels"
    FFN = "feed-forward channels"
    QUERY = "query heads x head width"
    KEY_VALUE = "key/value heads x head width"
    VOCABULARY = "vocabulary"
    HEAD_WIDTH = "head width"


Parts = tuple[Unit, ...]

_HIDDEN, _FFN, _QUERY, _KEY_VALUE, _VOCABULARY = (
    (Unit.HIDDEN,),
    (Unit.FFN,),
    (Unit.QUERY,),
    (Unit.KEY_VALUE,),
    (Unit.VOCABULARY,),
)

MATRICES: dict[str, tuple[Parts, Parts]] = {
    "self_attn.q_proj": (_QUERY, _HIDDEN),
    "self_attn.k_proj": (_KEY_VALUE, _HIDDEN),
    "self_attn.v_proj": (_KEY_VALUE, _HIDDEN),
    "self_attn.qkv_proj": (_QUERY + _KEY_VALUE + _KEY_VALUE, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _QUERY),
    "mlp.gate_proj": (_FFN, _HIDDEN),
    "mlp.up_proj": (_FFN, _HIDDEN),
    "mlp.gate_up_proj": (_FFN + _FFN, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FFN),
    "mlp.c_fc": (_FFN, _HIDDEN),
    "mlp.c_proj": (_HIDDEN, _FFN),
}
"""Linear modules of a layer: what their weight's [out, in] run over; a bias runs over [out]."""
_VECTORS: dict[str, tuple[Parts, ...]] = {
    "input_layernorm": (_HIDDEN,),
    "post_attention_layernorm": (_HIDDEN,),
    "post_self_attn_layernorm": (_HIDDEN,),
    "post_mlp_layernorm": (_HIDDEN,),
    "pre_feedforward_layernorm": (_HIDDEN,),
    "post_feedforward_layernorm": (_HIDDEN,),
    "self_attn.q_norm": ((Unit.HEAD_WIDTH,), _QUERY),
    "self_attn.k_norm": ((Unit.HEAD_WIDTH,), _KEY_VALUE),
}
"""Norms of a layer: weight and bias run over the first of these whose size fits."""
_MATRICES_OUTSIDE: dict[str, tuple[Parts, Parts]] = {
    "embed_tokens": (_VOCABULARY, _HIDDEN),
    "lm_head": (_VOCABULARY, _HIDDEN),
}
_VECTORS_OUTSIDE: dict[str, tuple[Parts, ...]] = {"norm": (_HIDDEN,)}

_IN_LAYER = re.compile(
    r"^(?P<before>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)$"
)


class Widths(NamedTuple):
    """What may differ from layer to layer."""

    ffn: int
    groups: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that structured cuts change, and those that tell its dims apart."""

    hidden: int
    ffn: int
    """Of the widest layer, as are heads and groups."""
    heads: int
    groups: int
    head_width: int
    vocabulary: int
    layers: int
    by_layer: tuple[Widths, ...] = ()
    """Widths of each layer; empty where all layers are alike."""

    @staticmethod
    def of(config: PretrainedConfig) -> Sizes:
        """Read the sizes from a transformers config, whose layers may differ (`per_layer_config`).

        Raises:
            ConfigError: the config lacks one of them, or its layers differ in more than widths or are factored.
        """
        if ranks_of(config):
            raise ConfigError(
                f"student.prune: a {config.model_type} with factored linears cannot be pruned; use one that was exported "
                "with export.low_rank=merged"
            )
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_hidden_layers")
        first, *others = config.per_layer_config if getattr(config, "num_hidden_layers", None) else [config]
        missing = [name for name in names if not isinstance(getattr(first, name, None), int)]
        if missing:
            raise ConfigError(
                f"student.prune: the config of {config.model_type} has no whole number {missing[0]}"
            )
        if not config.is_heterogeneous:
            others = []
        layers = [Sizes._of_layer(each) for each in (first, *others)]
        if any(getattr(each, "skip", None) for each in (first, *others)):
            raise ConfigError(f"student.prune: {config.model_type} whose layers skip parts cannot be pruned")
        if len({(each.hidden, each.heads_per_group, each.head_width) for each in layers}) > 1:
            raise ConfigError(
                f"student.prune: {config.model_type} whose layers differ in residual width, head width or query heads "
                "to a key/value head cannot be pruned"
            )
        if not others:
            return layers[0]
        return layers[0].with_widths([Widths(each.ffn, each.groups) for each in layers])

    @staticmethod
    def _of_layer(config: PretrainedConfig) -> Sizes:
        heads = config.num_attention_heads
        return Sizes(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=heads,
            groups=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
        )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.groups

    def with_widths(self, widths: Sequence[Widths]) -> Sizes:
        """Return the sizes of a decoder with as many layers as `widths` has entries."""
        groups = max(each.groups for each in widths)
        return replace(
            self,
            ffn=max(each.ffn for each in widths),
            heads=groups * self.heads_per_group,
            groups=groups,
            layers=len(widths),
            by_layer=tuple(widths) if len(set(widths)) > 1 else (),
        )

    def at(self, layer: int | None) -> Sizes:
        """Return the sizes as one layer has them; None stands for what lies outside the layers."""
        if layer is None or not self.by_layer:
            return self
        return replace(self.with_widths([self.by_layer[layer]]), layers=self.layers)

    def width(self, unit: Unit) -> int:
        """Return how many entries of a dim a part of this unit takes."""
        return {
            Unit.HIDDEN: self.hidden,
            Unit.FFN: self.ffn,
            Unit.QUERY: self.heads * self.head_width,
            Unit.KEY_VALUE: self.groups * self.head_width,
            Unit.VOCABULARY: self.vocabulary,
            Unit.HEAD_WIDTH: self.head_width,
        }[unit]

    def after(self, kept: Kept) -> Sizes:
        """Return the sizes of the student that `kept` describes."""
        widths = [Widths(len(kept.ffn[layer]), len(kept.groups[layer])) for layer in kept.layers]
        return replace(self.with_widths(widths), hidden=len(kept.hidden))


@dataclass(frozen=True)
class Layout:
    """Where a parameter sits and what its dims run over."""

    layer: int | None
    """Index of the decoder layer; None outside the layers."""
    module: str
    """Name of the module inside the layer (`mlp.down_proj`) or inside the model (`embed_tokens`)."""
    dims: tuple[Parts, ...]


def layout_of(name: str, shape: tuple[int, ...], sizes: Sizes) -> Layout:
    """Return what each dim of a parameter runs over.

    Args:
        name: full parameter name, `model.layers.3.mlp.down_proj.weight`.
        shape: its global shape.
        sizes: of the model that the parameter belongs to.
    Raises:
        ConfigError: the name is not in the table, or the shape does not fit the sizes.
    """
    inside = _IN_LAYER.match(name)
    if inside:
        layer, module, leaf = int(inside["layer"]), inside["module"], inside["leaf"]
        if layer >= sizes.layers:
            raise ConfigError(
                f"student.prune: parameter {name} of the teacher, whose config says {sizes.layers} layers"
            )
        matrices, vectors, sizes = MATRICES, _VECTORS, sizes.at(layer)
    else:
        path, _, leaf = name.rpartition(".")
        layer, module = None, path.removeprefix("model.")
        matrices, vectors = _MATRICES_OUTSIDE, _VECTORS_OUTSIDE
    alternatives: tuple[tuple[Parts, ...], ...] = ()
    if module in matrices:
        alternatives = (matrices[module],) if leaf == "weight" else (matrices[module][:1],)
    elif module in vectors:
        alternatives = tuple((parts,) for parts in vectors[module])
    if not alternatives or leaf not in ("weight", "bias"):
        raise ConfigError(
            f"student.prune: parameter {name} of the teacher is not one that structured pruning knows; "
            "give a ready student as student.model instead"
        )
    for dims in alternatives:
        if tuple(sum(map(sizes.width, parts)) for parts in dims) == tuple(shape):
            return Layout(layer, module, dims)
    words = " x ".join(" + ".join(unit.value for unit in parts) for parts in alternatives[-1])
    raise ConfigError(
        f"student.prune: parameter {name} of the teacher has shape {tuple(shape)}, which is not {words} under {sizes}"
    )


def _spread(units: Tensor, width: int) -> Tensor:
    """Return the entries of a dim that units of `width` consecutive entries cover."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def _kept_of(unit: Unit, layer: int | None, sizes: Sizes, kept: Kept) -> Tensor:
    if unit is Unit.HIDDEN:
        return kept.hidden
    if unit in (Unit.VOCABULARY, Unit.HEAD_WIDTH):
        return torch.arange(sizes.width(unit))
    assert layer is not None, f"{unit} outside the layers"
    if unit is Unit.FFN:
        return kept.ffn[layer]
    heads = sizes.heads_per_group if unit is Unit.QUERY else 1
    return _spread(kept.groups[layer], heads * sizes.head_width)


def kept_entries(layout: Layout, dim: int, sizes: Sizes, kept: Kept) -> Tensor:
    """Return the entries of one dim that stay, int64 ascending.

    Args:
        layout: of a parameter in a layer that is kept, or outside the layers.
        sizes: the teacher's.
    """
    sizes = sizes.at(layout.layer)
    pieces: list[Tensor] = []
    offset = 0
    for unit in layout.dims[dim]:
        pieces.append(_kept_of(unit, layout.layer, sizes, kept) + offset)
        offset += sizes.width(unit)
    return torch.cat(pieces)


def kept_indices(layout: Layout, dim: int, sizes: Sizes, kept: Kept) -> Tensor | None:
    """Return `kept_entries`, or None when all entries of the dim stay."""
    indices = kept_entries(layout, dim, sizes, kept)
    return None if len(indices) == sum(map(sizes.at(layout.layer).width, layout.dims[dim])) else indices


def cut(tensor: Tensor, layout: Layout, sizes: Sizes, kept: Kept) -> Tensor:
    """Return the student's part of a parameter, or of any tensor of its shape (gradient, moment), contiguous.

    Args:
        tensor: the teacher's, global shape.
        layout: `layout_of` the teacher's parameter.
        sizes: the teacher's.
    """
    for dim in range(len(layout.dims)):
        indices = kept_indices(layout, dim, sizes, kept)
        if indices is not None:
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous()


def cut_shape(layout: Layout, sizes: Sizes, kept: Kept) -> tuple[int, ...]:
    """Return the student's shape of a parameter; `sizes` are the teacher's."""
    after = sizes.after(kept).at(None if layout.layer is None else kept.layers.index(layout.layer))
    return tuple(sum(map(after.width, parts)) for parts in layout.dims)


def student_name(name: str, kept: Kept) -> str | None:
    """Return a teacher's parameter name as the student has it (layers renumbered), None if its layer is dropped."""
    inside = _IN_LAYER.match(name)
    if not inside:
        return name
    layer = int(inside["layer"])
    if layer not in kept.layers:
        return None
    return f"{inside['before']}{kept.layers.index(layer)}.{inside['module']}.{inside['leaf']}"


def layer_module(name: str) -> str | None:
    """Return the module of a decoder layer that a parameter belongs to, a key of `MATRICES` if it is a linear's."""
    inside = _IN_LAYER.match(name)
    return inside["module"] if inside else None


def teacher_name(name: str, kept: Kept) -> str:
    """Return a student's parameter name as the teacher has it; the inverse of `student_name`."""
    inside = _IN_LAYER.match(name)
    if not inside:
        return name
    return f"{inside['before']}{kept.layers[int(inside['layer'])]}.{inside['module']}.{inside['leaf']}"
