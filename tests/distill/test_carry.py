"""Moments and masks over a cut: each entry is that of its own unit of the teacher, whatever both students have kept."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from distill.carry import carry_state
from distill.cut_config import student_config
from distill.importance import random_scores
from distill.kept import Kept
from distill.prune import choose
from distill.shape import resolve_shape
from distill.structure import Sizes, cut, kept_entries, layout_of, student_name, teacher_name
from distill.student_config import Prune
from parallel.mesh import Mesh
from parallel.model import build_meta_model, build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.update_rules import OptimizerOptions
from tests.families import tiny_config
from tests.parallel.parts import whole_state
from tests.workers import run_distributed

CONFIG = tiny_config("qwen3", tie_word_embeddings=True)
SIZES = Sizes.of(CONFIG)
SHAPES = {name: tuple(each.shape) for name, each in build_meta_model(CONFIG).named_parameters()}


def _kept(seed: int, **sizes: int) -> Kept:
    shape = resolve_shape(CONFIG, Prune(**sizes), tp=2)
    return choose(random_scores(SIZES, seed), CONFIG, shape)


OLD = _kept(1, hidden_size=24, num_layers=3, intermediate_size=32, num_key_value_heads=2)
NEW = _kept(2, hidden_size=16, num_layers=3, intermediate_size=32, num_key_value_heads=2)


def _coded(kind: str, name: str) -> Tensor:
    """Return a teacher's tensor whose every entry says whose it is; none is 0. Of a mask every third is held."""
    count = torch.Size(SHAPES[name]).numel()
    code = (
        1
        + torch.arange(count, dtype=torch.float64)
        + 2.0**20 * (zlib.crc32(f"{kind}/{name}".encode()) % 2**20)
    )
    return (code % 3 == 0 if kind == "mask" else code).view(SHAPES[name])


class _Files:
    """The checkpoint of the old student."""

    names = frozenset(
        f"{kind}/{student_name(name, OLD)}"
        for name in SHAPES
        if student_name(name, OLD) is not None
        for kind in ("exp_avg", "exp_avg_sq", "weight", "mask")
        # Only linears are held.
        if kind != "mask" or "_proj." in name
    )

    def read(self, name: str) -> Tensor:
        kind, _, own = name.partition("/")
        of_teacher = teacher_name(own, OLD)
        layout = layout_of(of_teacher, SHAPES[of_teacher], SIZES)
        return cut(_coded(kind, of_teacher), layout, SIZES, OLD)


def _expected(kind: str, own: str) -> Tensor:
    """Return what a parameter of the new student should have: its unit's own, or 0 where the old one had none of it."""
    name = teacher_name(own, NEW)
    layout = layout_of(name, SHAPES[name], SIZES)
    known = torch.zeros(SHAPES[name], dtype=_coded(kind, name).dtype)
    if student_name(name, OLD) is not None and (kind != "mask" or "_proj." in name):
        places = [kept_entries(layout, dim, SIZES, OLD) for dim in range(len(layout.dims))]
        known[torch.meshgrid(*places, indexing="ij")] = 1
    return cut(_coded(kind, name) * known, layout, SIZES, NEW)


def _carry(layout: dict[str, int], *, with_moments: bool = True, masked: bool = True) -> dict[str, Tensor]:
    mesh = Mesh.create(**layout) if layout else Mesh.single()
    stage = build_stage(student_config(CONFIG, NEW), pp=mesh.pp, tp=mesh.tp, dtype=torch.float64)
    rate = LearningRate(peak=1e-3, warmup_steps=0, total_steps=9)
    optimizer = StageOptimizer.of_stages([stage], mesh, OptimizerOptions(), rate)
    if masked:
        optimizer.make_mask()
    carry_state(
        _Files(),  # type: ignore[arg-type]
        optimizer,
        with_moments=with_moments,
        teacher_shapes=SHAPES,
        sizes=SIZES,
        old=OLD,
        new=NEW,
    )
    return whole_state(optimizer, (*optimizer.kinds, "mask") if masked else optimizer.kinds)


@pytest.mark.parametrize("layout", [{}, {"pp": 1, "dp": 2, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}])
def test_every_entry_keeps_its_own(layout: dict[str, int]) -> None:
    assert set(OLD.layers) != set(NEW.layers), "a layer comes back"
    ranks = run_distributed(2, _carry, layout) if layout else [_carry(layout)]
    for state in ranks:
        assert {name.partition("/")[0] for name in state} == {"exp_avg", "exp_avg_sq", "mask"}
        zeros = 0
        for name, found in state.items():
            kind, _, own = name.partition("/")
            expected = _expected(kind, own)
            assert torch.equal(found, expected), name
            zeros += int((expected == 0).sum())
        assert zeros > 0


def test_without_moments_what_is_held_comes_alone() -> None:
    state = _carry({}, with_moments=False)
    for name, found in state.items():
        kind, _, own = name.partition("/")
        expected = _expected(kind, own) if kind == "mask" else torch.zeros_like(found)
        assert torch.equal(found, expected), name
    assert set(_carry({}, masked=False)) == {name for name in state if not name.startswith("mask/")}
