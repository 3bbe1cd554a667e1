"""Which linears are factored, and to which ranks, against what the settings say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import ConfigError
from distill.ranks import Target, Targets, choose_ranks, find_targets, rank_step
from distill.student_config import LowRank
from tests.families import factored_config, tiny_config, tiny_model

WIDE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("family", "wanted", "names"),
    [
        ("llama", LowRank(), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("starcoder2", LowRank(), ["mlp.c_fc", "mlp.c_proj"]),
        ("qwen3", LowRank(modules="attention"), [f"self_attn.{letter}_proj" for letter in "qkvo"]),
        ("phi3", LowRank(modules=("self_attn.o_proj", "mlp.down_proj")), ["self_attn.o_proj", "mlp.down_proj"]),
    ],
)  # fmt: skip
def test_linears_by_name(family: str, wanted: LowRank, names: list[str]) -> None:
    config = tiny_config(family)
    targets = find_targets(wanted, config, tp=1)
    model = tiny_model(config)
    assert [(each.layer, each.module) for each in targets.linears] == [
        (layer, name) for layer in range(4) for name in names
    ]
    for each in targets.linears:
        weight = model.get_parameter(f"{each.name}.weight")
        assert (each.out_features, each.in_features) == weight.shape and each.dense == weight.numel()
    assert targets.num_parameters == sum(each.numel() for each in model.parameters())


def test_layers_by_index_and_a_tied_model_counted_once() -> None:
    config = tiny_config("qwen3", tie_word_embeddings=True)
    targets = find_targets(LowRank(layers=(1, 3), modules=("mlp.up_proj",)), config, tp=1)
    assert [each.name for each in targets.linears] == [f"model.layers.{i}.mlp.up_proj" for i in (1, 3)]
    assert targets.num_parameters == sum(each.numel() for each in tiny_model(config).parameters())


@pytest.mark.parametrize(
    ("family", "wanted", "words"),
    [
        ("llama", {"layers": (1, 4)}, "student.low_rank.layers=[1,4] names layer 4, but the student's are 0 to 3"),
        ("llama", {"modules": ("mlp.fc1",)}, "student.low_rank.modules=[mlp.fc1] names mlp.fc1, which the layers of llama do not have; use self_attn.q_proj, "),
        ("phi3", {}, "student.low_rank.modules=ffn: mlp.gate_up_proj of phi3 holds several matrices in one; use [self_attn.o_proj] or [mlp.down_proj]"),
        ("phi3", {"modules": "attention"}, "student.low_rank.modules=attention: self_attn.qkv_proj of phi3 holds several"),
        ("llama", {"params": 1000}, "student.low_rank.params=1000 is out of reach: with these modules and layers the student has at least "),
        ("llama", {"params": 10**9}, "student.low_rank.params=1000000000 is out of reach"),
    ],
)  # fmt: skip
def test_what_the_student_does_not_have(family: str, wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_targets(LowRank(**wanted), tiny_config(family), tp=1)
    assert str(caught.value).startswith(words)


def test_a_factored_student_is_not_factored_again() -> None:
    with pytest.raises(ConfigError, match="student.low_rank: the student is factored already"):
        find_targets(LowRank(), factored_config("llama", {"mlp.up_proj": 8}), tp=1)


def test_ranks_are_multiples_of_eight_and_of_tp() -> None:
    assert [rank_step(tp) for tp in (1, 2, 3, 4, 8, 16)] == [8, 8, 24, 8, 8, 16]


def _targets(*shapes: tuple[int, int], others: int = 1000) -> Targets:
    linears = tuple(Target(i, "mlp.up_proj", f"layer{i}", *shape) for i, shape in enumerate(shapes))
    return Targets(linears, others + sum(each.dense for each in linears))


def _falling(target: Target, decay: float, scale: float = 1.0) -> Tensor:
    return scale * decay ** torch.arange(min(target.out_features, target.in_features), dtype=torch.float64)


def test_a_ratio_is_the_share_of_parameters_that_stays() -> None:
    targets = _targets((576, 1536), (1536, 576), (64, 64), (9, 9))
    ranks = choose_ranks(LowRank(ratio=0.75), targets, {}, tp=1)
    # 0.75 * 576 * 1536 / 2112 = 314.2 and 0.75 * 64 / 2 = 24; 9 x 9 has no rank of 8 that saves anything.
    assert ranks == {"layer0": 312, "layer1": 312, "layer2": 24}
    assert choose_ranks(LowRank(ratio=0.99), targets, {}, tp=1) == {"layer0": 416, "layer1": 416}
    assert choose_ranks(LowRank(ratio=0.001), targets, {}, tp=3)["layer0"] == 24


def test_energy_is_the_least_rank_that_keeps_the_share() -> None:
    targets = _targets((128, 128), (128, 128), (128, 128))
    values = {f"layer{i}": _falling(targets.linears[i], decay) for i, decay in enumerate((0.9, 0.97, 1.0))}
    ranks = choose_ranks(LowRank(energy=0.95), targets, values, tp=1)
    for name, rank in ranks.items():
        energies = values[name].square() / values[name].square().sum()
        assert rank % 8 == 0 and energies[:rank].sum() >= 0.95 > energies[: rank - 8].sum()
    # 95 % of equal singular values is rank 122: dense is smaller.
    assert list(ranks) == ["layer0", "layer1"] and ranks["layer0"] < ranks["layer1"]


def test_a_budget_goes_where_it_keeps_most_energy() -> None:
    targets = _targets((64, 64), (64, 96), (64, 64))
    values = {
        "layer0": _falling(targets.linears[0], 0.9, scale=100.0),
        "layer1": _falling(targets.linears[1], 0.95),
        "layer2": torch.zeros(64, dtype=torch.float64).index_fill(0, torch.arange(3), 1.0),
    }

    def kept(ranks: dict[str, int]) -> float:
        shares = {name: each.square() / each.square().sum() for name, each in values.items()}
        return sum(float(each[: ranks.get(name, 64)].sum()) for name, each in shares.items())

    def parameters(ranks: dict[str, int]) -> int:
        return 1000 + sum(
            each.dense if each.name not in ranks else ranks[each.name] * each.per_rank
            for each in targets.linears
        )

    everything = [
        {name: rank for name, rank in zip(values, choice, strict=True) if rank}
        for choice in itertools.product((0, 8, 16, 24), (0, 8, 16, 24, 32), (0, 8, 16, 24))
    ]
    for budget in (4400, 6500, 8300, 9700):
        ranks = choose_ranks(LowRank(params=budget), targets, values, tp=1)
        assert parameters(ranks) <= budget
        # Greedy steps are of several blocks' size, so that the best of all choices may beat them by less than one.
        best = max(kept(each) for each in everything if parameters(each) <= budget)
        assert kept(ranks) >= best - 0.05
        assert ranks["layer2"] == 8, "its energy is in three singular values"
    # A matrix of another scale is not preferred.
    scaled = {name: each * (1e6 if name == "layer1" else 1) for name, each in values.items()}
    assert choose_ranks(LowRank(params=6500), targets, scaled, tp=1) == choose_ranks(
        LowRank(params=6500), targets, values, tp=1
    )


def test_a_budget_with_room_leaves_matrices_dense() -> None:
    targets = _targets((64, 64), (64, 64))
    values = {"layer0": _falling(targets.linears[0], 0.8), "layer1": torch.ones(64, dtype=torch.float64)}
    assert choose_ranks(LowRank(params=1000 + 64 * 64 + 16 * 128), targets, values, tp=1) == {"layer0": 16}


def test_a_matrix_of_zeros_needs_the_least_rank() -> None:
    targets = _targets((64, 64))
    zeros = {"layer0": torch.zeros(64, dtype=torch.float64)}
    assert choose_ranks(LowRank(energy=0.9), targets, zeros, tp=1) == {"layer0": 8}
