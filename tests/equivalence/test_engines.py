"""One update, whoever makes it: both engines, every rule and stage in every layout against torch's optimizer on whole tensors.

No model runs: each rank gets its part of known gradients, as a backward would leave them there, so that all of it takes a
second. Checkpoints of each layout, stage and engine are gone on with by the others.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel.buckets import Slot
from parallel.checkpoint import CheckpointError, restore
from parallel.mesh import Mesh
from parallel.model import build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.update_rules import RULES, OptimizerOptions, Range
from parallel.weights import gather_tensor, load_weights
from tests.equivalence.trajectory import layout_name, save_now
from tests.families import save_tiny, tiny_config
from tests.parallel.parts import whole_state
from tests.workers import run_distributed

CONFIG = tiny_config("qwen3", tie_word_embeddings=True)
OPTIONS = OptimizerOptions(betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, momentum=0.7, clip=2.0)
RATE = LearningRate(peak=1e-2, warmup_steps=2, total_steps=8)
STEPS, MIDDLE = 4, 2
NEAR = {torch.float64: 1e-9, torch.float32: 1e-5}
"""How far the steps after a restart may be from those of another layout or engine."""
LAYOUTS = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)]
OWN = [replace(OPTIONS, zero_stage=stage) for stage in (0, 1)]
THEIRS = [
    replace(OPTIONS, engine="deepspeed"),
    replace(OPTIONS, engine="deepspeed", zero_stage=2),
    replace(OPTIONS, engine="deepspeed", offload=True),
]


@dataclass(frozen=True)
class Case:
    """A layout and who updates in it."""

    layout: tuple[int, int, int]
    options: OptimizerOptions
    dtype: torch.dtype = torch.float64


@dataclass
class Outcome:
    """Norms of the steps, and parameters and state after the last one, whole."""

    norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def _gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64) / 20


def _share(slot: Slot, mesh: Mesh) -> float:
    """Return which share of a whole gradient this rank's backward leaves."""
    share = (mesh.dp.rank + 1) / sum(range(1, mesh.dp.size + 1))
    if slot.entry.tp_partial_grad:
        share *= (mesh.tp.rank + 1) / sum(range(1, mesh.tp.size + 1))
    if mesh.pp.size > 1 and (slot.entry.is_tied_source or slot.entry.is_tied_copy):
        share *= 0.75 if slot.entry.is_tied_copy else 0.25
    return share


def _held(shape: tuple[int, ...]) -> Tensor:
    """Return which entries of a parameter are held at 0, where some are: every third of a matrix."""
    return (torch.arange(math.prod(shape)).view(shape) % 3 == 0) & (len(shape) > 1)


def _hold(optimizer: StageOptimizer) -> None:
    optimizer.make_mask()
    for slot in optimizer.slots:
        slot.view(optimizer.mask).copy_(_held(tuple(slot.entry.parameter.shape)))
    optimizer.apply_mask()


def _take_step(optimizer: StageOptimizer, step: int, *, spoiled: bool = False) -> float:
    optimizer.zero_grad()
    for slot in optimizer.slots:
        entry = slot.entry
        gradient = _gradient(entry.name, entry.full_shape, step)
        if entry.shard is not None:
            gradient = gradient.narrow(
                entry.shard.dim, entry.shard.start, entry.shard.stop - entry.shard.start
            )
        gradient = gradient * math.nan if spoiled else gradient
        entry.parameter.main_grad.add_(gradient * _share(slot, optimizer.mesh))
    optimizer.reduce(0)
    norm = optimizer.norm()
    optimizer.step(step, norm)
    optimizer.gather()
    return norm.item()


def _meshes(cases: list[Case]) -> dict[tuple[int, int, int], Mesh]:
    """Return the mesh of each layout: making groups takes longer than all the rest."""
    layouts = dict.fromkeys(case.layout for case in cases)
    return {(pp, dp, tp): Mesh.create(pp=pp, dp=dp, tp=tp) for pp, dp, tp in layouts}


def _open(case: Case, mesh: Mesh, folder: Path) -> StageOptimizer:
    stage = build_stage(CONFIG, pp=mesh.pp, tp=mesh.tp, dtype=case.dtype)
    load_weights(stage, folder)
    return StageOptimizer.of_stages([stage], mesh, case.options, RATE, bucket_bytes=1)


def _outcome(optimizer: StageOptimizer, norms: list[float]) -> Outcome:
    parameters = {
        slot.entry.name + ("@tied" if slot.entry.is_tied_copy else ""): gather_tensor(
            slot.entry.parameter.detach(), slot.entry
        ).clone()
        for slot in optimizer.slots
    }
    kinds = optimizer.kinds
    return Outcome(norms, parameters, whole_state(optimizer, ("weight", *kinds)))


def _skip(cases: list[Case], folder: Path) -> list[tuple[Outcome, Outcome]]:
    """For each case: three steps with some between that are not finite, and the three alone."""
    meshes, found = _meshes(cases), []
    for case in cases:
        pair = []
        for steps in ([0, None, None, 1, None, 2], [0, 1, 2]):
            optimizer = _open(case, meshes[case.layout], folder)
            norms = [_take_step(optimizer, step or 0, spoiled=step is None) for step in steps]
            assert [not math.isfinite(norm) for norm in norms] == [step is None for step in steps]
            pair.append(_outcome(optimizer, [norm for norm in norms if math.isfinite(norm)]))
        found.append(tuple(pair))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_that_is_not_finite_leaves_nothing_behind(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", CONFIG)
    cases = [Case((1, 2, 1), options, dtype) for options in (OWN[1], THEIRS[0], THEIRS[2])]
    for rank in run_distributed(2, _skip, cases, folder):
        for case, (skipped, plain) in zip(cases, rank, strict=True):
            assert skipped.norms == plain.norms, case
            for name, value in plain.parameters.items():
                assert torch.equal(skipped.parameters[name], value), (case, name)


def _update(cases: list[Case], folder: Path, holds: bool) -> list[Outcome]:
    """Take the steps of each case, with some entries held at 0 if `holds`."""
    outcomes, meshes = [], _meshes(cases)
    for case in cases:
        optimizer = _open(case, meshes[case.layout], folder)
        if holds:
            _hold(optimizer)
        outcomes.append(_outcome(optimizer, [_take_step(optimizer, step) for step in range(STEPS)]))
    return outcomes


def _reference(options: OptimizerOptions, folder: Path, *, holds: bool) -> Outcome:
    """Take the same steps with torch's optimizer on whole tensors, weights and gradients 0 where they are held."""
    tensors = load_file(folder / "model.safetensors")
    held = {name: _held(tuple(tensor.shape)) & holds for name, tensor in tensors.items()}
    parameters = {
        name: torch.nn.Parameter(tensor.double().masked_fill(held[name], 0))
        for name, tensor in tensors.items()
    }
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ranges = [Range(each, each.ndim > 1, slice(0, 0)) for each in parameters.values()]
    rule = RULES[options.name]
    decay = {True: options.weight_decay, False: 0.0}
    optimizer = rule.optimizer(
        [{"params": [each.parameter], "weight_decay": decay[each.decays]} for each in ranges],
        lr=0.0,
        **{**rule.settings(options), **({"fused": False} if "fused" in rule.settings(options) else {})},
    )
    norms = []
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = _gradient(name, tuple(parameter.shape), step).masked_fill(held[name], 0)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), options.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = RATE.at(step)
        optimizer.step()
    state = {
        f"{kind}/{name}": optimizer.state[parameter][kind]
        for name, parameter in parameters.items()
        for kind in rule.kinds(options)
    }
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return Outcome(norms, values, state | {f"weight/{name}": value for name, value in values.items()})


def _check(ranks: list[Outcome], expected: Outcome, case: Case) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 2e-2}[case.dtype]
    seen: set[str] = set()
    for outcome in ranks:
        torch.testing.assert_close(outcome.norms, expected.norms, rtol=min(tolerance, 1e-6), atol=0)
        for kind in ("parameters", "state"):
            for key, value in getattr(outcome, kind).items():
                name = key.removesuffix("@tied")
                seen.add(name)
                wanted = getattr(expected, kind)[name].to(value.dtype)
                # Masters of bf16 parameters are float32, as good as those of float32 ones but for where they began.
                where = f"{case} {key}"
                torch.testing.assert_close(
                    value, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, at=where: f"{at}: {m}"
                )
    assert seen == expected.parameters.keys() | expected.state.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models"), CONFIG)


def _size(layout: tuple[int, int, int]) -> int:
    return layout[0] * layout[1] * layout[2]


def _check_all(
    world_size: int, cases: list[Case], folder: Path, *, holds: bool = False
) -> dict[Case, list[Outcome]]:
    """Take the steps, compare with torch, and return what each rank has of each case."""
    ranks = run_distributed(world_size, _update, cases, folder, holds, timeout_s=300)
    by_case = {case: [rank[index] for rank in ranks] for index, case in enumerate(cases)}
    for case, outcomes in by_case.items():
        expected = _reference(case.options, folder, holds=holds)
        assert min(expected.norms) > case.options.clip, "clipping must be active"
        _check(outcomes, expected, case)
        assert len({tuple(outcome.norms) for outcome in outcomes}) == 1, "one norm on every rank, bit for bit"
    return by_case


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rule_in_every_layout(world_size: int, folder: Path) -> None:
    layouts = [layout for layout in LAYOUTS if _size(layout) == world_size]
    cases = [
        Case(layout, replace(options, name=name))
        for layout, options, name in itertools.product(
            layouts, OWN, RULES if world_size < 4 else ("adamw", "sgd")
        )
    ]
    by_case = _check_all(world_size, cases, folder)
    for case, outcomes in by_case.items():
        other = by_case[replace(case, options=replace(case.options, zero_stage=1 - case.options.zero_stage))]
        for one, two in zip(outcomes, other, strict=True):
            assert one.norms == pytest.approx(two.norms, rel=1e-14)
            if case.layout[1] == 2:
                same = [torch.equal(value, two.parameters[key]) for key, value in one.parameters.items()]
                assert one.norms == two.norms and all(same), (case, "stages 0 and 1 have the same bits")


def test_bf16_parameters_are_rounded_masters_which_do_not_depend_on_the_stage(folder: Path) -> None:
    whole, cut = (Case((1, 2, 1), options, torch.bfloat16) for options in OWN)
    by_case = _check_all(2, [whole, cut], folder)
    for one, two in zip(by_case[whole], by_case[cut], strict=True):
        assert one.norms == two.norms and one.state.keys() == two.state.keys()
        for key, value in one.state.items():
            assert value.dtype == torch.float32 and torch.equal(two.state[key], value), key
        for name, value in two.parameters.items():
            assert torch.equal(value, two.state[f"weight/{name}"].bfloat16()), name


def test_held_entries_stay_zero_where_gradients_are_cut_over_replicas(folder: Path) -> None:
    case = Case((1, 2, 1), OWN[1])
    for outcome in _check_all(2, [case], folder, holds=True)[case]:
        for key, value in (outcome.parameters | outcome.state).items():
            assert not value[_held(tuple(value.shape))].any(), key


def _theirs(layout: tuple[int, int, int], names: tuple[str, ...]) -> list[Case]:
    adamw = [Case(layout, options) for options in THEIRS]
    return adamw + [Case(layout, replace(THEIRS[0], name=name)) for name in names]


@pytest.mark.parametrize(
    "layouts",
    [
        [(1, 2, 1)],
        *(pytest.param(each, marks=pytest.mark.slow) for each in ([(1, 1, 1)], LAYOUTS[1:2], LAYOUTS[2:])),
    ],
    ids=["dp2", "single", "every rule", "four ranks"],
)
def test_deepspeed_updates_as_one_process_does(
    layouts: list[tuple[int, int, int]], folder: Path, request: pytest.FixtureRequest
) -> None:
    names = tuple(RULES)[1:] if "every rule" in request.node.name else ("sgd",)
    cases = [case for layout in layouts for case in _theirs(layout, names)]
    cases.append(Case(layouts[0], THEIRS[1], torch.float32))
    if _size(layouts[0]) == 2:
        # The two ends of a tie, and what both shards have whole: each counts once.
        cases += [Case(layout, THEIRS[0]) for layout in ((2, 1, 1), (1, 1, 2))]
    _check_all(_size(layouts[0]), cases, folder)


def _go_on(cases: list[Case], sources: list[Path], root: Path, folder: Path) -> list[str]:
    """Train each case and save it in the middle; go on from every source and from each other; return what differs."""
    meshes, differ = _meshes(cases), []
    for number, case in enumerate(cases):
        optimizer = _open(case, meshes[case.layout], folder)
        whole = [_take_step(optimizer, step) for step in range(MIDDLE)]
        own = root / f"{number}-{_name(case)}"
        saved = save_now(own, MIDDLE, optimizer, optimizer.mesh, extras={}, keep=1)
        whole += [_take_step(optimizer, step) for step in range(MIDDLE, STEPS)]
        for source in (saved, *sources):
            other = _open(case, meshes[case.layout], folder)
            restore(source, other, other.mesh)
            assert other.num_updates == MIDDLE
            norms = [_take_step(other, step) for step in range(MIDDLE, STEPS)]
            differ += _differences(
                optimizer, other, exact=source == saved, where=f"{_name(case)} from {source}"
            )
            near = pytest.approx(whole[MIDDLE:], rel=NEAR[case.dtype])
            if norms != (whole[MIDDLE:] if source == saved else near):
                differ.append(f"{_name(case)} from {source}: norms {norms}, not {whole[MIDDLE:]}")
        sources = [*sources, saved]
    return differ


def _differences(one: StageOptimizer, two: StageOptimizer, *, exact: bool, where: str) -> Iterator[str]:
    for mine, other in zip(one.slots, two.slots, strict=True):
        values = mine.entry.parameter.detach(), other.entry.parameter.detach()
        near = NEAR[values[0].dtype]
        same = torch.equal(*values) if exact else torch.allclose(*values, rtol=near, atol=near / 10)
        if not same:
            yield f"{where}: {mine.entry.name}"


def _name(case: Case) -> str:
    return f"{layout_name(case.layout)}-{case.options.engine}-{case.options.zero_stage}"


def _saved(root: Path) -> list[Path]:
    return sorted(root.glob(f"*/step-{MIDDLE:08d}"))


SINGLES = [Case((1, 1, 1), OWN[1])]
PAIRS = [Case((1, 2, 1), options) for options in OWN]
FOURS = [Case(layout, OWN[1]) for layout in LAYOUTS[2:]]


@pytest.mark.parametrize("through", [[], pytest.param([FOURS], marks=pytest.mark.slow)], ids=["two", "four"])
def test_any_layout_and_stage_goes_on_from_any_other(
    through: list[list[Case]], folder: Path, tmp_path: Path
) -> None:
    for number, cases in enumerate((PAIRS, *through, SINGLES)):
        root = tmp_path / str(number)
        sources = [path for other in range(number) for path in _saved(tmp_path / str(other))]
        ranks = run_distributed(_size(cases[0].layout), _go_on, cases, sources, root, folder, timeout_s=300)
        assert ranks == [[]] * len(ranks)
    files = {path.name for path in _saved(tmp_path / "0")[1].iterdir()}
    assert files == {
        "manifest.json",
        "stage-000-tp-00.safetensors",
        "stage-000-tp-00-dp-01.safetensors",
    }


@pytest.mark.slow
def test_either_engine_goes_on_from_the_other(folder: Path, tmp_path: Path) -> None:
    pairs = [*PAIRS, *_theirs((1, 2, 1), ())]
    fours = [Case(layout, THEIRS[0]) for layout in LAYOUTS[2:]]
    for number, cases in enumerate((pairs, fours, SINGLES)):
        root = tmp_path / str(number)
        sources = [path for other in range(number) for path in _saved(tmp_path / str(other))]
        ranks = run_distributed(_size(cases[0].layout), _go_on, cases, sources, root, folder, timeout_s=300)
        assert ranks == [[]] * len(ranks)


def test_state_of_another_rule_is_refused(folder: Path, tmp_path: Path) -> None:
    first, second = (
        _open(Case((1, 1, 1), replace(OPTIONS, name=name)), Mesh.single(), folder)
        for name in ("sgd", "adamw")
    )
    _take_step(first, 0)
    saved = save_now(tmp_path, 1, first, first.mesh, extras={}, keep=1)
    with pytest.raises(
        CheckpointError, match=r"state of another rule: momentum_buffer, not exp_avg, exp_avg_sq"
    ):
        restore(saved, second, second.mesh)


@pytest.mark.slow
def test_eight_bit_moments_in_every_stage(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = [replace(each, name="adamw8bit") for each in (*OWN, THEIRS[0])]
    cases = [Case((1, 2, 1), each, torch.float32) for each in options]
    for rank in run_distributed(2, _update, cases, folder, False, timeout_s=300):
        for other in rank[1:]:
            for key, value in rank[0].parameters.items():
                torch.testing.assert_close(other.parameters[key], value, rtol=1e-6, atol=1e-6)
        same = [torch.equal(rank[1].parameters[key], value) for key, value in rank[0].parameters.items()]
        assert all(same), "stages 0 and 1 have the same bits"
    assert run_distributed(2, _go_on, cases, [], tmp_path, folder, timeout_s=300) == [[], []]
