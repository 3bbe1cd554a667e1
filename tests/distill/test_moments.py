"""Second moments against the sum of outer products written out, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.moments import SecondMoments
from distill.ranks import Target, find_targets
from distill.student_config import LowRank
from parallel.mesh import Axis, Mesh
from parallel.model import build_stage
from parallel.weights import load_weights
from tests.families import save_tiny, tiny_config, tiny_model
from tests.workers import run_distributed

# An inner width that 2 does not divide; phi3 reads whole inputs where qwen3 reads shards (o_proj).
CONFIGS = {name: tiny_config(name, intermediate_size=47, num_hidden_layers=2) for name in ("qwen3", "phi3")}
MODULES = {
    "qwen3": ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
}  # fmt: skip
ROWS, SEQ_LEN = 4, 6
LAYOUTS = [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 2, "tp": 1}, {"pp": 1, "dp": 1, "tp": 2}]


def _text() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (ROWS, SEQ_LEN), generator=generator)
    return ids, torch.arange(SEQ_LEN).expand(ROWS, -1), torch.rand(ids.shape, generator=generator) < 0.7


def _targets(family: str) -> tuple[Target, ...]:
    return find_targets(LowRank(modules=MODULES[family]), CONFIGS[family], tp=1).linears


def _expected(family: str) -> dict[str, Tensor]:
    model, (ids, positions, valid) = tiny_model(CONFIGS[family]), _text()
    moments = {}

    def hook(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        rows = args[0][valid]
        moments[name] = torch.stack([torch.outer(row, row) for row in rows]).sum(dim=0)

    for target in _targets(family):
        module = model.get_submodule(target.name)
        module.register_forward_pre_hook(lambda module, args, name=target.name: hook(name, module, args))
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return moments


def _measured(folders: dict[str, str], mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    found = {}
    for family, folder in folders.items():
        stage = build_stage(CONFIGS[family], pp=mesh.pp, tp=mesh.tp, dtype=torch.float64, trainable=False)
        load_weights(stage, Path(folder))
        columns = [each.chunk(mesh.dp.size)[mesh.dp.rank] for each in _text()]
        with SecondMoments([stage], _targets(family), mesh) as moments, torch.no_grad():
            # Two micro-batches of a replica, or four; a stage that is not the first is given what the model has there.
            for ids, positions, valid in zip(*(each.split(1) for each in columns), strict=True):
                moments.expect(valid)
                stage(ids if stage.is_first else _before(family, stage.owned, ids, positions), positions)
        moments.add_replicas()
        found[family] = {
            target.name: moments.whole(target) for target in _targets(family) if target.layer in stage.layers
        }
        assert not any(module._forward_pre_hooks for module in stage.modules()), "hooks stay behind"
    return found


def _before(family: str, owned: range, ids: Tensor, positions: Tensor) -> Tensor:
    model = tiny_model(CONFIGS[family])
    return model(
        input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True
    ).hidden_states[owned.start]


def _in_layouts(folders: dict[str, str]) -> list[dict[str, dict[str, Tensor]]]:
    return [_measured(folders, Mesh.create(**layout)) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("moments")
    return {family: str(save_tiny(root / family, config)) for family, config in CONFIGS.items()}


def _compare(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, moment in mine.items():
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, expected[name], rtol=1e-9, atol=1e-9)


def test_moments_are_sums_of_outer_products_in_every_layout(folders: dict[str, str]) -> None:
    expected = {family: _expected(family) for family in CONFIGS}
    alone = _measured(folders, Mesh.single())
    ranks = run_distributed(2, _in_layouts, folders)
    for family in CONFIGS:
        assert alone[family].keys() == expected[family].keys()
        _compare(alone[family], expected[family])
        for number in range(len(LAYOUTS)):
            both = [rank[number][family] for rank in ranks]
            assert both[0].keys() | both[1].keys() == expected[family].keys()
            for mine in both:
                _compare(mine, expected[family])


def test_bf16_inputs_are_multiplied_in_float32(folders: dict[str, str]) -> None:
    stage = build_stage(CONFIGS["qwen3"], pp=Axis("pp"), tp=Axis("tp"), dtype=torch.bfloat16, trainable=False)
    load_weights(stage, Path(folders["qwen3"]))
    ids, positions, valid = _text()
    expected: dict[str, Tensor] = {}

    def look(name: str, args: tuple[Tensor]) -> None:
        assert args[0].dtype == torch.bfloat16
        rows = args[0][valid].double()
        expected[name] = rows.T @ rows

    for target in _targets("qwen3"):
        module = stage.layers[target.layer].get_submodule(target.module)
        module.register_forward_pre_hook(lambda _, args, name=target.name: look(name, args))
    with SecondMoments([stage], _targets("qwen3"), Mesh.single()) as moments, torch.no_grad():
        moments.expect(valid)
        stage(ids, positions)
    for target in _targets("qwen3"):
        wanted = expected[target.name]
        # By the norm: single entries may cancel to next to nothing.
        assert (moments.whole(target) - wanted).norm() < 1e-5 * wanted.norm(), target.name


def test_linears_that_read_the_same_share_a_moment(folders: dict[str, str]) -> None:
    stage = build_stage(CONFIGS["qwen3"], pp=Axis("pp"), tp=Axis("tp"), trainable=False)
    with SecondMoments([stage], _targets("qwen3"), Mesh.single()) as moments:
        assert len(moments._sums) == 2 * 4, "q and v; o; up and gate; down"


def test_a_forward_without_expectation_is_refused(folders: dict[str, str]) -> None:
    stage = build_stage(CONFIGS["qwen3"], pp=Axis("pp"), tp=Axis("tp"), trainable=False)
    with (
        SecondMoments([stage], _targets("qwen3"), Mesh.single()),
        pytest.raises(AssertionError, match="expect"),
    ):
        stage(_text()[0], _text()[1])
