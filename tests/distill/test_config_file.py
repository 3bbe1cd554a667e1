from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.config import ConfigError
from distill.config_file import read_model_config

SOUND = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def write(folder: Path, content: object) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_a_sound_config_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, SOUND | {"per_layer_config": {"1": {"intermediate_size": 48}}})
    config = read_model_config(folder, trust_remote_code=False, key="teacher.model")
    assert [each.intermediate_size for each in config.per_layer_config] == [64, 48]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([SOUND], r"config\.json holds a list, not an object"),
        (SOUND | {"architectures": "LlamaForCausalLM"}, r"architectures='LlamaForCausalLM'; a list of names"),
        (SOUND | {"architectures": [1]}, r"architectures=\[1\]; a list of names"),
        (SOUND | {"auto_map": ["code.Own"]}, r"auto_map=\['code\.Own'\]; an object is right"),
        (SOUND | {"architectures": ["LlamaForTokenClassification"]}, "not a causal .*TokenClassification"),
        (
            SOUND | {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "code.Own"}},
            "not a causal language model but Own",
        ),
        (SOUND | {"num_hidden_layers": -1}, "num_hidden_layers=-1, which no model has; 1 to 2000 is right"),
        (
            SOUND | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": -1},
            "num_hidden_layers=-1, which no model has",
        ),
        # Its class would make a list of so many.
        (
            SOUND
            | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 10**12},
            "num_hidden_layers=1000000000000, which no model has",
        ),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**12}},
            "num_hidden_layers=1000000000000",
        ),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 10**6},
            "num_attention_heads=1000000",
        ),
        (SOUND | {"vocab_size": 10**12}, "vocab_size=1000000000000, which no model has"),
        (SOUND | {"num_key_value_heads": 3}, "num_key_value_heads=3, which does not divide"),
        (SOUND | {"per_layer_config": {"1": {"intermediate_size": -3}}}, "intermediate_size=-3"),
    ],
)
def test_a_config_that_lies_is_refused(tmp_path: Path, content: object, message: str) -> None:
    folder = write(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_model_config(folder, trust_remote_code=False, key="student.model")
    assert str(caught.value).startswith(f"student.model={folder}")
