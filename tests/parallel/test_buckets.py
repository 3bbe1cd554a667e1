"""Places in the flat buffers: each parameter once, aligned, buckets of whole layers, what the norm counts in front."""

from __future__ import annotations

import itertools

import pytest

from parallel.buckets import Chunk, is_counted, lay_out
from parallel.mesh import Axis
from parallel.model import build_stage
from parallel.weights import Entry, parameter_table
from tests.families import tiny_config

LAYER_NUMEL = 9000
"""Roughly; a bucket of this size holds two or three of the tiny layers."""


def _tables(family: str, tied: bool, num_stages: int, tp: Axis) -> list[list[Entry]]:
    config = tiny_config(family, tie_word_embeddings=tied, num_hidden_layers=6)
    stages = [Axis("stage", num_stages, stage) for stage in range(num_stages)]
    return [parameter_table(build_stage(config, pp=pp, tp=tp)) for pp in stages]


def _check_places(chunks: list[Chunk], tables: list[list[Entry]], tp: Axis) -> None:
    at = 0
    for chunk, table in zip(chunks, tables, strict=True):
        slots = list(chunk.slots)
        assert sorted(id(slot.entry) for slot in slots) == sorted(id(entry) for entry in table)
        for bucket in chunk.buckets:
            assert bucket.start == at and bucket.start % 32 == 0, "buckets follow each other"
            inside = [slot for slot in slots if bucket.start <= slot.start < bucket.stop]
            assert inside[0].start == bucket.start
            for one, other in itertools.pairwise(inside):
                assert one.stop <= other.start < one.stop + 32 and other.start % 32 == 0
            assert inside[-1].stop <= bucket.stop < inside[-1].stop + 32
            for slot in inside:
                assert is_counted(slot.entry, tp) == (slot.stop <= bucket.counted_stop)
                assert slot.entry.layer in bucket.layers or not bucket.layers
            at = bucket.stop


@pytest.mark.parametrize("bucket_numel", [1, 2 * LAYER_NUMEL, 10**9])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("tp", [Axis("tp"), Axis("tp", 2, 0), Axis("tp", 2, 1)], ids=["whole", "tp0", "tp1"])
@pytest.mark.parametrize("family,tied", [("qwen3", True), ("llama", False)])
def test_places(family: str, tied: bool, tp: Axis, num_stages: int, bucket_numel: int) -> None:
    tables = _tables(family, tied, num_stages, tp)
    chunks = lay_out(tables, tp, bucket_numel)
    _check_places(chunks, tables, tp)
    for stage, chunk in enumerate(chunks):
        owned = range(stage * 6 // num_stages, (stage + 1) * 6 // num_stages)
        early = [bucket for bucket in chunk.buckets if bucket.layers]
        assert [layer for bucket in early for layer in sorted(bucket.layers, reverse=True)] == [*owned][::-1]
        late = {slot.entry.name for slot in chunk.slots if slot.start >= early[-1].stop}
        partial = {entry.name for entry in tables[stage] if entry.tp_partial_grad}
        assert len(partial) == (2 * len(owned) if family == "qwen3" and tp.size == 2 else 0)
        assert late == partial | ({"model.embed_tokens.weight"} if stage == 0 else set())
        assert len(chunk.buckets) == len(early) + bool(late)
        # One sum over tp takes the partial gradients, all of them and nothing else.
        inside = {s.entry.name for s in chunk.slots if chunk.partial.start <= s.start < chunk.partial.stop}
        assert inside == partial
        behind = [
            s.entry.layer for s in chunk.slots if s.entry.name in ("model.norm.weight", "lm_head.weight")
        ]
        assert set(behind) <= {owned[-1]} and bool(behind) == (stage == num_stages - 1)
        if bucket_numel == 1:
            assert all(len(bucket.layers) == 1 for bucket in early), "a bucket takes a layer, or nothing"
        elif bucket_numel == 10**9:
            assert len(early) == 1
        elif num_stages == 1 and tp.size == 1:
            assert 1 < len(early) < 6


def test_shards_agree_on_what_they_sum() -> None:
    """Replicas reduce whole buckets, shards the partial gradients: these must be equally long on all of a group."""
    sides = [lay_out(_tables("qwen3", False, 2, tp), tp, 1) for tp in (Axis("tp", 2, 0), Axis("tp", 2, 1))]
    for one, other in zip(*sides, strict=True):
        names = [[s.entry.name for s in side.slots if s.entry.tp_partial_grad] for side in (one, other)]
        assert names[0] == names[1]
        assert one.partial.stop - one.partial.start == other.partial.stop - other.partial.start > 0
        # Only the first shard counts what both hold.
        assert all(not is_counted(s.entry, Axis("tp", 2, 1)) for s in other.slots if s.entry.shard is None)
