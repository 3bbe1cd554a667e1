"""Checkpoints read strictly and written shard by shard; the families' own cases are in test_prune.py and test_recut.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.config import ConfigError
from distill.cut_files import stored_parameters, write_tensors
from parallel.model import build_meta_model
from tests.families import save_tiny, tiny_config, tiny_model


def test_each_parameter_is_found_in_its_file(tmp_path: Path) -> None:
    config = tiny_config("qwen3")
    model = tiny_model(config)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    found = stored_parameters(tmp_path, build_meta_model(config), key="teacher.model")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys() and len({stored.path for stored in found.values()}) > 1
    for name, stored in found.items():
        assert stored.dtype == torch.float64 and torch.equal(stored.read(), expected[name])


def test_a_config_that_says_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tiny_config("llama"))
    for changes, words in (
        ({"num_hidden_layers": 5}, "lacks the tensors of model.layers.4"),
        ({"num_hidden_layers": 3}, "holds model.layers.3"),
        ({"intermediate_size": 40}, r"shape \(.*48.*\), but its config says \(.*40"),
    ):
        with pytest.raises(ConfigError, match=f"student.model: .*{words}"):
            stored_parameters(folder, build_meta_model(tiny_config("llama", **changes)), key="student.model")


def test_a_file_is_closed_before_it_would_be_too_large(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(30), "b": torch.ones(10), "c": torch.ones(11), "d": torch.ones(100)}
    sizes_bytes = {name: tensor.nbytes for name, tensor in tensors.items()}
    made: list[str] = []

    def produce(name: str) -> torch.Tensor:
        made.append(name)
        return tensors[name]

    write_tensors(tmp_path, sizes_bytes, produce, max_shard_bytes=160)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [index["weight_map"][name] for name in "abcd"]
    assert [name[6:11] for name in files] == ["00001", "00001", "00002", "00003"]
    assert index["metadata"]["total_size"] == 604 and made == list("abcd")
    assert all(torch.equal(load_file(tmp_path / files[i])[n], tensors[n]) for i, n in enumerate("abcd"))
