from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from distill.annealing import EXAMPLE, Ramp, Stages
from distill.config import Config, ConfigError, Hidden, Loss, Optimizer
from distill.convert import config_from_dict, config_to_dict, flatten, known_keys, round_config, show


def test_there_and_back() -> None:
    config = replace(
        Config(),
        rounds=({"loss": {"alpha": 0.5}},),
        loss=Loss(temperature=3.0),
        optimizer=Optimizer(betas=(0.8, 0.9), clip=None),
    )
    assert config_from_dict(config_to_dict(config)) == config


def test_what_is_left_out_takes_its_default() -> None:
    assert config_from_dict({"loss": {"temperature": 2}}) == Config()
    assert isinstance(config_from_dict({"loss": {"temperature": 3}}).loss.temperature, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stepz": 3}}, "there is no key train.stepz; did you mean train.steps?"),
        ({"stepz": 3}, "there is no key stepz; did you mean student.sparsity.steps or train.steps?"),
        ({"temperature": 3}, "there is no key temperature; did you mean loss.temperature?"),
        ({"quux": 3}, "there is no key quux; see --help"),
        ({"train": {"steps": "many"}}, "train.steps=many must be a whole number"),
        ({"train": {"steps": 1.5}}, "train.steps=1.5 must be a whole number"),
        ({"train": {"steps": True}}, "train.steps=true must be a whole number"),
        ({"train": {"compile": 1}}, "train.compile=1 must be true or false"),
        ({"train": {"steps": None}}, "train.steps=null must be a whole number"),
        ({"train": 3}, "train=3 is not a group of keys; train.KEY=VALUE sets one of it"),
        (
            {"optimizer": {"betas": [0.9]}},
            "optimizer.betas=[0.9] must be a list of 2 entries that are each a number",
        ),
        ({"optimizer": {"clip": "no"}}, "optimizer.clip=no must be a number or null"),
        (
            {"student": {"prune": {"layers": [0, "x"]}}},
            "student.prune.layers=[0,x] must be a list of entries that are",
        ),
        *(
            (
                {"loss": {"temperature": value}},
                f"loss.temperature={show(value)} must be a number or a schedule like {EXAMPLE}",
            )
            for value in (
                "hot",
                True,
                {"kind": "linear", "start": 4},
                {"kind": "linear", "start": "hot", "end": 1},
                {"kind": "spline", "start": 4, "end": 1},
                {"kind": "steps", "values": {"late": 1}},
                {"kind": "steps", "values": [4, 1]},
            )
        ),
        ({"rounds": [3]}, "rounds=[3] must be a list of entries that are each a group of keys"),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    assert str(caught.value).startswith(message)


def test_a_path_may_be_one_or_many() -> None:
    assert config_from_dict({"data": {"path": "a.txt"}}).data.path == "a.txt"
    assert config_from_dict({"data": {"path": ["a.txt", "b.txt"]}}).data.path == ("a.txt", "b.txt")


def test_a_round_lays_its_overrides_over_the_run() -> None:
    over = {"loss": {"alpha": 0.9}, "student": {"prune": {"num_layers": 3}}, "train": {"steps": 5}}
    config = replace(Config(), rounds=({}, over), loss=Loss(temperature=4.0))
    first, second = (round_config(config, index) for index in range(2))
    assert first.loss == Loss(temperature=4.0) and first.train == Config().train
    assert second.loss == Loss(temperature=4.0, alpha=0.9)
    assert (second.student.prune.num_layers, second.train.steps) == (3, 5)
    assert second.student.prune.pruning_ratio == Config().student.prune.pruning_ratio


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"mesh": {"pp": 2}},
            "rounds[0].mesh.pp cannot differ between rounds; use student.prune, student.low_rank,",
        ),
        ({"optimizer": {"eps": 1.0}}, "rounds[0].optimizer.eps cannot differ between rounds"),
        ({"loss": {"alfa": 1.0}}, "there is no key rounds[0].loss.alfa; did you mean rounds[0].loss.alpha?"),
        ({"loss": {"alpha": "x"}}, "rounds[0].loss.alpha=x must be a number or a schedule like"),
    ],
)
def test_mistakes_in_a_round(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        round_config(replace(Config(), rounds=(entry,)), 0)
    assert str(caught.value).startswith(message)


def test_schedules_are_values_there_and_back() -> None:
    ramp = {"kind": "cosine", "start": 4, "end": 1.5}
    values = {"loss": {"temperature": ramp, "alpha": {"kind": "steps", "values": {0: 1, 100: 0.5}}}}
    config = config_from_dict(values)
    assert config.loss == Loss(
        temperature=Ramp("cosine", 4.0, 1.5), alpha=Stages("steps", {0: 1.0, 100: 0.5})
    )
    assert config_from_dict(config_to_dict(config)) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config
    assert flatten(config_to_dict(config))["loss.temperature"] == {**ramp, "start": 4.0}
    over = {"loss": {"temperature": {"kind": "steps", "values": {0: 3}}, "alpha": 0.25}}
    replaced = round_config(replace(config, rounds=(over,)), 0).loss
    assert (replaced.temperature, replaced.alpha) == (Stages("steps", {0: 3.0}), 0.25)


def test_a_group_whose_kind_has_the_name_of_a_schedules_is_a_group() -> None:
    config = config_from_dict({"loss": {"hidden": {"weight": 2, "kind": "mse"}}})
    for over in ({"kind": "cosine"}, {"kind": "cosine", "weight": 2}):
        settings = round_config(replace(config, rounds=({"loss": {"hidden": over}},)), 0)
        assert settings.loss.hidden == Hidden(weight=2.0, kind="cosine")
        assert "loss.hidden.kind" in flatten(config_to_dict(settings))
    pairs = config_from_dict({"loss": {"hidden": {"layers": [[0, 1], [2, 3]]}}})
    assert pairs.loss.hidden.layers == ((0, 1), (2, 3))


def test_flatten_keeps_lists_whole() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {"a.b": 1, "a.c.d": [1, 2], "e": None}


def test_known_keys_are_those_of_the_contract() -> None:
    keys = known_keys()
    for key in (
        "teacher.model",
        "student.model",
        "student.prune.min_channels",
        "loss.kind",
        "rounds",
        "mesh.dp",
        "pipeline.virtual_stages",
        "data.split_sentences",
        "train.microbatch_size",
        "optimizer.betas",
        "checkpoint.resume",
        "log.wandb",
        "run.dir",
    ):
        assert key in keys


def test_values_are_shown_as_they_are_typed() -> None:
    assert show({"a": [True, None, 1.5]}) == "{a: [true,null,1.5]}"
