"""The flat optimizer against torch's AdamW and clip_grad_norm_, alone and in every layout, and the learning rate's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from parallel import buckets
from parallel.background import Background
from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.pipeline.stage import TrainStage
from parallel.update_rules import OptimizerOptions
from parallel.weights import gather_tensor, load_weights
from tests.families import save_tiny, tiny_config, tiny_model
from tests.parallel.parts import whole_gradients, whole_state
from tests.workers import run_distributed

OPTIONS = OptimizerOptions(betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3, clip=0.05)
RATE = LearningRate(peak=0.01, warmup_steps=2, total_steps=6)


def _stage(tmp_path: Path, dtype: torch.dtype):
    config = tiny_config("qwen3", tie_word_embeddings=True)
    save_tiny(tmp_path, config)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=dtype)
    load_weights(stage, tmp_path)
    return config, stage


def test_five_steps_equal_torch_with_clipping_active(tmp_path: Path) -> None:
    config, stage = _stage(tmp_path, torch.float64)
    optimizer = StageOptimizer.of_stages([stage], Mesh.single(), OPTIONS, RATE)
    model = tiny_model(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIONS.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=OPTIONS.betas,
        eps=OPTIONS.eps,
    )
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9).expand(2, 9)
    for step in range(5):
        optimizer.zero_grad()
        stage.head(stage(ids, positions)).sin().sum().backward()
        optimizer.reduce(0)
        norm = optimizer.norm()
        rate = optimizer.step(step, norm)
        optimizer.gather()

        reference.zero_grad()
        model(input_ids=ids, use_cache=False).logits.sin().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        assert expected > OPTIONS.clip
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for entry, parts in optimizer.state():
        assert torch.equal(parts["weight"].read(), entry.parameter.detach().flatten())
        torch.testing.assert_close(
            entry.parameter.detach(), model.get_parameter(entry.name).detach(), rtol=1e-9, atol=1e-12
        )


def test_bf16_parameters_follow_a_float32_master(tmp_path: Path) -> None:
    _, stage = _stage(tmp_path, torch.bfloat16)
    optimizer = StageOptimizer.of_stages([stage], Mesh.single(), OPTIONS, LearningRate(1e-5, 0, 10))
    before = [optimizer.master(slot).clone() for slot in optimizer.slots]
    for step in range(3):
        optimizer.zero_grad()
        optimizer.flat_grad.fill_(0.01)
        optimizer.reduce(0)
        optimizer.step(step, optimizer.norm())
        optimizer.gather()
    assert optimizer.flat_grad.dtype == torch.float32
    for slot, old in zip(optimizer.slots, before, strict=True):
        master = optimizer.master(slot)
        assert master.dtype == torch.float32 and not torch.equal(master, old)
        assert torch.equal(slot.entry.parameter.detach(), master.bfloat16())


def test_held_entries_stay_zero_and_their_gradients_do_not_count(tmp_path: Path) -> None:
    """Against torch with weights and gradients multiplied by what is kept; more is held after the second step."""
    config, stage = _stage(tmp_path, torch.float64)
    optimizer = StageOptimizer.of_stages([stage], Mesh.single(), OPTIONS, RATE)
    model = tiny_model(config)
    names = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(4) for name in ("up", "down")]
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
            for matrix, decay in ((True, OPTIONS.weight_decay), (False, 0.0))
        ],
        betas=OPTIONS.betas,
        eps=OPTIONS.eps,
    )
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    optimizer.make_mask()
    held = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in names}
    for step in range(5):
        if step in (0, 2):
            for entry, parts in optimizer.state():
                if entry.name in held:
                    parameter = model.get_parameter(entry.name)
                    held[entry.name] |= torch.rand(parameter.shape) < 0.4
                    parts["mask"].write(held[entry.name])
                    for tensor in (parameter.data, *reference.state[parameter].values()):
                        if tensor.ndim:
                            tensor[held[entry.name]] = 0
            optimizer.apply_mask()
        optimizer.zero_grad()
        stage.head(stage(ids, torch.arange(9).expand(2, 9))).sin().sum().backward()
        optimizer.reduce(0)
        norm = optimizer.norm()
        rate = optimizer.step(step, norm)
        optimizer.gather()

        reference.zero_grad()
        model(input_ids=ids, use_cache=False).logits.sin().sum().backward()
        for name, mask in held.items():
            model.get_parameter(name).grad[mask] = 0
        expected = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for entry, parts in optimizer.state():
        parameter = model.get_parameter(entry.name)
        torch.testing.assert_close(entry.parameter.detach(), parameter.detach(), rtol=1e-9, atol=1e-12)
        mask = parts.pop("mask").read()
        assert not any(part.read()[mask].any() for part in parts.values())
        assert bool(mask.any()) == (entry.name in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_entries_stay_zero_under_a_rule_that_rounds_its_state(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    _, stage = _stage(tmp_path, dtype)
    options = replace(OPTIONS, name="adamw8bit")
    optimizer = StageOptimizer.of_stages([stage], Mesh.single(), options, LearningRate(0.1, 0, 10))
    optimizer.make_mask()
    # Every second one, so that each block of codes has neighbours that move.
    optimizer.mask[::2] = True
    optimizer.apply_mask()
    for step in range(4):
        optimizer.zero_grad()
        optimizer.flat_grad.normal_()
        optimizer.reduce(0)
        optimizer.step(step, optimizer.norm())
        optimizer.gather()
    for slot in optimizer.slots:
        held = slot.view(optimizer.mask)
        for values in (slot.entry.parameter.detach(), optimizer.master(slot)):
            assert not values[held].any() and values[~held].all(), slot.entry.name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, tmp_path: Path) -> None:
    _, stage = _stage(tmp_path, torch.float32)
    optimizer = StageOptimizer.of_stages([stage], Mesh.single(), OPTIONS, RATE)

    def step(number: int, gradient: float) -> list[torch.Tensor]:
        optimizer.zero_grad()
        optimizer.flat_grad[3] = gradient
        optimizer.reduce(0)
        assert optimizer.step(number, optimizer.norm()) == RATE.at(number)
        optimizer.gather()
        return [part.read().clone() for _, parts in optimizer.state() for part in parts.values()]

    before = step(6, 0.5)
    assert optimizer.num_updates == 1
    for left, right in zip(step(7, value), before, strict=True):
        assert torch.equal(left, right)
    assert optimizer.num_updates == 1
    assert not all(map(torch.equal, step(8, 0.5), before)) and optimizer.num_updates == 2


# Each in two micro-batches; 4 stages are two on each of two ranks.
IDS = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(9)
STEPS = 3
STUDENTS = {
    "untied": tiny_config("llama", tie_word_embeddings=False),
    "tied": tiny_config("qwen3", tie_word_embeddings=True),
}


@dataclass(frozen=True)
class Case:
    """A layout, and how the gradients come together in it."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    chunks: int = 1
    student: str = "untied"
    early: bool = False
    """Buckets are reduced on a background thread while the last micro-batch's backward runs."""
    broken: str = ""


@dataclass(frozen=True)
class Outcome:
    """Per step the norm; gradients of the last step before clipping, parameters after it; whole tensors by name."""

    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


CASES = {
    2: [
        Case(dp=2),
        Case(dp=2, student="tied"),
        Case(dp=2, student="tied", early=True),
        Case(tp=2),
        Case(tp=2, student="tied"),
        Case(pp=2, student="tied"),
        Case(pp=2, chunks=2, student="untied"),
        Case(pp=2, chunks=2, student="tied"),
    ],
    4: [
        Case(pp=2, dp=2, chunks=2, student="tied"),
        Case(pp=2, dp=2, chunks=2, student="tied", early=True),
        Case(dp=2, tp=2, student="tied"),
        Case(dp=2, tp=2, student="tied", early=True),
    ],
}


def _reference(student: str) -> Outcome:
    """Take the same steps with an unmodified model, torch's AdamW and its clipping."""
    model = tiny_model(STUDENTS[student])
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    decays = (OPTIONS.weight_decay, 0.0)
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)],
        betas=OPTIONS.betas,
        eps=OPTIONS.eps,
    )
    norms, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=IDS, use_cache=False).logits.sin().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = RATE.at(step)
        optimizer.step()
    return Outcome(norms, gradients, {name: p.detach() for name, p in model.named_parameters()})


class _Rank:
    """One rank of a pipeline run by hand: blocking messages, stage after stage."""

    def __init__(self, case: Case, mesh: Mesh, folder: Path) -> None:
        self.case, self.mesh = case, mesh
        self.num_stages = case.pp * case.chunks
        self.stages: dict[int, StageModel] = {}
        for place in range(mesh.pp.rank, self.num_stages, case.pp):
            axis = Axis("stage", self.num_stages, place)
            self.stages[place] = build_stage(STUDENTS[case.student], pp=axis, tp=mesh.tp, dtype=torch.float64)
            load_weights(self.stages[place], folder)
        self.trained = {place: TrainStage(stage) for place, stage in self.stages.items()}
        self.optimizer = StageOptimizer.of_stages(
            list(self.stages.values()), mesh, OPTIONS, RATE, bucket_bytes=1
        )

    def _owner(self, place: int) -> int:
        return self.mesh.pp.ranks[place % self.case.pp]

    def _pass_on(
        self, run: Callable[[int, Tensor | None], Tensor], order: range, shape: tuple[int, ...]
    ) -> None:
        """Call `run(stage, input)` on the stages in order; what it returns goes to the next."""
        value = None
        for place, following in zip(order, [*order[1:], None], strict=True):
            here, there = self._owner(place), None if following is None else self._owner(following)
            if here == dist.get_rank():
                value = run(place, value)
                if there not in (None, here):
                    dist.send(value, there)
            elif there == dist.get_rank():
                value = torch.empty(shape, dtype=torch.float64)
                dist.recv(value, here)

    def microbatch(self, number: int, layer_done: Callable[[int, int], None] | None) -> None:
        """Run forward, loss and backward of a micro-batch through the pipeline."""
        ids = IDS.chunk(self.mesh.dp.size)[self.mesh.dp.rank].chunk(2)[number]
        positions = POSITIONS.expand_as(ids)
        last = self.num_stages - 1
        outputs: dict[int, Tensor] = {}

        def forward(place: int, x: Tensor | None) -> Tensor:
            outputs[place] = self.trained[place].forward(number, ids if place == 0 else x, positions)
            return outputs[place]

        def backward(place: int, grad: Tensor | None) -> Tensor:
            if place == last:
                hidden = outputs[last].requires_grad_()
                self.stages[last].head(hidden).sin().sum().backward()
                grad = hidden.grad
            tell = None if layer_done is None else partial(layer_done, place // self.case.pp)
            return self.trained[place].backward(number, grad, layer_done=tell)

        shape = (*ids.shape, 32)
        self._pass_on(forward, range(self.num_stages), shape)
        self._pass_on(backward, range(last, -1, -1), shape)

    def step(self, step: int) -> tuple[float, dict[str, Tensor]]:
        """Take an optimizer step; return norm and gradients before clipping."""
        optimizer, done, beside = self.optimizer, set(), Background("reductions")
        early: list[tuple[int, int]] = []

        def layer_done(chunk: int, layer: int) -> None:
            done.add(layer)
            for index, bucket in enumerate(optimizer.buckets(chunk)):
                if layer in bucket.layers and bucket.layers <= done:
                    early.append((chunk, index))
                    beside.submit(partial(optimizer.reduce_bucket, chunk, index))

        optimizer.zero_grad()
        self.microbatch(0, None)
        self.microbatch(1, layer_done if self.case.early else None)
        whole_layers = [
            bucket.layers for chunk in range(self.case.chunks) for bucket in optimizer.buckets(chunk)
        ]
        assert len(early) == (sum(map(bool, whole_layers)) if self.case.early else 0)
        if self.case.broken == "bucket":
            optimizer._reduced.add((0, 1))
        for chunk in reversed(range(self.case.chunks)):
            beside.submit(partial(optimizer.reduce, chunk))
        norm = beside.submit(optimizer.norm).result()
        beside.close()
        gradients = whole_gradients(optimizer)
        optimizer.step(step, norm)
        optimizer.gather()
        return norm.item(), gradients


def _key(entry: buckets.Entry) -> str:
    return entry.name + ("@tied" if entry.is_tied_copy else "")


def _run(cases: list[Case], folders: dict[str, Path]) -> list[Outcome]:
    """Take the steps in each layout; return this rank's tensors, whole."""
    outcomes, is_counted = [], buckets.is_counted
    for case in cases:
        mesh = Mesh.create(pp=case.pp, dp=case.dp, tp=case.tp)
        if case.broken == "tie":
            mesh = replace(mesh, gradients=replace(mesh.gradients, tie=Axis("tie")))
        if case.broken == "replicated":
            buckets.is_counted = lambda entry, tp: not entry.is_tied_copy
        if case.broken == "tied":
            buckets.is_counted = lambda entry, tp: entry.shard is not None or tp.is_first
        try:
            rank = _Rank(case, mesh, folders[case.student])
        finally:
            buckets.is_counted = is_counted
        steps = [rank.step(step) for step in range(STEPS)]
        parameters = {
            _key(entry): gather_tensor(entry.parameter.detach(), entry).clone()
            for entry, _ in rank.optimizer.state()
        }
        outcomes.append(Outcome([norm for norm, _ in steps], steps[-1][1], parameters))
    return outcomes


def _differences(ranks: list[Outcome], expected: Outcome) -> set[str]:
    """Return what a layout does not have as the reference has it: norm, gradients, parameters or names."""
    found, seen = set(), set()

    def differ(value: Tensor, other: Tensor, atol: float) -> bool:
        return not torch.allclose(value, other, rtol=1e-9, atol=atol)

    for outcome in ranks:
        if differ(torch.tensor(outcome.norms), torch.tensor(expected.norms), 0.0):
            found.add("norm")
        for kind in ("gradients", "parameters"):
            for key, value in getattr(outcome, kind).items():
                seen.add(key.removesuffix("@tied"))
                if differ(value, getattr(expected, kind)[key.removesuffix("@tied")], 1e-12):
                    found.add(kind)
    return found | ({"names"} if seen != expected.parameters.keys() else set())


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    return {name: _reference(name) for name in STUDENTS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, config) for name, config in STUDENTS.items()}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_equals_one_process(
    world_size: int, folders: dict[str, Path], references: dict[str, Outcome]
) -> None:
    assert all(min(reference.norms) > OPTIONS.clip for reference in references.values())
    ranks = run_distributed(world_size, _run, CASES[world_size], folders)
    by_case = {case: [rank[index] for rank in ranks] for index, case in enumerate(CASES[world_size])}
    for case, outcomes in by_case.items():
        assert _differences(outcomes, references[case.student]) == set(), case
        assert len({tuple(outcome.norms) for outcome in outcomes}) == 1, "one norm on every rank, bit for bit"
        late = by_case[replace(case, early=False)]
        for outcome, other in zip(outcomes, late, strict=True):
            assert outcome.norms == other.norms
            for key, value in outcome.parameters.items():
                assert torch.equal(value, other.parameters[key]), (case, key)


def _masters(folder: Path) -> dict[str, Tensor]:
    """Return the masters of bf16 parameters after a step, as each replica is told them."""
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    stage = build_stage(STUDENTS["untied"], pp=mesh.pp, tp=mesh.tp, dtype=torch.bfloat16)
    load_weights(stage, folder)
    optimizer = StageOptimizer.of_stages([stage], mesh, OPTIONS, RATE, bucket_bytes=1)
    optimizer.zero_grad()
    for slot in optimizer.slots:
        slot.entry.parameter.main_grad.fill_(0.1)
    optimizer.reduce(0)
    optimizer.step(0, optimizer.norm())
    optimizer.gather()
    masters = {slot.entry.name: optimizer.master(slot).clone() for slot in optimizer.slots}
    joined = whole_state(optimizer, ("weight",))
    for slot in optimizer.slots:
        name = slot.entry.name
        assert torch.equal(masters[name], joined[f"weight/{name}"]), name
        assert not torch.equal(masters[name], slot.entry.parameter.detach().float()), "rounded"
    return masters


def test_masters_that_are_cut_over_replicas_are_whole_on_each(folders: dict[str, Path]) -> None:
    one, other = run_distributed(2, _masters, folders["untied"])
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], master) for name, master in one.items())


def test_what_is_forgotten_or_counted_twice_is_seen(
    folders: dict[str, Path], references: dict[str, Outcome]
) -> None:
    broken = {
        Case(dp=2, broken="bucket"): {"norm", "gradients", "parameters"},
        Case(tp=2, broken="replicated"): {"norm", "parameters"},
        Case(pp=2, chunks=2, student="tied", broken="tied"): {"norm", "parameters"},
        Case(pp=2, chunks=2, student="tied", broken="tie"): {"norm", "gradients", "parameters"},
    }
    ranks = run_distributed(2, _run, list(broken), folders)
    for index, (case, expected) in enumerate(broken.items()):
        found = _differences([rank[index] for rank in ranks], references[case.student])
        assert expected <= found, (case, found)


def test_order_and_number_of_reductions_are_checked(folders: dict[str, Path]) -> None:
    ends = [build_stage(STUDENTS["tied"], pp=Axis("stage", 2, place), tp=Axis("tp")) for place in range(2)]
    with pytest.raises(AssertionError, match="both ends of a tie on one rank"):
        StageOptimizer.of_stages(ends, Mesh.single(), OPTIONS, RATE)
    stages = [
        build_stage(STUDENTS["untied"], pp=Axis("stage", 2, place), tp=Axis("tp")) for place in range(2)
    ]
    optimizer = StageOptimizer.of_stages(stages, Mesh.single(), OPTIONS, RATE)
    optimizer.reduce_bucket(1, 0)
    with pytest.raises(AssertionError, match="bucket 0 of chunk 1 is already reduced"):
        optimizer.reduce_bucket(1, 0)
    optimizer.reduce(1)
    with pytest.raises(AssertionError, match="chunk 1 is already reduced"):
        optimizer.reduce(1)
    with pytest.raises(AssertionError, match=r"only chunks \[1\] are reduced"):
        optimizer.norm()
    optimizer.zero_grad()
    optimizer.reduce_bucket(1, 0)


def _large_allocations(work: Callable[[], object]) -> list[int]:
    """Return the sizes of the tensors above 4 KiB that `work` allocates, temporary ones included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 4096]


def _buffers(optimizer: StageOptimizer) -> list[Tensor]:
    stores = optimizer._engine.updater.stores.values()
    return [optimizer._buffers.flat, optimizer.flat_grad, *(store.flat for store in stores)]


def _places(optimizer: StageOptimizer) -> list[int]:
    """Return where everything lies: buffers, parameters, their gradients, masters and moments."""
    tensors = _buffers(optimizer)
    for entry, parts in optimizer.state():
        tensors += [entry.parameter, entry.parameter.main_grad, *(part.read() for part in parts.values())]
    return [tensor.data_ptr() for tensor in tensors]


def _steady_state(folder: Path, dtype: torch.dtype, masked: bool) -> tuple[list[int], bool, bool]:
    """Return the large allocations of the third step, whether everything stayed where it was, whether it is aligned."""
    mesh = Mesh.create(pp=1, dp=2, tp=1)
    stages = [
        build_stage(STUDENTS["untied"], pp=Axis("stage", 2, place), tp=mesh.tp, dtype=dtype)
        for place in range(2)
    ]
    for stage in stages:
        load_weights(stage, folder)
    optimizer = StageOptimizer.of_stages(stages, mesh, OPTIONS, RATE, bucket_bytes=1)
    if masked:
        optimizer.make_mask()

    def step(number: int) -> None:
        optimizer.zero_grad()
        optimizer.flat_grad.add_(0.1)
        for chunk in (1, 0):
            optimizer.reduce_bucket(chunk, 0)
            optimizer.reduce(chunk)
        optimizer.step(number, optimizer.norm())
        optimizer.gather()

    before = _places(optimizer)
    starts = [bucket.start for chunk in range(2) for bucket in optimizer.buckets(chunk)]
    assert len(starts) == 5 and min(buffer.nbytes for buffer in _buffers(optimizer)) > 100_000
    begins = [buffer[start:].data_ptr() for buffer in _buffers(optimizer) for start in starts]
    step(0)
    step(1)
    large = _large_allocations(partial(step, 2))
    return large, _places(optimizer) == before, all(place % 64 == 0 for place in (*before, *begins))


@pytest.mark.parametrize(
    ("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_step_allocates_nothing_and_buffers_are_aligned(
    dtype: torch.dtype, masked: bool, folders: dict[str, Path]
) -> None:
    grown = torch.zeros(10_000)
    assert _large_allocations(lambda: (grown + 1).sum()), "a temporary tensor is seen"
    assert run_distributed(2, _steady_state, folders["untied"], dtype, masked) == [([], True, True)] * 2


def test_learning_rate_warms_up_and_decays() -> None:
    rate = LearningRate(1.0, warmup_steps=4, total_steps=14, schedule="cosine", min_ratio=0.1)
    assert [rate.at(step) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert rate.at(9) == pytest.approx(0.55)
    assert rate.at(14) == rate.at(100) == pytest.approx(0.1)
    assert LearningRate(1.0, 0, 10, "linear").at(5) == pytest.approx(0.5)
    assert LearningRate(1.0, 0, 10, "constant").at(9) == 1.0
