"""A model's `config.json`: read without trust, and held to numbers that a model can have.

Decides what counts as a causal LM, and the largest sizes that are believed: far above any model there is, so that a slip or a lie
ends in a sentence and not in a request for terabytes. Runs no code that comes with a model unless it is trusted. Whether
the weights are those of the config is `distill.model_shapes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST = {
    "num_hidden_layers": 2_000,
    "hidden_size": 2**18,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
}


def read_model_config(folder: Path, *, trust_remote_code: bool, key: str) -> PreTrainedConfig:
    """Return the configuration of a folder's causal LM.

    Args:
        trust_remote_code: allow a configuration class that comes with the model.
        key: the setting that named the folder, for messages.
    Raises:
        ConfigError: no config.json, one that cannot be read, sizes that no model has, or not a causal LM.
    """
    from transformers import AutoConfig

    raw = _read(folder, key)
    # Before a class of transformers makes lists as long as these say.
    for part in _parts(raw):
        _check_sizes(folder, key, part.get)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        text_config = config.get_text_config()
    except Exception as error:  # the classes of the families check their fields, each in its own way
        hint = ""
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            hint = "; set teacher.trust_remote_code=true if you trust its Python code"
        raise _unreadable(folder, key, error, hint) from error
    _check_kind(folder, key, raw, config, trust_remote_code=trust_remote_code)
    # Where layers differ in width, their common config refuses to tell one.
    for each in text_config.per_layer_config if text_config.is_heterogeneous else [text_config]:
        # Families have other names for them in the file.
        _check_sizes(folder, key, lambda name, each=each: getattr(each, name, None))
    return config


def _read(folder: Path, key: str) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{key}={folder} has no config.json; a Hugging Face model folder is needed")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise _unreadable(folder, key, error) from error
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{key}={folder}: config.json holds a {type(raw).__name__}, not an object; fetch it again"
        )
    names, code = raw.get("architectures") or [], raw.get("auto_map") or {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{key}={folder}: config.json has architectures={names!r}; a list of names is right"
        )
    if not isinstance(code, Mapping):
        raise ConfigError(f"{key}={folder}: config.json has auto_map={code!r}; an object is right")
    return raw


def _unreadable(folder: Path, key: str, error: Exception, hint: str = "") -> ConfigError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(f"{key}={folder}: config.json cannot be read ({reason}){hint}")


def _check_kind(
    folder: Path, key: str, raw: Mapping[str, Any], config: PreTrainedConfig, *, trust_remote_code: bool
) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    architectures = raw.get("architectures") or []
    custom = trust_remote_code and "AutoModelForCausalLM" in (raw.get("auto_map") or {})
    known = set(architectures) & set(CAUSAL.values()) if architectures else config.model_type in CAUSAL
    if not (known or custom):
        kind = ", ".join(architectures) or f"model_type {config.model_type}"
        raise ConfigError(
            f"{key}={folder} is not a causal language model but {kind}; a ...ForCausalLM is needed"
        )


def _parts(raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a config.json that may say sizes: itself, that of the text model, those of single layers."""
    layers = raw.get("per_layer_config")
    for part in (raw, raw.get("text_config"), *(layers.values() if isinstance(layers, Mapping) else ())):
        if isinstance(part, Mapping):
            yield part


def _check_sizes(folder: Path, key: str, size_of: Callable[[str], object]) -> None:
    sizes = {name: size_of(name) for name in _MOST}
    for name, size in sizes.items():
        # Families differ in which they have, and some have a list for the layers.
        if size is None or not isinstance(size, int):
            continue
        if not 1 <= size <= _MOST[name]:
            raise ConfigError(
                f"{key}={folder}: config.json has {name}={size}, which no model has; 1 to {_MOST[name]} is right"
            )
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ConfigError(
            f"{key}={folder}: config.json has num_key_value_heads={groups}, which does not divide "
            f"num_attention_heads={heads}; fetch it again"
        )
