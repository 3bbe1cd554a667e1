"""A stage with a micro-batch: whole against split backward, layers done, what is kept how long, slices against the whole."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.pipeline.stage import ForwardStage, TrainStage
from parallel.recompute import Recompute
from parallel.update_rules import OptimizerOptions
from parallel.weights import load_weights, parameter_table
from tests.families import FAMILIES as ALL_FAMILIES
from tests.families import save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

IDS = [torch.tensor([[5, 17, 33, 2, 9, 61, 80], [7, 7, 8, 2, 44, 51, 0]]), torch.tensor([[3] * 7, [96] * 7])]
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
FAMILIES = ("llama", "qwen3", "gemma2", "phi3")
STAGES = [Axis("pp", 2, 0), Axis("pp", 2, 1)]


def _stages(family: str, folder: Path, tp: Axis, **options: object) -> list[StageModel]:
    config = tiny_config(family)
    stages = [build_stage(config, pp=pp, tp=tp, dtype=torch.float64, **options) for pp in STAGES]
    for stage in stages:
        load_weights(stage, folder)
    return stages


def _flat_gradients(stage: StageModel) -> None:
    """Let the gradients gather in an optimizer's flat buffer, as in training."""
    StageOptimizer.of_stages([stage], Mesh.single(), OptimizerOptions(), LearningRate(1.0, 0, 1))


def _gradients(stages: list[StageModel]) -> dict[str, Tensor]:
    """Return the gradients by name, but the head's: it runs with the loss, not here."""
    return {
        entry.name: getattr(entry.parameter, "main_grad", entry.parameter.grad)
        for stage in stages
        for entry in parameter_table(stage)
        if not entry.is_tied_copy and not entry.name.startswith("lm_head.")
    }


def _train(stages: list[StageModel], *, split: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run two micro-batches through both stages; return the input gradients of the second, and all weight gradients."""
    first, second = (TrainStage(stage) for stage in stages)
    for index, ids in enumerate(IDS):
        hidden = first.forward(index, ids, POSITIONS)
        last = second.forward(index, hidden, POSITIONS)
        assert not hidden.requires_grad and not last.requires_grad
    assert first.num_kept == second.num_kept == 2
    inputs = []
    for index in range(2):
        gradient = last.cos() * (index + 1)
        for stage in (second, first):
            gradient = (stage.backward_input if split else stage.backward)(index, gradient)
            if stage is second:
                inputs.append(gradient)
        assert gradient is None, "ids have no gradient"
        assert first.num_kept == second.num_kept == 1 - index
    for stage in (first, second) if split else ():
        for index in range(2):
            stage.backward_weight(index)
        assert not stage._weight_work
    return inputs, _gradients(stages)


def _compare(whole: tuple, split: tuple) -> list[str]:
    (inputs, weights), (other_inputs, other_weights) = whole, split
    differ = [f"input {i}" for i, x in enumerate(inputs) if not torch.equal(x, other_inputs[i])]
    assert weights.keys() == other_weights.keys()
    return differ + [key for key, value in weights.items() if not torch.equal(value, other_weights[key])]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_backward_equals_the_whole_one(family: str, recompute: Recompute, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config(family))
    for flat in (False, True):
        results = []
        for split in (False, True):
            stages = _stages(family, tmp_path, Axis("tp"), recompute=recompute)
            if flat:
                for stage in stages:
                    _flat_gradients(stage)
            results.append(_train(stages, split=split))
        assert _compare(*results) == []
        assert all(value.any() for value in results[0][1].values())
        names = {name for name, _ in tiny_model(tiny_config(family)).named_parameters()}
        assert results[0][1].keys() == names - {"lm_head.weight"}


def _split_on_shards(folders: dict[str, str]) -> list[str]:
    mesh = Mesh.create(pp=1, dp=1, tp=2)
    differ = []
    for family, folder in folders.items():
        for recompute in ("none", "selective", "full"):
            results = []
            for split in (False, True):
                stages = _stages(family, Path(folder), mesh.tp, recompute=recompute)
                results.append(_train(stages, split=split))
            differ += [f"{family} {recompute} {name}" for name in _compare(*results)]
    return differ


def test_split_backward_equals_the_whole_one_on_shards(tmp_path: Path) -> None:
    folders = {
        family: str(save_tiny(tmp_path / family, tiny_config(family))) for family in ("llama", "qwen3")
    }
    assert run_distributed(2, _split_on_shards, folders) == [[], []]


def _gradients_by_layer(stage: StageModel) -> dict[int | None, list[Tensor]]:
    """Return the flat gradients by the layer after whose backward the table says that they are complete."""
    layers: dict[int | None, list[Tensor]] = {}
    for entry in parameter_table(stage):
        layers.setdefault(entry.layer, []).append(entry.parameter.main_grad)
    return layers


def _wrong_calls(family: str, folder: Path, tp: Axis, **options: object) -> list[str]:
    """Run two micro-batches through both stages; return the layers that were reported wrongly in the last backward."""
    stages = _stages(family, folder, tp, **options)
    for stage in stages:
        _flat_gradients(stage)
    trained, wrong = [TrainStage(stage) for stage in stages], []
    outputs: list[list[Tensor]] = [[], []]
    for index, ids in enumerate(IDS):
        for place, x in enumerate((ids, None)):
            x = outputs[0][index] if x is None else x
            outputs[place].append(trained[place].forward(index, x, POSITIONS))
    for index in range(2):
        hidden = outputs[1][index].requires_grad_()
        stages[1].head(hidden).sin().sum().backward()
        gradient = hidden.grad
        for stage, train in ((stages[1], trained[1]), (stages[0], trained[0])):
            layers = _gradients_by_layer(stage)
            at_call: dict[int, dict[int | None, list[Tensor]]] = {}

            def layer_done(layer: int, layers: dict = layers, at_call: dict = at_call) -> object:
                at_call[layer] = {key: [value.clone() for value in values] for key, values in layers.items()}
                return at_call

            gradient = train.backward(index, gradient, layer_done=layer_done if index == 1 else None)
            if index == 0:
                continue
            if list(at_call) != [*stage.owned][::-1]:
                wrong.append(f"called with {list(at_call)}")
            for layer, seen in at_call.items():
                if not all(map(torch.equal, seen[layer], layers[layer])):
                    wrong.append(f"layer {layer} too early")
                # A call that came before its time would be seen: what comes next is not complete yet.
                following = layer - 1 if layer > stage.owned[0] else None
                if any(map(torch.equal, seen.get(following, []), layers.get(following, []))):
                    wrong.append(f"layer {following} is complete with layer {layer}")
    return wrong


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_layer_is_done_when_its_gradients_are(family: str, recompute: Recompute, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config(family))
    assert _wrong_calls(family, tmp_path, Axis("tp"), recompute=recompute) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_are_done_as_others_are(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("starcoder2"))
    assert _wrong_calls("starcoder2", tmp_path, Axis("tp"), compile_layers=True) == []


def _wrong_calls_on_shards(folders: dict[str, str]) -> list[str]:
    mesh = Mesh.create(pp=1, dp=1, tp=2)
    return [
        f"{family} {recompute} {words}"
        for family, folder in folders.items()
        for recompute in ("none", "selective", "full")
        for words in _wrong_calls(family, Path(folder), mesh.tp, recompute=recompute)
    ]


def test_a_layer_is_done_when_its_gradients_are_on_shards(tmp_path: Path) -> None:
    families = ("llama", "qwen3", "gemma2", "olmo2", "starcoder2")
    folders = {family: str(save_tiny(tmp_path / family, tiny_config(family))) for family in families}
    assert run_distributed(2, _wrong_calls_on_shards, folders) == [[], []]


def test_layers_of_a_whole_tied_model_are_done_before_its_embedding(tmp_path: Path) -> None:
    config = tiny_config("qwen3", tie_word_embeddings=True)
    save_tiny(tmp_path, config)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64)
    load_weights(stage, tmp_path)
    _flat_gradients(stage)
    train, seen = TrainStage(stage), []
    hidden = train.forward(0, IDS[0], POSITIONS).requires_grad_()
    stage.head(hidden).sin().sum().backward()
    embedding = stage.embedding.weight.main_grad
    stage(IDS[1], POSITIONS)
    train.backward(0, hidden.grad, layer_done=lambda layer: seen.append((layer, embedding.clone())))
    assert [layer for layer, _ in seen] == [3, 2, 1, 0]
    assert not any(torch.equal(value, embedding) for _, value in seen)


def test_no_weight_gradient_before_backward_weight(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    _, model = _stages("llama", tmp_path, Axis("tp"))
    stage = TrainStage(model)
    hidden = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stage.forward(4, hidden, POSITIONS)
    linear = model.layers[2].mlp.up_proj.weight
    stage.backward_input(4, hidden.cos())
    assert linear.grad is None
    stage.backward_weight(4)
    assert linear.grad.any()
    with pytest.raises(KeyError):
        stage.backward_weight(4)


def test_activations_are_freed_by_the_last_backward(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    _, model = _stages("llama", tmp_path, Axis("tp"))
    outputs: list[weakref.ref[Tensor]] = []
    inside: list[weakref.ref[Tensor]] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    for layer in model.layers.values():
        layer.mlp.register_forward_hook(lambda module, args, output: inside.append(weakref.ref(output)))
    stage = TrainStage(model)
    hidden = torch.ones(2, 7, 32, dtype=torch.float64)
    for index in range(3):
        stage.forward(index, hidden, POSITIONS)
    gc.collect()
    assert stage.num_kept == 3 and all(output() is not None for output in outputs)
    with pytest.raises(AssertionError, match="micro-batch 1 is already in flight"):
        stage.forward(1, hidden, POSITIONS)
    assert stage.backward(1, hidden).shape == hidden.shape
    assert [output() is None for output in outputs[:3]] == [False, True, False]
    stage.backward_input(0, hidden)
    assert [output() is None for output in outputs[:3]] == [True, True, False]
    stage.backward_weight(0)
    stage.backward(2, hidden)
    gc.collect()
    assert stage.num_kept == 0
    assert all(reference() is None for reference in (*outputs[:3], *inside))
    with pytest.raises(KeyError):
        stage.backward(2, hidden)


def test_a_received_hidden_state_is_not_touched(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    _, model = _stages("llama", tmp_path, Axis("tp"))
    stage = TrainStage(model)
    received = torch.ones(2, 7, 32, dtype=torch.float64)
    stage.forward(0, received, POSITIONS)
    gradient = stage.backward(0, received)
    assert (
        not received.requires_grad
        and received.grad is None
        and torch.equal(received, torch.ones_like(received))
    )
    assert gradient.any()


@pytest.mark.parametrize("num_slices", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_equal_the_whole_and_keep_nothing(family: str, num_slices: int, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config(family))
    whole = [ForwardStage(stage) for stage in _stages(family, tmp_path, Axis("tp"), trainable=False)]
    sliced = [
        ForwardStage(stage)
        for stage in _stages(family, tmp_path, Axis("tp"), trainable=False, num_slices=num_slices)
    ]
    produced: list[weakref.ref[Tensor]] = []
    for stage in sliced:
        stage.model.register_forward_hook(lambda module, args, output: produced.append(weakref.ref(output)))
    expected: list[Tensor] = list(IDS)
    got: list[Tensor] = list(IDS)
    for plain, stage in zip(whole, sliced, strict=True):
        expected = [plain.forward(index, x, POSITIONS) for index, x in enumerate(expected)]
        # Slice by slice with the micro-batches in turn: what lies between slices is looked up by micro-batch.
        for part in range(num_slices):
            outputs = [
                stage.forward(index, got[index] if part == 0 else None, POSITIONS, part=part)
                for index in range(2)
            ]
            assert all((output is None) == (part < num_slices - 1) for output in outputs)
            assert len(stage._between) == (2 if part < num_slices - 1 else 0)
        got = outputs
        assert not plain._between
        assert all(torch.equal(x, y) and not y.requires_grad for x, y in zip(expected, got, strict=True))
    del outputs, got, expected
    gc.collect()
    assert all(reference() is None for reference in produced)


def test_forward_without_gradients_also_on_a_trainable_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    (model, _) = _stages("llama", tmp_path, Axis("tp"))
    stage = ForwardStage(model)
    output = stage.forward(0, IDS[0], POSITIONS)
    assert not output.requires_grad and output.grad_fn is None
    again = TrainStage(model).forward(0, IDS[0], POSITIONS)
    assert torch.equal(output, again)
