from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from distill.config import ConfigError, Data
from distill.data import (
    IGNORE,
    Batches,
    MicroBatch,
    Rows,
    load_rows,
    num_valid_tokens,
    spread_microbatches,
)
from distill.packing import Cutter, build_rows
from distill.stream import Stream
from tests.distill.tiny_tokenizer import EOS, tiny_tokenizer
from tests.workers import run_distributed


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Nineteen rows of 32 tokens, each of one document that names itself."""
    cutter = Cutter.create(tiny_tokenizer(), seq_len=32, split_sentences=True)
    texts = [f"This is document {chr(97 + i)} x" for i in range(19)]
    built = build_rows(texts, cutter, cache_dir=tmp_path_factory.mktemp("cache"))
    assert len(built) == 19
    return built


def _seen(microbatches: list[MicroBatch], rows: Rows) -> list[int]:
    """Return the row numbers in some micro-batches; -1 is a row of padding."""
    numbers = {tuple(rows[i].input_ids_S.tolist()): i for i in range(len(rows))}
    return [numbers.get(tuple(row), -1) for m in microbatches for row in m.input_ids_BS.tolist()]


def test_micro_batches_are_the_rows(rows: Rows) -> None:
    batches = Batches(Stream([rows], None, seed=0), global_batch_size=6, microbatch_size=2)
    microbatches = batches.step(0)
    assert len(microbatches) == batches.num_microbatches == 3
    for microbatch, indices in zip(
        microbatches, torch.tensor(_seen(microbatches, rows)).view(3, 2), strict=True
    ):
        for place, index in enumerate(indices.tolist()):
            for mine, theirs in zip(vars(microbatch).values(), rows[index], strict=True):
                assert mine.dtype == torch.int64 and mine[place].tolist() == theirs.tolist()
    valid = sum(int((rows[index].labels_S != IGNORE).sum()) for index in _seen(microbatches, rows))
    assert num_valid_tokens(microbatches) == sum(m.num_valid_tokens for m in microbatches) == valid > 0


def test_micro_batches_move_between_devices(rows: Rows) -> None:
    moved = (
        Batches(Stream([rows], None, seed=0), global_batch_size=2, microbatch_size=2).step(0)[0].to("meta")
    )
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


@pytest.mark.parametrize(
    ("dp_size", "microbatch_size"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (4, 3), (12, 1)]
)
def test_the_tokens_of_a_step_do_not_depend_on_the_mesh(
    rows: Rows, dp_size: int, microbatch_size: int
) -> None:
    whole = Batches(Stream([rows], None, seed=5), global_batch_size=12, microbatch_size=12)
    ranks = [
        Batches(
            Stream([rows], None, seed=5),
            global_batch_size=12,
            microbatch_size=microbatch_size,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]
    for step in range(5):
        shares = [rank.step(step) for rank in ranks]
        assert all(len(share) == ranks[0].num_microbatches for share in shares)
        assert [row for share in shares for row in _seen(share, rows)] == _seen(whole.step(step), rows)


def test_every_epoch_serves_every_row_once_in_another_order(rows: Rows) -> None:
    batches = Batches(Stream([rows], None, seed=1), global_batch_size=4, microbatch_size=4)
    stream = [row for step in range(19) for row in _seen(batches.step(step), rows)]
    epochs = [stream[start : start + 19] for start in range(0, 76, 19)]
    assert all(sorted(epoch) == list(range(19)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = Batches(Stream([rows], None, seed=2), global_batch_size=4, microbatch_size=4)
    assert _seen(other.step(0), rows) != stream[:4]


def test_a_step_is_a_pure_function_of_its_number(rows: Rows) -> None:
    steps = [11, 3, 4, 3, 100_000, 0, 4]
    batches = Batches(Stream([rows], None, seed=1), global_batch_size=4, microbatch_size=2)
    in_turn = [_seen(batches.step(step), rows) for step in steps]
    fresh = [
        _seen(Batches(Stream([rows], None, seed=1), global_batch_size=4, microbatch_size=2).step(step), rows)
        for step in steps
    ]
    assert in_turn == fresh


def test_sizes_that_do_not_fit_are_refused(rows: Rows) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.global_batch_size=20 is more than the 19 rows of 32 tokens"
    ):
        Batches(Stream([rows], None, seed=0), global_batch_size=20, microbatch_size=1)
    with pytest.raises(ConfigError, match=r"global_batch_size=12 is not a multiple of mesh\.dp=4 times .*=2"):
        Batches(Stream([rows], None, seed=0), global_batch_size=12, microbatch_size=2, dp_size=4)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 6, 7, 19, 1000])
def test_spread_micro_batches_take_each_of_evenly_spaced_rows_once(
    rows: Rows, dp_size: int, num_rows: int
) -> None:
    shares = [
        spread_microbatches(rows, microbatch_size=2, num_rows=num_rows, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(m.input_ids_BS.shape == (2, 32) for share in shares for m in share)
    in_order = [row for turn in zip(*shares, strict=True) for row in _seen(list(turn), rows)]
    used = min(num_rows, 19)
    taken = in_order[:used]
    gaps = {later - earlier for earlier, later in itertools.pairwise([*taken, 19])}
    assert taken[0] == 0 and max(gaps) - min(gaps) <= 1, "evenly spaced, up to the end"
    assert set(in_order[used:]) <= {-1} and len(in_order) - used < 2 * dp_size
    valid = sum(int((rows[index].labels_S != IGNORE).sum()) for index in taken)
    assert sum(num_valid_tokens(share) for share in shares) == valid


def test_padding_rows_look_like_padding(rows: Rows) -> None:
    blank = spread_microbatches(rows, microbatch_size=2, num_rows=1)[0]
    assert blank.input_ids_BS[1].tolist() == [EOS] * 32
    assert blank.position_ids_BS[1].tolist() == list(range(32))
    assert blank.labels_BS[1].tolist() == [IGNORE] * 32


def _data(folder: Path, **settings: object) -> Data:
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"text": f"Document {i}. " + "It goes on. " * (i % 9)}) + "\n")
    return Data(path=str(folder / "corpus.jsonl"), seq_len=64, **settings)


def test_load_rows_keeps_the_parts_apart(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    names: dict[str, set[str]] = {}
    for part in ("train", "held_out"):
        loaded = load_rows(_data(tmp_path), tokenizer, part=part, cache_dir=tmp_path / "cache")
        text = " ".join(tokenizer.decode(loaded[i].input_ids_S) for i in range(len(loaded)))
        names[part] = {word for word in text.split("Document ")[1:] for word in [word.split(".")[0]]}
    assert not names["train"] & names["held_out"] and len(names["train"] | names["held_out"]) == 40
    again = load_rows(_data(tmp_path), tokenizer, part="held_out", cache_dir=tmp_path / "cache")
    assert again.folder == loaded.folder


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.held_out_fraction=0\.0 leaves no document .* held_out part"
    ):
        load_rows(
            _data(tmp_path, held_out_fraction=0.0),
            tiny_tokenizer(),
            part="held_out",
            cache_dir=tmp_path / "c",
        )


def _load_on_each_rank(folder: Path) -> tuple[str, int, int]:
    data = Data(path=str(folder / "corpus.jsonl"), seq_len=64)
    loaded = load_rows(data, tiny_tokenizer(), part="train", cache_dir=folder / "cache")
    return str(loaded.folder), len(loaded), int(loaded[0].input_ids_S.sum())


def test_processes_may_race_for_the_same_rows(tmp_path: Path) -> None:
    _data(tmp_path)
    results = run_distributed(2, _load_on_each_rank, tmp_path)
    assert results[0] == results[1]
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1


def test_sources_share_what_is_held_out(tmp_path: Path) -> None:
    """A mixture never trains on a document that all the text together holds out."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        texts = [f"{path.stem} {index:02d} is here" for index in range(30)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = Data(path=tuple(map(str, paths)), seq_len=32, held_out_fraction=0.3)
    load = {"tokenizer": tiny_tokenizer(), "cache_dir": tmp_path / "cache"}

    def texts_of(rows: Rows) -> set[tuple[int, ...]]:
        texts = set()
        for index in range(len(rows)):
            ends = itertools.accumulate(rows.piece_lengths(index), initial=0)
            texts |= {tuple(rows[index].input_ids_S[a:b].tolist()) for a, b in itertools.pairwise(ends)}
        return texts

    held_out, whole, *sources = (
        texts_of(load_rows(data, part=part, source=source, **load))
        for part, source in (("held_out", None), ("train", None), ("train", 0), ("train", 1))
    )
    assert held_out and not held_out & whole
    assert sources[0] | sources[1] == whole and not sources[0] & sources[1]
