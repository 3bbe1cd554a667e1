"""config.json in the keys of transformers 4 and 5: each form alone is read as the config that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from distill.saved_config import save_config
from tests.families import FAMILIES, tiny_config

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return AutoConfig.from_pretrained(folder).to_dict()


def written(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    folder.mkdir()
    config.dtype = "bfloat16"
    save_config(config, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", [*FAMILIES, "scaled"])
def test_either_form_is_the_config(family: str, tmp_path: Path) -> None:
    config = tiny_config("llama", rope_parameters=SCALED) if family == "scaled" else tiny_config(family)
    values = written(tmp_path / "written", config)
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"]
    assert ("rope_scaling" in values) == (family == "scaled")
    expected = config.to_dict()
    older = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype")}
    newer = {
        key: value
        for key, value in values.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    for name, form in (("both", values), ("older", older), ("newer", newer)):
        found = read(tmp_path / name, form)
        for key in ("rope_parameters", "dtype", "hidden_size", "layer_types"):
            assert found.get(key) == expected.get(key), (name, key)


def test_positions_that_differ_by_layer_type_have_no_older_form(tmp_path: Path) -> None:
    kinds = {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }
    config = tiny_config("gemma3_text", rope_parameters=kinds, sliding_window=5)
    values = written(tmp_path / "written", config)
    assert "rope_theta" not in values and values["rope_parameters"].keys() == kinds.keys()
