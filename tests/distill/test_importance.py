"""Importance against formulas written out by hand, and the same on every layout as on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.importance import ActivationRecorder, gather_scores, weight_scores
from distill.scores import Scores
from distill.structure import Sizes
from parallel.collectives import broadcast_
from parallel.mesh import Mesh
from parallel.model import build_stage
from parallel.weights import load_weights
from tests.families import FAMILIES, save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

IDS = torch.tensor([[5, 17, 33, 2, 9, 61, 80, 96, 3, 11], [7, 7, 8, 2, 44, 51, 0, 4, 5, 6]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(10))])
VALID = torch.ones(2, 10, dtype=torch.bool)
VALID[0, 3] = VALID[1, 6:] = False


def _layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    return dict(enumerate(model.model.layers))


def _activation_scores(model: PreTrainedModel, ids: Tensor, positions: Tensor, valid: Tensor) -> Scores:
    with ActivationRecorder(_layers(model), Sizes.of(model.config)) as recorder, torch.no_grad():
        recorder.expect(valid)
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return gather_scores(recorder.measured, Mesh.single())


def _inputs_and_outputs(model: PreTrainedModel, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a module reads and gives at the positions that count, [T, K] each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        seen.append((read[VALID], (output if isinstance(output, Tensor) else output[0])[VALID]))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=IDS, position_ids=POSITIONS, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("method", "power"), [("l1", 1), ("l2", 2)])
def test_scores_of_weights_are_their_norms(method: str, power: int) -> None:
    config = tiny_config("llama")
    model = tiny_model(config)
    scores = gather_scores(weight_scores(_layers(model), Sizes.of(config), method), Mesh.single())
    hidden = torch.zeros(32, dtype=torch.float64)
    for index, layer in enumerate(model.model.layers):
        mlp, attention = layer.mlp, layer.self_attn
        gate, up, down = (
            module.weight.abs() ** power for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        torch.testing.assert_close(
            scores.ffn[index].double() ** power, gate.sum(1) + up.sum(1) + down.sum(0), rtol=1e-6, atol=0
        )
        q, k, v, o = (getattr(attention, f"{name}_proj").weight.abs() ** power for name in "qkvo")
        for group in range(4):
            queries, keys = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
            expected = q[queries].sum() + k[keys].sum() + v[keys].sum() + o[:, queries].sum()
            assert scores.groups[index][group].item() ** power == pytest.approx(expected.item(), rel=1e-6)
        hidden += sum(weight.sum(0) for weight in (gate, up, q, k, v)) + down.sum(1) + o.sum(1)
        assert scores.layers[index] ** power == pytest.approx(
            sum(w.sum().item() for w in (gate, up, down, q, k, v, o))
        )
    torch.testing.assert_close(scores.hidden.double() ** power, hidden, rtol=1e-6, atol=0)
    assert scores.hidden.dtype == scores.ffn[0].dtype == scores.groups[0].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_activation_is_the_norm_of_activation_times_outgoing_weight(family: str) -> None:
    config = tiny_config(family)
    model = tiny_model(config)
    scores = _activation_scores(model, IDS, POSITIONS, VALID)
    width = Sizes.of(config).head_width * 2
    hidden = torch.zeros(32, dtype=torch.float64)
    for index, layer in enumerate(model.model.layers):
        down = getattr(layer.mlp, "down_proj", None) or layer.mlp.c_proj
        into_mlp = (
            getattr(layer.mlp, "gate_proj", None)
            or getattr(layer.mlp, "gate_up_proj", None)
            or layer.mlp.c_fc
        )
        into_attention = getattr(layer.self_attn, "q_proj", None) or layer.self_attn.qkv_proj
        activation = _inputs_and_outputs(model, down)[0]
        expected = activation.norm(dim=0) * down.weight.norm(dim=0)
        torch.testing.assert_close(scores.ffn[index].double(), expected, rtol=1e-6, atol=0)
        out = layer.self_attn.o_proj
        per_channel = _inputs_and_outputs(model, out)[0].norm(dim=0) * out.weight.norm(dim=0)
        expected = torch.stack([part.norm() for part in per_channel.split(width)])
        torch.testing.assert_close(scores.groups[index].double(), expected, rtol=1e-6, atol=0)
        for reader in (into_attention, into_mlp):
            hidden += _inputs_and_outputs(model, reader)[0].square().sum(dim=0)
        before, after = _inputs_and_outputs(model, layer)
        influence = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        assert scores.layers[index] == pytest.approx(influence.item(), rel=1e-9)
    torch.testing.assert_close(scores.hidden.double(), hidden.sqrt(), rtol=1e-6, atol=0)


def test_positions_that_do_not_count_change_nothing() -> None:
    model = tiny_model(tiny_config("qwen3"))
    scores = _activation_scores(model, IDS, POSITIONS, VALID)
    padded = IDS.clone()
    padded[1, 6:] = 90  # what stands behind the last valid token reaches nothing that counts
    longer = torch.nn.functional.pad(padded, (0, 3), value=4)
    positions = torch.nn.functional.pad(POSITIONS, (0, 3))
    with_padding = _activation_scores(model, longer, positions, torch.nn.functional.pad(VALID, (0, 3)))
    _assert_same(with_padding, scores, rtol=1e-6)
    everything = _activation_scores(model, IDS, POSITIONS, torch.ones_like(VALID))
    assert not torch.allclose(everything.ffn[0], scores.ffn[0])


def test_hooks_are_gone_afterwards_and_misuse_is_told() -> None:
    model = tiny_model(tiny_config("llama"))
    with (
        pytest.raises(AssertionError, match="expect"),
        ActivationRecorder(_layers(model), Sizes.of(model.config)),
    ):
        model(input_ids=IDS, use_cache=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no position"):
        _activation_scores(model, IDS, POSITIONS, torch.zeros_like(VALID))


def test_the_best_channel_is_the_one_whose_loss_hurts_most() -> None:
    model = tiny_model(tiny_config("llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7] *= 50
        model.model.layers[2].mlp.down_proj.weight[:, 11] = 0
    scores = _activation_scores(model, IDS, POSITIONS, VALID)
    assert scores.ffn[2].argmax() == 7 and scores.ffn[2].argmin() == 11


def _assert_same(actual: Scores, expected: Scores, *, rtol: float) -> None:
    assert actual.method == expected.method and actual.layers.keys() == expected.layers.keys()
    torch.testing.assert_close(actual.hidden, expected.hidden, rtol=rtol, atol=0)
    for layer, influence in expected.layers.items():
        torch.testing.assert_close(actual.ffn[layer], expected.ffn[layer], rtol=rtol, atol=0)
        torch.testing.assert_close(actual.groups[layer], expected.groups[layer], rtol=rtol, atol=0)
        assert actual.layers[layer] == pytest.approx(influence, rel=1e-9)


def _score_stage(
    config: PretrainedConfig, folder: str, mesh: Mesh, *, compiled: bool = False
) -> tuple[Scores, Scores]:
    stage = build_stage(
        config, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False, compile_layers=compiled
    )
    load_weights(stage, Path(folder))
    sizes = Sizes.of(config)
    rows = [row for row in range(2) if row % mesh.dp.size == mesh.dp.rank]
    hidden = torch.empty(len(rows), IDS.shape[1], config.hidden_size, dtype=torch.float64)
    with ActivationRecorder(stage.layers, sizes) as recorder, torch.no_grad():
        recorder.expect(VALID[rows])
        for source in range(mesh.pp.size):
            if source == mesh.pp.rank:
                hidden = stage(IDS[rows] if stage.is_first else hidden, POSITIONS[rows])
            broadcast_(hidden, mesh.pp, source=source)
    activation = gather_scores(recorder.measured, mesh)
    return gather_scores(weight_scores(stage.layers, sizes), mesh), activation


@pytest.mark.slow
def test_compiled_layers_are_recorded_after_they_have_run_unrecorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile made for a layer without hooks is used for its like with them; the linears still call theirs."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_(self, backend="eager", **options)
    )
    config, mesh = tiny_config("llama", num_hidden_layers=2), Mesh.single()
    folder = str(save_tiny(tmp_path, config))
    stage = build_stage(
        config, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False, compile_layers=True
    )
    load_weights(stage, Path(folder))
    with torch.no_grad():
        stage(IDS, POSITIONS)
    (_, plain), (_, compiled) = (_score_stage(config, folder, mesh, compiled=each) for each in (False, True))
    assert compiled.hidden.sum() > 0 and torch.allclose(compiled.hidden, plain.hidden)
    for layer in range(2):
        assert torch.allclose(compiled.ffn[layer], plain.ffn[layer])


def _score(shape: dict[str, int], folders: dict[str, str]) -> dict[str, tuple[Scores, Scores]]:
    mesh = Mesh.create(**shape)
    return {family: _score_stage(tiny_config(family), folder, mesh) for family, folder in folders.items()}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"pp": 1, "dp": 1, "tp": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp": 1, "tp": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp": 2, "tp": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scores_do_not_depend_on_the_layout(shape: dict[str, int], tmp_path: Path) -> None:
    folders = {family: str(save_tiny(tmp_path / family, tiny_config(family))) for family in FAMILIES}
    ranks = run_distributed(shape["pp"] * shape["dp"] * shape["tp"], _score, shape, folders)
    for family in FAMILIES:
        model = tiny_model(tiny_config(family))
        l1 = gather_scores(weight_scores(_layers(model), Sizes.of(model.config)), Mesh.single())
        activation = _activation_scores(model, IDS, POSITIONS, VALID)
        for rank in ranks:
            _assert_same(rank[family][0], l1, rtol=1e-6)
            _assert_same(rank[family][1], activation, rtol=1e-6)
