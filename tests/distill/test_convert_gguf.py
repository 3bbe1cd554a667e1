from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import ConfigError
from distill.convert_gguf import convert_gguf
from tests.distill.tiny_gguf import CHAT_TEMPLATE, tiny_llama, write_gguf
from tests.distill.tiny_tokenizer import TOKENS


def _convert(folder: Path, model: torch.nn.Module, **kinds: str) -> Path:
    write_gguf(folder / "tiny.gguf", model, **kinds)
    convert_gguf(folder / "tiny.gguf", folder / "model")
    return folder / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_has_the_logits_of_the_original(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    converted = AutoModelForCausalLM.from_pretrained(_convert(tmp_path, model))
    assert converted.config.tie_word_embeddings is tied
    assert converted.dtype == torch.float32
    input_ids_BS = torch.arange(40).view(2, 20)
    with torch.no_grad():
        difference = (converted(input_ids_BS).logits - model(input_ids_BS).logits).abs().max()
    assert difference == 0


def test_config_is_that_of_an_unquantised_causal_lm(tmp_path: Path) -> None:
    config = json.loads((_convert(tmp_path, tiny_llama()) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


def test_blocks_become_the_float32_values_they_stand_for(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = load_file(_convert(tmp_path, model, kind="Q8_0") / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    original = model.state_dict()[name].numpy()
    q8 = GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(quants.dequantize(quants.quantize(original, q8), q8))
    assert weights[name].dtype == torch.float32
    assert torch.equal(weights[name], expected)


def test_a_file_of_plain_floats_keeps_its_type(tmp_path: Path) -> None:
    weights = load_file(_convert(tmp_path, tiny_llama(), kind="F16") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_tokenizer_splits_every_digit_as_the_original_does(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_convert(tmp_path, tiny_llama()))
    # "1 2", "G 1" and a run of spaces before a digit all have merges, which only the right splitting keeps apart.
    assert tokenizer.tokenize("  12") == ["\u0120\u0120", "1", "2"]
    assert tokenizer.tokenize("the 1\n    the \u00e9") == [
        "the",
        "\u0120",
        "1",
        "\u010a",
        "\u0120\u0120",
        "\u0120",
        "\u0120the",
        "\u0120",
        "\u00c3\u00a9",
    ]
    plain = AutoTokenizer.from_pretrained(_convert(tmp_path, tiny_llama(), pre="gpt-2"))
    assert plain.tokenize("  12") == ["\u0120", "\u0120", "12"]


def test_special_tokens_and_chat_template_survive(tmp_path: Path) -> None:
    """Under a class that transformers 4 knows too."""
    folder = _convert(tmp_path, tiny_llama())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        1,
        2,
        2,
        len(TOKENS),
    )
    assert tokenizer("a<|im_end|>")["input_ids"] == [TOKENS.index("a"), 2]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "x = 3.14 # na\u00efve \u2013\n\t\tif  y:  1999"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unknown_splitting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.pre=brand-new"):
        _convert(tmp_path, tiny_llama(), pre="brand-new")


@pytest.mark.parametrize(
    ("scaling", "words"), [("linear", "llama.rope.scaling."), ("freqs", "rope_freqs.weight")]
)
def test_scaled_rotary_positions_are_refused(scaling: str, words: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), scaling=scaling)
    with pytest.raises(ConfigError, match=rf"rotary positions are scaled \({words}"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", tiny_llama())
    content = (tmp_path / "whole.gguf").read_bytes()
    for size in (6, 100, 3000, len(content) // 2, len(content) - 40):
        (tmp_path / "short.gguf").write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"student\.model=.*short\.gguf"):
            convert_gguf(tmp_path / "short.gguf", tmp_path / "out", key="student.model")
    (tmp_path / "other.gguf").write_bytes(b"PK" + content)
    with pytest.raises(ConfigError, match="not a GGUF file"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
