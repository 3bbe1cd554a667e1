"""Places in the flat buffers: each parameter once, aligned, buckets of whole layers, what the norm counts in front."""

from __future__ import annotations

import itertools

import pytest
import torch

from parallel.buckets import ALIGNED, Bucket, Chunk, Ownership, is_counted, lay_out, runs
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


def _shorter_by(entry: Entry) -> int:
    """Return how many elements a shard is shorter by than the first rank's: the vocabulary of 97 is cut into 49 and 48."""
    if entry.shard is None:
        return 0
    length = entry.shard.stop - entry.shard.start
    return (-(-entry.full_shape[entry.shard.dim] // entry.tp.size) - length) * (
        entry.parameter.numel() // length
    )


def _check_places(chunks: list[Chunk], tables: list[list[Entry]], tp: Axis, num_parts: int) -> None:
    at = 0
    for chunk, table in zip(chunks, tables, strict=True):
        slots = list(chunk.slots)
        assert sorted(id(slot.entry) for slot in slots) == sorted(id(entry) for entry in table)
        for bucket in chunk.buckets:
            unit = ALIGNED * num_parts
            assert bucket.start == at and bucket.start % unit == 0, "buckets follow each other"
            inside = [slot for slot in slots if bucket.start <= slot.start < bucket.stop]
            assert inside[0].start == bucket.start
            for one, other in itertools.pairwise(inside):
                assert other.start % ALIGNED == 0
                assert one.stop <= other.start < one.stop + _shorter_by(one.entry) + ALIGNED
            assert inside[-1].stop <= bucket.stop < inside[-1].stop + _shorter_by(inside[-1].entry) + unit
            for slot in inside:
                assert is_counted(slot.entry, tp) == (slot.stop <= bucket.counted_stop)
                assert slot.entry.layer in bucket.layers or not bucket.layers
                tied = slot.entry.is_tied_copy or slot.entry.is_tied_source
                assert tied == bucket.is_tied and not (tied and len(inside) > 1)
            assert bucket.counted_stop % ALIGNED == 0, "the norm adds whole rows"
            at = bucket.stop


@pytest.mark.parametrize("bucket_numel", [1, 2 * LAYER_NUMEL, 10**9])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("tp", [Axis("tp"), Axis("tp", 2, 0), Axis("tp", 2, 1)], ids=["whole", "tp0", "tp1"])
@pytest.mark.parametrize("family,tied", [("qwen3", True), ("llama", False)])
def test_places(family: str, tied: bool, tp: Axis, num_stages: int, bucket_numel: int) -> None:
    tables = _tables(family, tied, num_stages, tp)
    num_parts = 1 if bucket_numel == 1 else 3
    chunks = lay_out(tables, tp, bucket_numel, num_parts=num_parts)
    _check_places(chunks, tables, tp, num_parts)
    for stage, chunk in enumerate(chunks):
        owned = range(stage * 6 // num_stages, (stage + 1) * 6 // num_stages)
        early = [bucket for bucket in chunk.buckets if bucket.layers and not bucket.is_tied]
        assert [layer for bucket in early for layer in sorted(bucket.layers, reverse=True)] == [*owned][::-1]
        late = {slot.entry.name for slot in chunk.slots if slot.start >= early[-1].stop}
        partial = {entry.name for entry in tables[stage] if entry.tp_partial_grad}
        assert len(partial) == (2 * len(owned) if family == "qwen3" and tp.size == 2 else 0)
        assert late == partial | ({"model.embed_tokens.weight"} if stage == 0 else set())
        ends = [bucket for bucket in chunk.buckets if bucket.is_tied]
        assert len(ends) == (tied and stage in (0, num_stages - 1))
        assert all(bucket.layers == ({owned[-1]} if stage else set()) for bucket in ends)
        assert len(chunk.buckets) == len(early) + len(ends) + bool(
            late - {"model.embed_tokens.weight"} if tied else late
        )
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


@pytest.mark.parametrize("num_stages", [1, 2])
def test_every_parameter_lies_at_one_place_on_all_of_tp(num_stages: int) -> None:
    """Replicas of what tp has whole are then added in one order on all of tp, whatever cuts a bucket into pieces."""
    sides = [
        lay_out(_tables("qwen3", False, num_stages, tp), tp, 2 * LAYER_NUMEL, num_parts=3)
        for tp in (Axis("tp", 2, 0), Axis("tp", 2, 1))
    ]
    for one, other in zip(*sides, strict=True):
        places = [{slot.entry.name: slot.start for slot in side.slots} for side in (one, other)]
        assert places[0] == places[1]
        bounds = [[(bucket.start, bucket.stop) for bucket in side.buckets] for side in (one, other)]
        assert bounds[0] == bounds[1]
        head = [s for s in other.slots if s.entry.name == "lm_head.weight"]
        assert all(_shorter_by(slot.entry) == 32 for slot in head), "its shards differ in length"


def test_shards_agree_on_what_they_sum() -> None:
    """Replicas reduce whole buckets, shards the partial gradients: these must be equally long on all of a group."""
    sides = [lay_out(_tables("qwen3", False, 2, tp), tp, 1) for tp in (Axis("tp", 2, 0), Axis("tp", 2, 1))]
    for one, other in zip(*sides, strict=True):
        names = [[s.entry.name for s in side.slots if s.entry.tp_partial_grad] for side in (one, other)]
        assert names[0] == names[1]
        assert one.partial.stop - one.partial.start == other.partial.stop - other.partial.start > 0
        # Only the first shard counts what both hold.
        assert all(not is_counted(s.entry, Axis("tp", 2, 1)) for s in other.slots if s.entry.shard is None)


def test_both_ends_of_a_tie_are_cut_alike() -> None:
    tables = _tables("qwen3", True, 3, Axis("tp"))
    chunks = lay_out(tables, Axis("tp"), 10**9, num_parts=3)
    first, last = ([bucket for bucket in chunks[place].buckets if bucket.is_tied] for place in (0, 2))
    assert len(first) == len(last) == 1
    assert first[0].stop - first[0].start == last[0].stop - last[0].start


@pytest.mark.parametrize("count", [1, 2, 3])
def test_replicas_own_everything_once(count: int) -> None:
    tp = Axis("tp", 2, 0)
    chunks = lay_out(_tables("qwen3", True, 3, tp), tp, 2 * LAYER_NUMEL, num_parts=count)
    owners = [Ownership(chunks, index, count) for index in range(count)]
    numel = chunks[-1].buckets[-1].stop
    seen, kept = torch.zeros(numel), [torch.zeros(owner.numel) for owner in owners]
    for owner, own in zip(owners, kept, strict=True):
        for part, place in owner.pieces():
            assert part.start % ALIGNED == place.start % ALIGNED == 0
            seen[part] += 1
            own[place] += 1
    assert (seen == 1).all() and all((own == 1).all() for own in kept)
    flat = torch.arange(numel)
    for slot in (slot for chunk in chunks for slot in chunk.slots):
        pieces = [piece for owner in owners for piece in owner.inside(slot.start, slot.stop)]
        assert torch.equal(torch.cat([flat[part] for part, _ in pieces]), flat[slot.start : slot.stop])
        assert all(len([*owner.inside(slot.start, slot.stop)]) <= 1 for owner in owners)
    for owner in owners:
        own = torch.empty(owner.numel, dtype=torch.long)
        for part, place in owner.pieces():
            own[place] = flat[part]
        for part, place in owner.inside(ALIGNED, numel - 7):
            assert torch.equal(own[place], flat[part]), "a place is where the part lies in its own buffer"


@pytest.mark.parametrize("tp", [Axis("tp"), Axis("tp", 2, 1)], ids=["whole", "tp1"])
def test_runs_are_alike_and_cover_everything(tp: Axis) -> None:
    chunks = lay_out(_tables("qwen3", True, 3, tp), tp, 1, num_parts=2)
    found = list(runs(chunks, tp))
    assert found[0].start == 0 and found[-1].stop == chunks[-1].buckets[-1].stop
    for one, other in itertools.pairwise(found):
        assert one.stop == other.start and one[2:] != other[2:]
    for slot in (slot for chunk in chunks for slot in chunk.slots):
        run = next(run for run in found if run.start <= slot.start < run.stop)
        assert slot.stop <= run.stop
        assert (run.decays, run.is_counted) == (slot.entry.parameter.ndim > 1, is_counted(slot.entry, tp))


def test_parts_of_a_bucket_are_equal() -> None:
    bucket = Bucket(10, 22, frozenset(), 22)
    assert [bucket.part(index, 3) for index in range(3)] == [slice(10, 14), slice(14, 18), slice(18, 22)]
