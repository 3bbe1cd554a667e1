"""Masks against their formulas on whole matrices, in every layout, and held through training, saving and going on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.config import ConfigError
from distill.data import IGNORE
from distill.sparsity import Sparsifier, input_norms, progress_after
from distill.step import DistillationStep, messages
from distill.structure import MATRICES
from distill.student_config import Sparsity
from parallel import checkpoint
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links
from parallel.update_rules import OptimizerOptions
from parallel.weights import INDEX, export_weights, gather_tensor, load_weights
from tests.equivalence.trajectory import (
    ADAMW,
    ROWS,
    SEQ_LEN,
    Case,
    batch_of,
    make_step,
    mesh_of,
    save_models,
    save_now,
    share_of,
    state_of,
)
from tests.families import save_tiny, tiny_config, tiny_model
from tests.parallel.parts import owned
from tests.workers import run_distributed

RATE = LearningRate(3e-3, warmup_steps=0, total_steps=20, schedule="constant")
SETTINGS = [
    Sparsity(method="magnitude", ratio=0.3),
    Sparsity(method="wanda", ratio=0.4, schedule="linear", steps=4),
    Sparsity(method="magnitude", pattern="2:4", schedule="cubic", steps=4),
    Sparsity(method="wanda", pattern="2:4"),
]
FAMILY_LAYOUTS = [Case(*shape, "1f1b", "inline", "", 2) for shape in ((1, 1, 2), (2, 1, 1), (1, 2, 1))]


def _masks(optimizer: StageOptimizer) -> dict[str, Tensor]:
    """Return the whole masks of this rank's stages by the name of the weight."""
    return {
        slot.entry.name: gather_tensor(slot.view(optimizer.mask).to(torch.uint8), slot.entry).bool()
        for slot in optimizer.slots
    }


def _choose(family: str, folder: Path, case: Case, settings: Sparsity, steps: int = 0) -> dict[str, Tensor]:
    """Return the whole masks of this rank's stages after some steps that change no weight."""
    mesh, config = mesh_of(case), tiny_config(family)
    stage = build_stage(config, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64)
    load_weights(stage, folder)
    optimizer = StageOptimizer.of_stages([stage], mesh, OptimizerOptions(), RATE)
    norms = None
    if settings.method == "wanda":
        text = share_of(batch_of(0), case, mesh)
        message = messages(stage, None, rows=len(text[0].input_ids_BS), seq_len=SEQ_LEN)[Kind.F]
        norms = input_norms([stage], mesh, Links(mesh, {Kind.F: message}), text)
    sparsifier = Sparsifier([stage], optimizer, settings, total_steps=20, norms=norms)
    sparsifier.begin()
    for step in range(steps):
        sparsifier.advance(step)
    return _masks(optimizer)


def _plain_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return ||x_j||_2 of the inputs of the linears in decoder layers over the positions with a label."""
    batch, norms = batch_of(0), {}

    def hook(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        norms[f"{name}.weight"] = args[0][batch.labels_BS != IGNORE].norm(dim=0)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(partial(hook, name))
    with torch.no_grad():
        model(batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    return norms


def _lowest(scores: Tensor, share: float) -> Tensor:
    """Mark the share of each row's entries that is lowest."""
    count = round(share * scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(dim=1)[:, :count], True)


def _plain_mask(weight: Tensor, norm: Tensor, settings: Sparsity, progress: float) -> Tensor:
    scores = weight.abs() * (norm if settings.method == "wanda" else 1.0)
    by_row = settings.method == "wanda"
    if settings.pattern == "unstructured":
        sets = scores if by_row else scores.reshape(1, -1)
        return _lowest(sets, settings.ratio * progress).view_as(weight)
    fours = scores.reshape(-1, 4)
    low = _lowest(fours, 0.5)
    damage = (fours * low).sum(dim=1)
    chosen = _lowest(damage.view(len(weight), -1) if by_row else damage[None], progress)
    return (low & chosen.reshape(-1, 1)).view_as(weight)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: f"{each.method}-{each.pattern}")
def test_masks_are_those_of_the_formulas(family: str, settings: Sparsity, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tiny_config(family))
    model = tiny_model(tiny_config(family))
    norms = _plain_norms(model)
    single = replace(FAMILY_LAYOUTS[0], tp=1)
    rises = settings.schedule != "at_once"
    for steps, progress in ((0, 0.0), (2, 0.5), (4, 1.0), (9, 1.0)):
        if not rises:
            progress = 1.0
        elif settings.schedule == "cubic":
            progress = 1 - (1 - progress) ** 3
        masks = _choose(family, folder, single, settings, steps)
        sparse = [name for name, mask in masks.items() if mask.any()]
        assert sorted(sparse) == (sorted(norms) if progress else [])
        for name in sparse:
            weight = model.get_parameter(name).detach()
            assert torch.equal(masks[name], _plain_mask(weight, norms[name], settings, progress)), name


def _choose_all(folders: dict[str, Path], case: Case) -> list[dict[str, Tensor]]:
    return [
        _choose(family, folder, case, settings, 2)
        for family, folder in folders.items()
        for settings in SETTINGS
    ]


def test_masks_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    folders = {family: save_tiny(tmp_path / family, tiny_config(family)) for family in ("llama", "phi3")}
    expected = _choose_all(folders, replace(FAMILY_LAYOUTS[0], tp=1))
    for case in FAMILY_LAYOUTS:
        ranks = run_distributed(2, _choose_all, folders, case)
        for number, whole in enumerate(expected):
            together = {name: mask for rank in ranks for name, mask in rank[number].items()}
            assert together.keys() == whole.keys()
            for rank in ranks:
                assert all(torch.equal(mask, whole[name]) for name, mask in rank[number].items())


def test_equal_weights_go_by_their_order(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    model.save_pretrained(tmp_path)
    single = replace(FAMILY_LAYOUTS[0], tp=1)
    half = _choose("llama", tmp_path, single, Sparsity(method="magnitude"))
    mask = half["model.layers.0.mlp.up_proj.weight"]
    assert mask[:24].all() and not mask[24:].any()
    fours = _choose("llama", tmp_path, single, Sparsity(method="magnitude", pattern="2:4"))
    assert (
        fours["model.layers.3.self_attn.o_proj.weight"] == torch.tensor([True, True, False, False] * 16)
    ).all()


def test_weights_that_are_zero_by_themselves_add_nothing_to_the_share(tmp_path: Path) -> None:
    config = tiny_config("llama")
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64)
    load_weights(stage, save_tiny(tmp_path, config))
    optimizer = StageOptimizer.of_stages([stage], Mesh.single(), OptimizerOptions(), RATE)
    settings = Sparsity(method="magnitude", schedule="linear", steps=4)
    sparsifier = Sparsifier([stage], optimizer, settings, total_steps=9)
    sparsifier.begin()
    for step in range(4):
        before = optimizer.mask.clone()
        sparsifier.advance(step)
        assert optimizer.mask[before].all(), "what is held stays held"
        assert sparsifier.share() == pytest.approx(0.125 * (step + 1), abs=1e-3)
        # As many zeros as are held next, before them in every matrix.
        for slot in optimizer.slots:
            slot.entry.parameter.data[:8] = 0


def test_a_group_that_tp_cuts_is_refused(tmp_path: Path) -> None:
    config = tiny_config("llama", intermediate_size=44)
    tp = Axis("tp", size=2, rank=0)
    mesh = replace(Mesh.single(), tp=tp)
    stage = build_stage(config, pp=mesh.pp, tp=tp)
    optimizer = StageOptimizer.of_stages([stage], mesh, OptimizerOptions(), RATE)
    with pytest.raises(
        ConfigError, match=r"2:4 needs groups of 4 inputs, but mesh.tp=2 gives a rank inputs 0 to 22 of"
    ):
        Sparsifier([stage], optimizer, Sparsity("magnitude", "2:4"), total_steps=3)


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_the_share_rises_to_the_end_of_its_steps(schedule: str) -> None:
    rising = [progress_after(schedule, step, 10) for step in range(12)]
    assert rising[0] == 0 and rising[10:] == [1.0, 1.0] and sorted(rising) == rising
    assert rising[5] == pytest.approx({"cubic": 0.875, "linear": 0.5}[schedule])


# --- through training ---------------------------------------------------------------------------------------------

TRAINED = [
    Sparsity(method="magnitude", ratio=0.6, schedule="cubic", steps=14),
    Sparsity(method="wanda", pattern="2:4", schedule="linear"),
]
WIDE = Case(1, 2, 2, "1f1b", "fill", "tied", 2)
STEPS, MIDDLE = 20, 7


def _bound(
    case: Case, folders: dict[str, str], mesh: Mesh, settings: Sparsity, dtype: torch.dtype = torch.float64
) -> tuple[DistillationStep, Sparsifier]:
    step = make_step(case, folders, mesh, num_steps=STEPS, dtype=dtype)
    step.optimizer.learning_rate = RATE
    norms = None
    if settings.method == "wanda":
        text = share_of(batch_of(99), case, mesh)
        message = messages(step.student_models[0], None, rows=len(text[0].input_ids_BS), seq_len=SEQ_LEN)
        norms = input_norms(step.student_models, mesh, Links(mesh, {Kind.F: message[Kind.F]}), text)
    sparsifier = Sparsifier(step.student_models, step.optimizer, settings, total_steps=STEPS, norms=norms)
    sparsifier.begin()
    return step, sparsifier


def _train(step: DistillationStep, sparsifier: Sparsifier, steps: range) -> list[tuple[float, float]]:
    seen = []
    for number in steps:
        stats = step(number)
        _check_gradients(step.optimizer)
        sparsifier.advance(number)
        _check_held(step.optimizer)
        seen.append((stats.total, stats.grad_norm))
    return seen


def _check_held(optimizer: StageOptimizer) -> None:
    """Assert that whatever is marked is 0, with the sign of 0, in parameter, master and moments."""
    for entry, parts in optimizer.state():
        held = parts.pop("mask").read()
        zeros = [entry.parameter.detach().flatten()[held]]
        zeros += [part.read()[held[part.start : part.stop]] for part in parts.values()]
        for tensor in zeros:
            assert not tensor.any() and not tensor.signbit().any(), entry.name


def _check_gradients(optimizer: StageOptimizer) -> None:
    """Assert that no gradient of what is held enters the norm, on the replica that counts it."""
    for slot in optimizer.slots:
        gradient, held = (slot.view(flat).flatten() for flat in (optimizer.flat_grad, optimizer.mask))
        for start, stop in owned(optimizer, slot):
            assert not gradient[start:stop][held[start:stop]].any(), slot.entry.name


def _exported(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _whole_parameters(step: DistillationStep) -> dict[str, Tensor]:
    return {e.name: gather_tensor(e.parameter.detach(), e).clone() for e, _ in step.optimizer.state()}


def _train_wide(folders: dict[str, str], root: Path, settings: Sparsity) -> tuple:
    """Train, and train half, save, and go on; return losses, whole parameters and masks, share, and what differs."""
    mesh = mesh_of(WIDE)
    whole, sparsifier = _bound(WIDE, folders, mesh, settings)
    seen = _train(whole, sparsifier, range(STEPS))
    first, first_sparsifier = _bound(WIDE, folders, mesh, settings)
    _train(first, first_sparsifier, range(MIDDLE))
    saved = save_now(root, MIDDLE, first.optimizer, mesh, extras={}, keep=1)
    second, second_sparsifier = _bound(WIDE, folders, mesh, settings)
    checkpoint.restore(saved, second.optimizer, mesh)
    _check_held(second.optimizer)
    assert second_sparsifier.share() == first_sparsifier.share() > 0
    again = _train(second, second_sparsifier, range(MIDDLE, STEPS))
    expected = state_of(whole)
    differ = [name for name, value in state_of(second).items() if not torch.equal(value, expected[name])]
    if again != seen[MIDDLE:]:
        differ.append("losses")
    export = root / "export"
    if mesh.world.is_first:
        export.mkdir()
    export_weights(whole.student_models, mesh, export, dtype=torch.float32)
    for step in (whole, first, second):
        step.close()
    return seen, _whole_parameters(whole), _masks(whole.optimizer), sparsifier.share(), differ


@pytest.mark.slow
@pytest.mark.parametrize("settings", TRAINED, ids=lambda each: each.pattern)
def test_what_is_held_stays_zero_and_a_run_goes_on(settings: Sparsity, tmp_path: Path) -> None:
    folders = save_models(tmp_path / "models")
    single = replace(WIDE, dp=1, tp=1, num_microbatches=4)
    step, sparsifier = _bound(single, folders, Mesh.single(), settings)
    expected = _train(step, sparsifier, range(STEPS))
    masks, parameters, share = _masks(step.optimizer), _whole_parameters(step), sparsifier.share()
    step.close()
    assert share == pytest.approx(0.6 if settings.pattern == "unstructured" else 0.5, abs=1e-3)
    assert len([mask for mask in masks.values() if mask.any()]) == 4 * 7
    ranks = run_distributed(4, _train_wide, folders, tmp_path, settings)
    for seen, parameters_here, masks_here, share_here, differ in ranks:
        assert differ == [] and share_here == share
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-9, atol=1e-9)
        for name, mask in masks.items():
            assert torch.equal(masks_here[name], mask), name
            torch.testing.assert_close(parameters_here[name], parameters[name], rtol=1e-9, atol=1e-9)
    assert (tmp_path / "export" / INDEX).is_file()
    exported = _exported(tmp_path / "export")
    for name, mask in masks.items():
        assert not exported[name][mask].any()
        assert name.removesuffix(".weight").split(".", 3)[-1] not in MATRICES or mask.any()


def test_bf16_parameters_and_their_masters_are_held(tmp_path: Path) -> None:
    folders = save_models(tmp_path)
    case = replace(WIDE, dp=1, tp=1, num_microbatches=ROWS // 2)
    step, sparsifier = _bound(case, folders, Mesh.single(), TRAINED[0], torch.bfloat16)
    _train(step, sparsifier, range(4))
    assert step.optimizer.master(step.optimizer.slots[0]).dtype == torch.float32
    assert 0.3 < sparsifier.share() < 0.6
    step.close()


def test_nothing_is_allocated_without_sparsity(tmp_path: Path) -> None:
    folders = save_models(tmp_path)
    step = make_step(replace(WIDE, dp=1, tp=1), folders, Mesh.single())
    assert step.optimizer.mask is None and not any("mask" in parts for _, parts in step.optimizer.state())
    assert ADAMW.clip and step(0).grad_norm > 0
    step.close()
