"""Models whose layers differ in width: every family builds each layer from its own config, and stages train them in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from parallel.layerwise import layerwise
from parallel.model import build_meta_model
from tests.equivalence.trajectory import STUDENTS, Case, run_cases, run_reference, save_models
from tests.families import FAMILIES, save_tiny, tiny_config
from tests.workers import run_distributed

OWN = {
    0: {"intermediate_size": 16},
    2: {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_that_of_a_model_with_its_widths(family: str) -> None:
    values = {"head_dim": 8, "allow_global_per_layer_attribute_access": True}
    model = build_meta_model(tiny_config(family, **values, per_layer_config=OWN))
    for index in range(4):
        alone = build_meta_model(tiny_config(family, **values, **OWN.get(index, {})))
        mine, expected = (
            {name: parameter.shape for name, parameter in each.model.layers[index].named_parameters()}
            for each in (model, alone)
        )
        assert mine == expected
        assert type(model.model.layers[index]) is type(alone.model.layers[index])
    assert model.config.is_heterogeneous and type(model).__name__ == type(alone).__name__


def test_layers_alike_change_nothing(tmp_path: Path) -> None:
    config = tiny_config("gemma2")
    save_tiny(tmp_path, config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(tmp_path, dtype=torch.float64)
    config.per_layer_config = {1: {"intermediate_size": 48}}
    again = layerwise(model_class).from_pretrained(tmp_path, config=config, dtype=torch.float64)
    ids = torch.tensor([[5, 17, 33, 2, 9, 61]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=1, dp=1, tp=2, schedule="1f1b", teacher="inline", student="uneven", num_microbatches=2),
        Case(pp=2, dp=1, tp=1, schedule="zero_bubble", teacher="fill", student="uneven", num_microbatches=4),
    ],
    ids=["tp2", "pp2"],
)
def test_training_does_not_depend_on_the_layout(case: Case, tmp_path: Path) -> None:
    assert STUDENTS["uneven"].is_heterogeneous
    folders = save_models(tmp_path)
    expected = run_reference("uneven", folders)
    for ranks in run_distributed(2, run_cases, [case], folders):
        (mine,) = ranks
        for figures in ("losses", "norms"):
            torch.testing.assert_close(
                torch.tensor(getattr(mine, figures), dtype=torch.float64),
                torch.tensor(getattr(expected, figures), dtype=torch.float64),
                rtol=1e-9,
                atol=0,
            )
        for name, parameter in mine.parameters.items():
            torch.testing.assert_close(
                parameter, expected.parameters[name.removesuffix("@tied")], rtol=1e-9, atol=1e-10
            )
