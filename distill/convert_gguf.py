"""Turn a GGUF file into a Hugging Face folder, once.

Decides: the type of the saved weights (below) and how the tokenizer splits text before its merges. Assumes an
architecture that transformers can read from GGUF; the reading of names, shapes and llama.cpp's row order is
transformers'. Does not go through `from_pretrained(gguf_file=...)`: that wants accelerate, and gives a model that refuses
`save_pretrained` because its config says "quantized". Holds the whole model in memory while it converts.

Saved type: a file of quantised blocks becomes float32, a file of plain floats keeps its own type. For the embedded
SmolLM2-135M (Q4_1 and Q8_0) float32 is 538 MB, bfloat16 would be 269 MB; a block value is scale * integer + minimum
with float16 scale and minimum, which float32 holds and bfloat16 rounds (KL 5.7e-5 nats a token from the float32 model;
perplexity 14.63 and 14.62). Float32 was chosen because the folder then equals the file, and what is lost after that is what
`train.dtype` asks for; the rounding would be harmless, but so are 269 MB of disk, since ranks read only their slices.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# `tokenizer.ggml.pre` values whose models split every digit off before GPT-2's own pattern, and those that use GPT-2's
# pattern alone. Source: the table of regular expressions in llama.cpp's src/llama-vocab.cpp.
_DIGITS_THEN_GPT2 = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
_GPT2 = frozenset(
    {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat"}
)
# What the readers of gguf and transformers raise for a file that is damaged, or of a kind they do not know.
_UNREADABLE = (
    *(ValueError, IndexError, KeyError, NotImplementedError, OverflowError, struct.error),
    *(TypeError, AttributeError, RuntimeError, MemoryError, OSError),
)


def convert_gguf(gguf: Path, target: Path, *, key: str = "teacher.model") -> None:
    """Write config, safetensors and tokenizer of a GGUF file into the folder `target`.

    Args:
        gguf: the file.
        target: created if it is not there; not atomic (`distill.pretrained` renames a finished folder).
        key: the setting that named the file, for messages.
    Raises:
        ConfigError: not a GGUF file, cut short, or an architecture, tensor type or tokenizer that cannot be converted.
    """
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{key}={gguf} does not begin with the letters GGUF; it is not a GGUF file")
    try:
        _check_rope(gguf, key)
        tokenizer = _tokenizer(gguf, key)
        model = _model(gguf)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(
            f"{key}={gguf} cannot be converted ({error}); if the file is whole, give the model's Hugging Face "
            "folder or hub id instead"
        ) from error
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    # transformers 5 writes a class of its own that engines on transformers 4 do not know; both read the general one alike.
    file = target / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model(gguf: Path) -> PreTrainedModel:
    """Build the causal LM of a GGUF file from its dequantised tensors; every weight must be there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config_dict = load_gguf_checkpoint(str(gguf), return_tensors=False)["config"]
    config_dict.pop("_model_name_or_path", None)
    config = AutoConfig.for_model(**config_dict)
    dtype = _saved_dtype(gguf)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # transformers would use PyTorch's default type here; a file of plain floats must not grow to float32.
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model, torch_dtype=dtype)[
        "tensors"
    ]
    result = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or result.unexpected_keys:
        raise ValueError(f"missing tensors: {absent[:3]}, unexpected tensors: {result.unexpected_keys[:3]}")
    return model


def _check_rope(gguf: Path, key: str) -> None:
    """Refuse rotary positions that are scaled: transformers reads them from GGUF as if they were not."""
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, tensors = read_gguf_metadata(str(gguf))
    scaled = [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]
    for name, value in metadata.items():
        if name.endswith(".rope.scaling.type") and value != "none":
            scaled.append(f"{name}={value}")
        if name.endswith((".rope.scaling.factor", ".rope.scale_linear")) and value != 1:
            scaled.append(f"{name}={value:g}")
    if scaled:
        raise ConfigError(
            f"{key}={gguf}: its rotary positions are scaled ({scaled[0]}), which is lost in the conversion; give the model's "
            "Hugging Face folder or hub id instead"
        )


def _saved_dtype(gguf: Path) -> Any:
    """Return the type of the file's own floats, or float32 when it holds quantised blocks."""
    import torch
    from gguf import LlamaFileType
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(gguf))
    plain = {LlamaFileType.MOSTLY_F16: torch.float16, LlamaFileType.MOSTLY_BF16: torch.bfloat16}
    return plain.get(metadata.get("general.file_type"), torch.float32)


def _tokenizer(gguf: Path, key: str) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer with the splitting that the model was trained with."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, settings = get_gguf_tokenizer(str(gguf))
    backend, extra = convert_gguf_tokenizer(architecture, parts)
    if parts.get("tokenizer_type") == "gpt2":
        _set_splitting(backend, parts.get("pre_tokenizer_type"), gguf, key)
    # The generic class uses the saved tokenizer.json as it is; GPT2Tokenizer would rebuild its own splitting on load.
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **extra)


def _set_splitting(backend: Tokenizer, pre: str | None, gguf: Path, key: str) -> None:
    """Repair the pre-tokenizer of a byte-level vocabulary where transformers falls back to GPT-2's."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre in GGUF_PRE_TOKENIZER_SPLITS or pre in _GPT2:
        return
    if pre not in _DIGITS_THEN_GPT2:
        raise ConfigError(
            f"{key}={gguf}: its tokenizer splits text by tokenizer.ggml.pre={pre}, which cannot be rebuilt "
            "exactly; give the model's Hugging Face folder or hub id instead"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
