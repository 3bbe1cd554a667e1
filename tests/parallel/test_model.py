"""Stages against the unmodified transformers model: logits and every gradient, for the ten families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from parallel.mesh import Axis, Mesh
from parallel.model import build_config, build_stage, split_layers
from parallel.plan import UnsupportedModel
from parallel.probes import LogitsTransform
from parallel.weights import WeightsError, export_weights, gather_tensor, load_weights, parameter_table
from tests.families import FAMILIES, save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

IDS = torch.tensor([[5, 17, 33, 2, 9, 61, 80, 96, 3, 11], [7, 7, 8, 2, 44, 51, 0, 4, 5, 6]])
# Two documents in the first row: attention may not cross.
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(10))])


def _reference(family: str, **overrides: object) -> tuple[Tensor, dict[str, Tensor]]:
    config = build_config(tiny_config(family, **overrides))
    model = tiny_model(config)
    logits = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    logits.sin().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def _stage_grads(stage, mesh: Mesh) -> dict[str, Tensor]:
    grads = {}
    for entry in parameter_table(stage):
        grad = entry.parameter.grad
        if entry.tp_partial_grad:
            torch.distributed.all_reduce(grad, group=mesh.tp.group)
        grads[entry.name] = gather_tensor(grad, entry)
    return grads


def _run_tp(families: tuple[str, ...], folders: dict[str, str]) -> dict[str, tuple]:
    size = torch.distributed.get_world_size()
    mesh = Mesh.create(pp=1, dp=1, tp=size)
    results = {}
    for family in families:
        config = tiny_config(family)
        stage = build_stage(config, pp=mesh.pp, tp=mesh.tp, dtype=torch.float64)
        load_weights(stage, Path(folders[family]))
        logits = stage.transform(stage.head(stage(IDS, POSITIONS)))
        logits.sin().sum().backward()
        results[family] = (logits.detach(), _stage_grads(stage, mesh))
    return results


@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_logits_and_all_gradients_match_the_unmodified_model(tp: int, tmp_path: Path) -> None:
    folders = {family: str(save_tiny(tmp_path / family, tiny_config(family))) for family in FAMILIES}
    for rank_results in run_distributed(tp, _run_tp, FAMILIES, folders):
        for family, (logits, grads) in rank_results.items():
            expected, expected_grads = _reference(family)
            torch.testing.assert_close(
                logits, expected, rtol=1e-9, atol=1e-9, msg=lambda m, f=family: f"{f}: {m}"
            )
            assert grads.keys() == expected_grads.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(
                    grad,
                    expected_grads[name],
                    rtol=1e-8,
                    atol=1e-10,
                    msg=lambda m, f=family, n=name: f"{f} {n}: {m}",
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_slices_reproduce_the_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    save_tiny(tmp_path, config)
    hidden = IDS
    for index in range(3):
        stage = build_stage(
            config, pp=Axis("pp", 3, index), tp=Axis("tp"), dtype=torch.float64, trainable=False, num_slices=2
        )
        load_weights(stage, tmp_path)
        for part in range(2):
            hidden = stage(hidden, POSITIONS, part=part)
    assert torch.equal(stage.transform(stage.head(hidden)), _reference(family)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_export_returns_every_tensor_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    config = tiny_config("qwen3", tie_word_embeddings=tied)
    save_tiny(tmp_path / "in", config)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64)
    load_weights(stage, tmp_path / "in")
    (tmp_path / "out").mkdir()
    export_weights([stage], Mesh.single(), tmp_path / "out", dtype=torch.float64, max_shard_bytes=20_000)
    config.save_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    for name, tensor in tiny_model(config).state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_strict_both_ways(tmp_path: Path) -> None:
    config = tiny_config("llama")
    file = save_tiny(tmp_path, config) / "model.safetensors"
    tensors = load_file(file)
    stage = build_stage(config, pp=Axis("pp"), tp=Axis("tp"))
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(WeightsError, match=r"model\.extra\.weight"):
        load_weights(stage, tmp_path)
    save_file({k: v for k, v in tensors.items() if "layers.2.mlp.up_proj" not in k}, file)
    with pytest.raises(WeightsError, match=r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        load_weights(stage, tmp_path)
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, file)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight.*\[31\].*\[32\]"):
        load_weights(stage, tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"cannot be read"):
        load_weights(stage, tmp_path)


def test_a_style_or_family_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    plan = {**config.base_model_tp_plan, "layers.*.mlp.up_proj": "packed_colwise"}
    monkeypatch.setattr(type(config), "base_model_tp_plan", plan)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.up_proj.*packed_colwise"):
        build_stage(config, pp=Axis("pp"), tp=Axis("tp"))
    monkeypatch.setattr(type(config), "base_model_pp_plan", None)
    with pytest.raises(UnsupportedModel, match="pipeline plan"):
        build_stage(config, pp=Axis("pp"), tp=Axis("tp"))


def test_layers_that_carry_a_state_along_a_row_are_refused() -> None:
    config = tiny_config("qwen3")
    config.layer_types = ["full_attention", "linear_attention", "full_attention", "linear_attention"]
    with pytest.raises(
        UnsupportedModel, match="qwen3 has layers of the type 'linear_attention', which would carry"
    ):
        build_stage(config, pp=Axis("pp"), tp=Axis("tp"))


def test_an_unknown_logits_transform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.model.logits_transform", lambda config: LogitsTransform())
    with pytest.raises(UnsupportedModel, match="logits"):
        build_stage(tiny_config("granite"), pp=Axis("pp"), tp=Axis("tp"))


def test_layers_are_split_evenly_and_all_owned() -> None:
    assert [len(part) for part in split_layers(30, 4)] == [8, 8, 7, 7]
    assert [i for part in split_layers(5, 3) for i in part] == list(range(5))


def _anonymous_bytes() -> int:
    return next(
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon")
    )


def _load_and_measure(folder: str) -> tuple[int, int, int]:
    import threading
    import time

    mesh = Mesh.create(pp=1, dp=1, tp=torch.distributed.get_world_size())
    config = _wide_config()
    _ = build_stage(tiny_config("llama"), pp=mesh.pp, tp=mesh.tp)  # first-use allocations of the libraries
    before, peak, done = _anonymous_bytes(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, _anonymous_bytes() - before)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stage = build_stage(config, pp=mesh.pp, tp=mesh.tp)
    load_weights(stage, Path(folder))
    done = True
    watcher.join()
    shard = sum(parameter.nbytes for parameter in stage.parameters())
    largest = max(4 * entry.parameter.numel() for entry in parameter_table(stage)) * mesh.tp.size
    return peak, shard, largest


def _wide_config():
    return tiny_config(
        "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6, head_dim=64, vocab_size=20_000
    )


def test_a_rank_never_holds_more_than_its_shard_and_one_tensor(tmp_path: Path) -> None:
    save_tiny(tmp_path, _wide_config(), dtype=torch.float32)
    for peak, shard, largest in run_distributed(2, _load_and_measure, str(tmp_path)):
        assert peak <= 1.1 * shard + largest, (peak, shard, largest)
        assert peak >= 0.9 * shard  # the measurement sees the shard at all
