"""The transformers config of a pruned student.

Decides how sizes are written so that the family's config class takes them: the head width is spelt out when hidden size /
heads no longer says it, what lists something for each layer is cut with the layers, and layers of different widths become
`per_layer_config`. Every shape that the cut gives is compared with those of the student's own modules. Works on configs
and on the meta device, reads no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from distill.config import ConfigError
from distill.kept import Kept
from distill.structure import Sizes, cut_shape, layout_of, student_name
from parallel.model import build_meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WIDTH_KEYS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
MODELING_FILE = "modeling_layerwise.py"
"""Code beside a student whose layers differ: transformers 5.23 has no own for most families (`parallel.layerwise`)."""
MODELING_CLASS = "LayerwiseForCausalLM"
AUTO_MAP = {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{MODELING_CLASS}"}


def _resized(config: PretrainedConfig, sizes: Sizes, **changes: Any) -> PretrainedConfig:
    """Return a config with other sizes and the teacher's head width. Raises what the config class raises."""
    values = {"per_layer_config": None, **config.to_dict(), **changes}
    if values["per_layer_config"] is None:
        values.pop("allow_global_per_layer_attribute_access", None)
        # Code that came with the teacher is not copied.
        values.pop("auto_map", None)
    derived = values["hidden_size"] // values["num_attention_heads"]
    if "head_dim" in values or derived != sizes.head_width:
        values["head_dim"] = sizes.head_width
    return type(config).from_dict(values)


def accepts(config: PretrainedConfig, sizes: Sizes, hidden: int, groups: int) -> bool:
    """Return whether the family's config class takes this hidden size with this many query groups."""
    heads = {"num_attention_heads": groups * sizes.heads_per_group, "num_key_value_heads": groups}
    try:
        _resized(config, sizes, hidden_size=hidden, per_layer_config=None, **heads)
    except (StrictDataclassError, ValueError):
        return False
    return True


def _cut_layer_lists(values: dict[str, Any], layers: tuple[int, ...], num_layers: int) -> dict[str, Any]:
    """Return the config entries that list something for each layer, cut to the layers kept."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if "layer" not in key or not isinstance(value, list) or not value:
            continue
        if len(value) != num_layers:
            raise ConfigError(
                f"student.prune: cannot cut layers, the teacher's config.{key} does not list {num_layers}"
            )
        changes[key] = [value[layer] for layer in layers]
    if values.get("max_window_layers") is not None:
        changes["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in layers)
    return changes


def student_config(config: PretrainedConfig, kept: Kept) -> PretrainedConfig:
    """Return the config of the student that keeps `kept`, checked against the shapes of all parameters.

    Layers of different widths are written as `per_layer_config`, beside the common values that the widest layer has.

    Args:
        config: the teacher's.
        kept: what of it stays.
    Raises:
        ConfigError: the family's config class refuses the sizes, or its model does not have the shapes of the cut.
    """
    sizes = Sizes.of(config)
    after = sizes.after(kept)
    values = config.to_dict()
    changes: dict[str, Any] = {
        "hidden_size": after.hidden,
        "intermediate_size": after.ffn,
        "num_attention_heads": after.heads,
        "num_key_value_heads": after.groups,
        "num_hidden_layers": after.layers,
    }
    if after.layers < sizes.layers:
        changes |= _cut_layer_lists(values, kept.layers, sizes.layers)
    changes |= _own_widths(config, sizes, after, kept.layers)
    try:
        student = _resized(config, sizes, **changes)
    except (StrictDataclassError, ValueError) as error:
        raise ConfigError(
            f"student.prune: {type(config).__name__} refuses the student: {error.__cause__ or error}"
        ) from error
    _check_parameters(build_meta_model(config), build_meta_model(student), sizes, kept)
    return student


def _own_widths(
    config: PretrainedConfig, sizes: Sizes, after: Sizes, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Return the config entries by which the student's layers differ."""
    known = config.to_dict().get("per_layer_config") or {}
    known = {int(layer): values for layer, values in known.items()}
    heads_differ = len({each.groups for each in after.by_layer}) > 1
    own: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        widths = after.at(index)
        own[index] = {key: value for key, value in known.get(layer, {}).items() if key not in _WIDTH_KEYS}
        if widths.ffn != after.ffn:
            own[index]["intermediate_size"] = widths.ffn
        if widths.groups != after.groups:
            own[index] |= {"num_attention_heads": widths.heads, "num_key_value_heads": widths.groups}
    changes: dict[str, Any] = {"per_layer_config": {layer: values for layer, values in own.items() if values}}
    if not changes["per_layer_config"]:
        return {"per_layer_config": None}
    changes["auto_map"] = AUTO_MAP
    if not heads_differ:
        return changes
    # Llama's, Gemma's and Phi's classes compare the common number of heads with other sizes when they are read. The
    # layers' own numbers are not theirs to compare, so that any common number that they take will do.
    fitting = [
        groups for groups in range(after.groups, 0, -1) if accepts(config, sizes, after.hidden, groups)
    ]
    common = next(iter(fitting), after.groups)
    for index, values in own.items():
        widths = after.at(index)
        values |= {"num_attention_heads": widths.heads, "num_key_value_heads": widths.groups}
    return changes | {
        "per_layer_config": own,
        "num_attention_heads": common * sizes.heads_per_group,
        "num_key_value_heads": common,
        "head_dim": sizes.head_width,
        "allow_global_per_layer_attribute_access": True,
    }


def _check_parameters(teacher: PreTrainedModel, student: PreTrainedModel, sizes: Sizes, kept: Kept) -> None:
    expected = {
        new_name: cut_shape(layout_of(name, tuple(parameter.shape), sizes), sizes, kept)
        for name, parameter in teacher.named_parameters()
        if (new_name := student_name(name, kept)) is not None
    }
    actual = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise ConfigError(
                f"student.prune: the student's {name} is {expected.get(name)} after the cut, "
                f"but {type(student).__name__} has {actual.get(name)}"
            )
