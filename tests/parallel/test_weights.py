"""Weights between folders and stages: slices on every layout, export, and strictness both ways."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage
from parallel.weights import (
    INDEX,
    SINGLE_FILE,
    WeightFiles,
    WeightsError,
    export_weights,
    gather_tensor,
    load_weights,
    parameter_table,
)
from tests.families import FAMILIES, save_tiny, tiny_config
from tests.workers import run_distributed

CONFIGS = {
    "untied": tiny_config("llama", tie_word_embeddings=False),
    "tied": tiny_config("qwen3", tie_word_embeddings=True),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYOUTS = [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}, {"pp": 1, "dp": 2, "tp": 1}]
MAX_SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, config) for name, config in CONFIGS.items()}


def _whole(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _stage(name: str, *, pp: Axis | None = None, tp: Axis | None = None) -> StageModel:
    return build_stage(CONFIGS[name], pp=pp or Axis("pp"), tp=tp or Axis("tp"), dtype=torch.float64)


def _load_and_export(folders: dict[str, Path], root: Path) -> list[dict[str, tuple]]:
    """Load both models in every layout; return this rank's slices and whole tensors; write the model again."""
    results = []
    for layout in LAYOUTS:
        mesh = Mesh.create(**layout)
        for name, folder in folders.items():
            stage = _stage(name, pp=mesh.pp, tp=mesh.tp)
            load_weights(stage, folder)
            results.append(
                {
                    entry.name + ("@tied" if entry.is_tied_copy else ""): (
                        entry.shard and (entry.shard.dim, entry.shard.start, entry.shard.stop),
                        entry.parameter.detach().clone(),
                        gather_tensor(entry.parameter.detach(), entry).clone(),
                        entry.is_tied_source,
                    )
                    for entry in parameter_table(stage)
                }
            )
            out = root / f"{name}-{'-'.join(f'{k}{v}' for k, v in layout.items())}"
            if mesh.world.is_first:
                shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
            torch.distributed.barrier()
            export_weights([stage], mesh, out, dtype=torch.float64, max_shard_bytes=MAX_SHARD_BYTES)
    return results


def _check_slices(layout: dict[str, int], name: str, ranks: list[dict[str, tuple]], folder: Path) -> None:
    whole = _whole(folder)
    seen: dict[str, int] = {}
    for table in ranks:
        for key, (shard, local, gathered, is_source) in table.items():
            tensor_name = key.removesuffix("@tied")
            expected = whole[tensor_name]
            seen[key] = seen.get(key, 0) + 1
            assert torch.equal(gathered, expected), (layout, key)
            replicated = "norm" in key or key.endswith(("o_proj.bias", "down_proj.bias"))
            assert (shard is not None) == (layout["tp"] == 2 and not replicated), key
            if shard is not None:
                dim, start, stop = shard
                assert torch.equal(local, expected.narrow(dim, start, stop - start)), (layout, key)
                assert local.shape[dim] < expected.shape[dim]
            assert is_source == (name == "tied" and key == EMBEDDING)
    names = set(whole)
    if name == "tied" and layout["pp"] == 2:
        names.add(f"{EMBEDDING}@tied")
        assert f"{EMBEDDING}@tied" in ranks[1] and EMBEDDING in ranks[0] and EMBEDDING not in ranks[1]
    assert seen.keys() == names
    # Replicas and shards hold every name, stages share them out.
    assert set(seen.values()) == {1 if layout["pp"] == 2 else 2}


def _check_export(out: Path, folder: Path) -> None:
    whole = _whole(folder)
    again = _whole(out)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], value) for key, value in whole.items()), out
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 2
    for file in files:
        tensors = load_file(out / file)
        assert all(index["weight_map"][key] == file for key in tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= MAX_SHARD_BYTES
        with safe_open(out / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}


def test_slices_and_export_on_two_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    ranks = run_distributed(2, _load_and_export, folders, tmp_path)
    cases = [(layout, name) for layout in LAYOUTS for name in folders]
    for index, (layout, name) in enumerate(cases):
        _check_slices(layout, name, [rank[index] for rank in ranks], folders[name])
        _check_export(tmp_path / f"{name}-{'-'.join(f'{k}{v}' for k, v in layout.items())}", folders[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_that_are_padding_stay_in_the_folder(name: str, folders: dict[str, Path]) -> None:
    """A model of 90 ids in a folder of 97, also where tp cuts them; nothing else may be longer than the config says."""
    whole = _whole(folders[name])
    config = copy.deepcopy(CONFIGS[name])
    config.vocab_size = 90
    for rank in range(2):
        tp = Axis("tp", 2, rank)
        stage = build_stage(config, pp=Axis("pp"), tp=tp, dtype=torch.float64)
        load_weights(stage, folders[name], may_be_padded=True)
        for entry in parameter_table(stage):
            ids = slice(rank * 45, (rank + 1) * 45)
            if entry.name in (EMBEDDING, HEAD):
                assert torch.equal(entry.parameter, whole[entry.name][ids])
            elif entry.shard is None:
                assert torch.equal(entry.parameter, whole[entry.name])
        with pytest.raises(WeightsError, match="the config says"):
            load_weights(stage, folders[name])
    config.intermediate_size -= 8
    narrow = build_stage(config, pp=Axis("pp"), tp=Axis("tp"), dtype=torch.float64)
    with pytest.raises(WeightsError, match="mlp.* the config says"):
        load_weights(narrow, folders[name], may_be_padded=True)


def _export_two_stages_each(folders: dict[str, Path], root: Path) -> None:
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    for name, folder in folders.items():
        stages = [_stage(name, pp=Axis("stage", 4, place)) for place in (mesh.pp.rank, mesh.pp.rank + 2)]
        for stage in stages:
            load_weights(stage, folder)
        out = root / name
        if mesh.world.is_first:
            shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.distributed.barrier()
        export_weights(stages, mesh, out, dtype=torch.float64, max_shard_bytes=MAX_SHARD_BYTES)


def test_export_of_several_stages_a_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(2, _export_two_stages_each, folders, tmp_path)
    for name, folder in folders.items():
        _check_export(tmp_path / name, folder)
        layers = {
            file[: len("model-stage000")]: key.split(".")[2]
            for key, file in json.loads((tmp_path / name / INDEX).read_text())["weight_map"].items()
            if ".layers." in key
        }
        assert layers == {f"model-stage00{place}": str(place) for place in range(4)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_knows_the_layer_that_completes_it(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    for pp in (Axis("pp"), Axis("pp", 2, 0), Axis("pp", 2, 1), Axis("pp", 9, 8)):
        stage = build_stage(config, pp=pp, tp=Axis("tp"))
        for entry in parameter_table(stage):
            if ".layers." in entry.name:
                assert f".layers.{entry.layer}." in entry.name and entry.layer in stage.owned
            elif entry.is_tied_copy or entry.name in ("model.norm.weight", "model.norm.bias", HEAD):
                assert entry.layer == (stage.owned[-1] if stage.owned else None)
            else:
                assert entry.name == EMBEDDING and entry.layer is None


def test_export_in_another_dtype_into_one_file(folders: dict[str, Path], tmp_path: Path) -> None:
    stage = _stage("tied")
    load_weights(stage, folders["tied"])
    export_weights([stage], Mesh.single(), tmp_path, dtype=torch.bfloat16)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert HEAD not in tensors, "a tied head is not written"
    for name, expected in _whole(folders["tied"]).items():
        assert torch.equal(tensors[name], expected.bfloat16()), name
    # Exported files are read back like any others.
    again = _stage("tied")
    load_weights(again, tmp_path)
    assert torch.equal(again.embedding.weight.detach(), tensors[EMBEDDING].double())
    assert again.head.weight is again.embedding.weight


def test_a_tensor_of_another_stage_is_known_and_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["untied"] / SINGLE_FILE)
    far = "model.layers.3.mlp.up_proj.weight"
    # The first stage neither needs the tensor nor looks at its shape.
    save_file({**tensors, far: torch.zeros(2)}, tmp_path / SINGLE_FILE)
    load_weights(_stage("untied", pp=Axis("pp", 2, 0)), tmp_path)
    with pytest.raises(WeightsError, match=r"layers\.3\.mlp\.up_proj\.weight.*\[2\].*\[48, 32\]"):
        load_weights(_stage("untied", pp=Axis("pp", 2, 1)), tmp_path)


@pytest.mark.parametrize("tp", [Axis("tp"), Axis("tp", 2, 1)], ids=["whole", "shard"])
def test_names_and_shapes_are_strict_both_ways(tp: Axis, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors, stage = load_file(folders["untied"] / SINGLE_FILE), _stage("untied", tp=tp)
    file = tmp_path / SINGLE_FILE

    def refused(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, file)
        with pytest.raises(WeightsError, match=message) as caught:
            load_weights(stage, tmp_path)
        assert str(tmp_path) in str(caught.value)

    name = "model.layers.1.self_attn.q_proj.weight"
    rest = {key: value for key, value in tensors.items() if key != name}
    refused(rest, r"no tensor 'model\.layers\.1\.self_attn\.q_proj\.weight'")
    # What transformers passes over as well: a buffer that older checkpoints hold.
    save_file({**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, file)
    load_weights(stage, tmp_path)
    refused(
        {**tensors, "model.layers.4.mlp.up_proj.weight": torch.zeros(1)}, r"model\.layers\.4\.mlp\.up_proj"
    )
    # Larger along the sharded dim: every rank's slice would still be there.
    refused({**tensors, name: torch.zeros(80, 32)}, r"q_proj\.weight' has shape \[80, 32\].*\[64, 32\]")
    refused({**tensors, name: torch.zeros(64, 33)}, r"q_proj\.weight' has shape \[64, 33\].*\[64, 32\]")
    refused({**tensors, name: torch.zeros(64 * 32)}, r"q_proj\.weight' has shape \[2048\]")
    refused({**tensors, HEAD: torch.zeros(98, 32)}, r"lm_head\.weight' has shape \[98, 32\].*\[97, 32\]")
    save_file(tensors, file)
    load_weights(stage, tmp_path)


def test_an_untied_model_needs_its_head(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["untied"] / SINGLE_FILE)
    save_file({key: value for key, value in tensors.items() if key != HEAD}, tmp_path / SINGLE_FILE)
    load_weights(_stage("untied", pp=Axis("pp", 2, 0)), tmp_path)
    with pytest.raises(WeightsError, match=r"no tensor 'lm_head\.weight'"):
        load_weights(_stage("untied", pp=Axis("pp", 2, 1)), tmp_path)


def _sharded(folders: dict[str, Path], target: Path) -> dict:
    stage = _stage("untied")
    load_weights(stage, folders["untied"])
    export_weights([stage], Mesh.single(), target, dtype=torch.float64, max_shard_bytes=MAX_SHARD_BYTES)
    return json.loads((target / INDEX).read_text())


def test_files_that_are_missing_or_broken_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    stage = _stage("untied")

    def refused(*words: str) -> None:
        with pytest.raises(WeightsError) as caught:
            load_weights(stage, tmp_path)
        assert all(word in str(caught.value) for word in words), caught.value

    refused(str(tmp_path), SINGLE_FILE, INDEX)
    index = _sharded(folders, tmp_path)
    name = sorted(set(index["weight_map"].values()))[1]
    whole = (tmp_path / name).read_bytes()
    for broken in (whole[:-8], whole[:5], b"", b"\xff" * 64, whole + b"\0" * 8):
        (tmp_path / name).write_bytes(broken)
        refused(str(tmp_path / name), "cannot be read")
    (tmp_path / name).unlink()
    refused(str(tmp_path / name), "cannot be read")
    (tmp_path / name).write_bytes(whole)
    load_weights(stage, tmp_path)


@pytest.mark.parametrize("outside", ["../stolen.safetensors", "sub/stolen.safetensors", "ABSOLUTE", ".."])
def test_an_index_may_not_leave_the_folder(outside: str, folders: dict[str, Path], tmp_path: Path) -> None:
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    index = _sharded(folders, inside)
    first = min(index["weight_map"])
    for place in (tmp_path, inside / "sub"):
        shutil.copy(inside / index["weight_map"][first], place / "stolen.safetensors")
    name = str(tmp_path / "stolen.safetensors") if outside == "ABSOLUTE" else outside
    (inside / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], first: name}}))
    with pytest.raises(WeightsError, match="outside the folder|cannot be read"):
        load_weights(_stage("untied"), inside)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "\xff"])
def test_a_broken_index_is_named(text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    _sharded(folders, tmp_path)
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError) as caught:
        load_weights(_stage("untied"), tmp_path)
    assert str(tmp_path / ("5" if "5" in text else INDEX)) in str(caught.value)


def test_only_the_slice_is_read(folders: dict[str, Path]) -> None:
    stage = _stage("untied", tp=Axis("tp", 2, 1))
    table = {entry.name: entry for entry in parameter_table(stage)}
    with WeightFiles(folders["untied"]) as files:
        # 97 ids on two ranks: the second has the shorter part.
        assert files.read(table[EMBEDDING]).shape == (48, 32)
        assert files.read(table["model.layers.0.self_attn.o_proj.weight"]).shape == (32, 32)
        assert files.read(table["model.layers.0.self_attn.o_proj.bias"]).shape == (32,)
    assert table[EMBEDDING].full_shape == (97, 32)
    assert table["model.layers.0.self_attn.o_proj.bias"].shard is None
