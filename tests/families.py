"""Tiny random models of the families that the project proves itself on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from parallel.factored import CONFIG_KEY, factorise_linears, ranks_of
from parallel.layerwise import layerwise

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "glm4", "gemma2", "phi3", "olmo2", "starcoder2", "granite")

_EXTRA = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 5, "final_logit_softcapping": 2.0},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "starcoder2": {"use_bias": True},
}


def tiny_config(family: str, **overrides: object) -> PretrainedConfig:
    """Return a config of the family: 4 layers, 8 heads in 4 groups, odd vocabulary; overrides win."""
    values: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": 8,
    }
    if family in ("qwen2", "starcoder2", "phi3", "olmo2", "granite"):
        del values["head_dim"]
    return AutoConfig.for_model(family, **{**values, **_EXTRA.get(family, {}), **overrides})


def factored_config(family: str, ranks: dict[str, int], **overrides: object) -> PretrainedConfig:
    """Return a tiny config with linears in two factors; `ranks` are by name inside a layer (layers 0 to 2), such as mlp.up_proj."""
    config = tiny_config(family, **overrides)
    of_layers = {f"model.layers.{layer}.{name}": rank for layer in range(3) for name, rank in ranks.items()}
    setattr(config, CONFIG_KEY, of_layers)
    return config


def tiny_model(
    config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """Return a transformers model in eval mode whose weights are all random, norms and biases too.

    It is unmodified, but for the linears that the config has in two factors, and for layers of different widths, each of
    which is built from its own config.
    """
    if config.is_heterogeneous:
        model = layerwise(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])._from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    factorise_linears(model, ranks_of(config))
    model = model.to(dtype).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def save_tiny(
    folder: Path, config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Path:
    """Write such a model as a Hugging Face folder and return the folder."""
    tiny_model(config, seed=seed, dtype=dtype).save_pretrained(folder)
    return folder
