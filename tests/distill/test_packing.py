from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import packing
from distill.config import ConfigError
from distill.packing import IGNORE, Cutter, Rows, best_fit, build_rows
from tests.distill.tiny_tokenizer import BOS, EOS, TOKENS, tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "warm", "stone", "while", "rain", "fell", "over", "many", "hills"]


def _documents(num_documents: int = 12, seed: int = 0) -> list[str]:
    """Documents of very different lengths, in sentences of 8 to 60 characters."""
    random.seed(seed)
    documents = []
    for index in range(num_documents):
        sentences = [
            " ".join(random.choices(WORDS, k=random.randint(2, 12))).capitalize() + random.choice(".!?")
            for _ in range(1 + index * 2)
        ]
        documents.append(" ".join(sentences))
    return documents


def _cutter(seq_len: int = 64, *, split_sentences: bool = True, adds_bos: bool = False) -> Cutter:
    return Cutter.create(tiny_tokenizer(adds_bos=adds_bos), seq_len=seq_len, split_sentences=split_sentences)


def _pieces(rows: Rows) -> list[list[int]]:
    pieces = []
    for index in range(len(rows)):
        ends = np.cumsum(rows.piece_lengths(index))
        pieces += [piece.tolist() for piece in np.split(rows[index].input_ids_S[: ends[-1]], ends[:-1])]
    return pieces


@pytest.mark.parametrize("split_sentences", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_pieces_join_to_their_documents(split_sentences: bool, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer()
    documents = [
        *_documents(),
        "    indented = 1\n\tdef f():  # na\u00efve\n" * 9,
        " a",
        "12 " * 80,
        "x" * 200,
    ]
    cutter = _cutter(split_sentences=split_sentences, adds_bos=adds_bos)
    for document in documents:
        pieces = list(cutter.pieces([document]))
        assert all(2 <= len(piece) <= 64 for piece in pieces)
        if adds_bos:
            assert all(piece[0] == BOS for piece in pieces)
            pieces = [piece[1:] for piece in pieces]
        # EOS is learnt at the end of the document and nowhere else.
        assert pieces[-1][-1] == EOS
        assert not any(EOS in piece for piece in [*pieces[:-1], pieces[-1][:-1]])
        token_ids = [token_id for piece in pieces for token_id in piece][:-1]
        assert tokenizer.decode(token_ids) == document
        if not split_sentences:
            assert token_ids == tokenizer(document, add_special_tokens=False)["input_ids"]


def test_sentences_stay_whole_and_keep_their_space() -> None:
    documents = _documents()
    tokenizer = tiny_tokenizer()
    sentences = {sentence for document in documents for sentence in re.findall(r"[^.!?]+[.!?]", document)}
    pieces = [tokenizer.decode(piece, skip_special_tokens=True) for piece in _cutter(96).pieces(documents)]
    assert len(pieces) > 2 * len(documents)
    for piece in pieces:
        assert {sentence for sentence in re.findall(r"[^.!?]+[.!?]", piece)} <= sentences
        assert piece[-1] in ".!?"
    # In exact windows the same documents are cut inside sentences.
    windows = _cutter(96, split_sentences=False).pieces(documents)
    assert any(tokenizer.decode(piece, skip_special_tokens=True)[-1] not in ".!?" for piece in windows)


def test_exact_windows_are_full_and_eos_is_never_alone() -> None:
    for num_tokens in range(120, 140):
        lengths = [len(piece) for piece in _cutter(64, split_sentences=False).pieces(["x" * num_tokens])]
        assert sum(lengths) == num_tokens + 1
        assert lengths[-1] >= 2 and all(length >= 63 for length in lengths[:-1])


def test_text_that_looks_like_a_special_token_is_one() -> None:
    assert list(_cutter().pieces(["a<|im_start|>"])) == [[TOKENS.index("a"), BOS, EOS]]


def test_best_fit_never_breaks_or_overfills() -> None:
    random.seed(1)
    for _ in range(50):
        seq_len = random.randint(8, 70)
        lengths = np.array([random.randint(1, seq_len) for _ in range(random.randint(1, 200))])
        row_of_piece = best_fit(lengths, seq_len)
        filled = np.bincount(row_of_piece, weights=lengths)
        assert filled.max() <= seq_len and filled.min() > 0
        # No two rows could be one: the second would have gone into the first.
        assert len(filled) == 1 or np.sort(filled)[:2].sum() > seq_len
    assert best_fit(np.array([5, 3, 4, 4, 8]), 8).tolist() == [1, 1, 2, 2, 0]
    assert best_fit(np.array([], dtype=np.int64), 8).tolist() == []


def test_rows_hold_every_piece_once_and_padding_after(tmp_path: Path) -> None:
    documents = _documents()
    cutter = _cutter()
    rows = build_rows(documents, cutter, cache_dir=tmp_path)
    expected = list(cutter.pieces(documents))
    assert sorted(_pieces(rows)) == sorted(expected)
    assert rows.num_tokens == sum(len(piece) for piece in expected)
    for index in range(len(rows)):
        input_ids_S, position_ids_S, labels_S = rows[index]
        assert input_ids_S.shape == position_ids_S.shape == labels_S.shape == (64,)
        start = 0
        for length in rows.piece_lengths(index):
            assert position_ids_S[start : start + length].tolist() == list(range(length))
            assert (
                labels_S[start : start + length - 1].tolist()
                == input_ids_S[start + 1 : start + length].tolist()
            )
            assert labels_S[start + length - 1] == IGNORE
            start += length
        padding = 64 - start
        assert input_ids_S[start:].tolist() == [cutter.pad_token_id] * padding
        assert position_ids_S[start:].tolist() == list(range(padding))
        assert labels_S[start:].tolist() == [IGNORE] * padding
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_eos_stays_a_label_although_it_is_the_padding_token(tmp_path: Path) -> None:
    documents = _documents()
    cutter = _cutter()
    assert cutter.pad_token_id == cutter.eos_token_id == EOS
    rows = build_rows(documents, cutter, cache_dir=tmp_path)
    assert sum(int((rows[index].labels_S == EOS).sum()) for index in range(len(rows))) == len(documents)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_pieces_have_the_logits_they_have_alone(tmp_path: Path, attention: str) -> None:
    rows = build_rows(["The cat sat.", "Rain fell on hills.", "A stone."], _cutter(), cache_dir=tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).double().eval()
    lengths = rows.piece_lengths(0)
    assert len(lengths) == 3 and sum(lengths) < 64
    input_ids_BS, position_ids_BS = (torch.from_numpy(array)[None] for array in rows[0][:2])

    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(use_cache=False, **inputs).logits[0]

    packed = logits(input_ids=input_ids_BS, position_ids=position_ids_BS).split([*lengths, 64 - sum(lengths)])
    leaking = logits(input_ids=input_ids_BS).split([*lengths, 64 - sum(lengths)])
    pieces = input_ids_BS.split([*lengths, 64 - sum(lengths)], dim=1)
    for number, piece in enumerate(pieces):
        alone = logits(input_ids=piece)
        assert (packed[number] - alone).abs().max() < 1e-9
        if number > 0:
            # Without the restart of positions a piece sees the ones before it.
            assert (leaking[number] - alone).abs().max() > 1e-3


def test_second_build_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_rows(_documents(), _cutter(), cache_dir=tmp_path)

    def fail(*args: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Cutter, "pieces", fail)
    again = build_rows(_documents(), _cutter(), cache_dir=tmp_path)
    assert again.folder == first.folder and len(again) == len(first)
    assert (again[3].input_ids_S == first[3].input_ids_S).all()
    # Whatever the rows depend on makes another entry.
    for documents, cutter in [
        (_documents(seed=1), _cutter()),
        (_documents(), _cutter(65)),
        (_documents(), _cutter(split_sentences=False)),
        (_documents(), _cutter(adds_bos=True)),
    ]:
        with pytest.raises(AssertionError, match="tokenised again"):
            build_rows(documents, cutter, cache_dir=tmp_path)
    monkeypatch.setattr(packing, "_FORMAT", packing._FORMAT + 1)
    with pytest.raises(AssertionError, match="tokenised again"):
        build_rows(_documents(), _cutter(), cache_dir=tmp_path)
    assert [entry for entry in (tmp_path / "rows").iterdir()] == [first.folder]


def test_progress_is_shown_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_rows(_documents(), _cutter(), cache_dir=tmp_path)
    assert capsys.readouterr().err == ""
    build_rows(_documents(), _cutter(32), cache_dir=tmp_path, show_progress=True, label="train text")
    assert "tokenise train text" in capsys.readouterr().err


def test_a_tokenizer_without_eos_and_a_tiny_row_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"data\.seq_len=7 is too short .* at least 8"):
        Cutter.create(tokenizer, seq_len=7, split_sentences=True)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"teacher\.model: its tokenizer lacks an eos_token"):
        Cutter.create(tokenizer, seq_len=64, split_sentences=True)


def test_the_tokenizers_own_cutting_and_padding_is_not_inherited() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    cutter = Cutter.create(tokenizer, seq_len=64, split_sentences=True)
    assert list(cutter.pieces(_documents())) == list(_cutter().pieces(_documents()))
