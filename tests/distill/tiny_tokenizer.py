"""A byte-level tokenizer small enough to reason about, for tests without a network."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# \u0120 is the byte-level spelling of a space, \u010a of a line feed, \u00c3\u00a9 of an e with acute accent.
MERGES = [
    "\u0120 \u0120",
    "\u0120\u0120 \u0120\u0120",
    "t h",
    "th e",
    "\u0120 the",
    "1 2",
    "\u0120 1",
    "\u00c3 \u00a9",
]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
BOS, EOS = 1, 2


def tiny_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is TOKENS: nearly one token a byte; pad is eos, as in many real ones."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            "<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
        )
    names = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "pad_token": SPECIAL[EOS]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
