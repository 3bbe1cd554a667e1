"""From a model family's published tensor-parallel plan to our parallel layers.

transformers publishes, for about 120 families, a plan (module name pattern -> style). This file turns each style into a
layer of `parallel.layers` (or the embedding) and says clearly when a family uses a style, or a module class, that is not known. Linears
that the plan leaves out are computed whole on every rank, by the same layer class with an axis of one, so that their
weight gradients too can be scheduled apart. The plan names a factored linear by its dense name; `parallel.factored` says
which styles its factors get. It holds no table of families.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from parallel.embedding import VocabParallelEmbedding
from parallel.factored import STYLES_OF_FACTORS, FactoredLinear
from parallel.layers import SINGLE, ColumnParallelLinear, RowParallelLinear, WeightGradients
from parallel.mesh import Axis

STYLES = (
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "rowwise_split_input",
    "embedding_rowwise",
    "replicated_with_grad_allreduce",
)


class UnsupportedModel(ValueError):
    """A model family uses something that Reflux does not know; the message names the module and the thing."""


def style_of(name: str, plan: dict[str, str]) -> str | None:
    """Return the plan's style for a module name (`*` in the plan stands for one index or name), or None."""
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name):
            return style
    return None


def _embedding_scale(module: nn.Embedding, name: str) -> float:
    """Return the factor a family's embedding class applies; nn.Embedding applies none."""
    if type(module) is nn.Embedding:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is None:
        raise UnsupportedModel(f"module {name}: embedding class {type(module).__name__} is not known")
    # The family keeps the factor in a float32 buffer; in float64 the rounding would show.
    return torch.tensor(scale, dtype=torch.float32).item()


def _parallel_linear(
    linear: nn.Linear, style: str | None, tp: Axis, gradients: WeightGradients
) -> ColumnParallelLinear | RowParallelLinear:
    sizes = (linear.in_features, linear.out_features)
    bias, dtype = linear.bias is not None, linear.weight.dtype
    if style in ("rowwise", "rowwise_split_input"):
        return RowParallelLinear(
            *sizes,
            bias=bias,
            tp=tp,
            input_is_parallel=style == "rowwise",
            weight_gradients=gradients,
            device="meta",
            dtype=dtype,
        )
    return ColumnParallelLinear(
        *sizes,
        bias=bias,
        tp=SINGLE if style is None else tp,
        gather_output=style == "colwise_gather_output",
        weight_gradients=gradients,
        device="meta",
        dtype=dtype,
    )


def _replacement(
    name: str, module: nn.Module, style: str | None, tp: Axis, gradients: WeightGradients
) -> nn.Module | None:
    if style is not None and style not in STYLES:
        raise UnsupportedModel(
            f"module {name}: tensor-parallel style {style!r} is not known; known: {', '.join(STYLES)}"
        )
    if isinstance(module, nn.Identity):
        return None
    if isinstance(module, (nn.Linear, FactoredLinear)) and style not in STYLES_OF_FACTORS:
        raise UnsupportedModel(f"module {name}: style {style!r} on a linear is not known")
    if isinstance(module, nn.Linear):
        return _parallel_linear(module, style, tp, gradients)
    if isinstance(module, FactoredLinear):
        first, second = STYLES_OF_FACTORS[style]
        return FactoredLinear(
            _parallel_linear(module.first, first, tp, gradients),
            _parallel_linear(module.second, second, tp, gradients),
        )
    if isinstance(module, nn.Embedding):
        return VocabParallelEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            scale=_embedding_scale(module, name),
            tp=tp if style == "embedding_rowwise" else SINGLE,
            weight_gradients=gradients,
            device="meta",
            dtype=module.weight.dtype,
        )
    if style == "replicated_with_grad_allreduce":
        for parameter in module.parameters():
            parameter.tp_partial_grad = tp.size > 1
        return None
    if style is not None:
        raise UnsupportedModel(f"module {name}: style {style!r} on a {type(module).__name__} is not known")
    return None


def parallelize(model: nn.Module, plan: dict[str, str], tp: Axis, gradients: WeightGradients) -> None:
    """Replace every linear and embedding of a meta-device model in place by its parallel layer.

    Args:
        model: a causal LM on the meta device; modules keep their names.
        plan: module name pattern -> style, as `model._tp_plan` publishes it (base model and head).
        tp: the axis.
        gradients: the stage's sink for weight-gradient work.
    Raises:
        UnsupportedModel: unknown style or embedding class; a family that publishes no plan (when tp is longer than 1).
    """
    if tp.size > 1 and not plan:
        raise UnsupportedModel(f"{type(model).__name__} publishes no tensor-parallel plan; use mesh.tp=1")
    factors = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
        for part in ("first", "second")
    }
    for name, module in list(model.named_modules()):
        if name in factors:
            continue
        new = _replacement(name, module, style_of(name, plan), tp, gradients)
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
