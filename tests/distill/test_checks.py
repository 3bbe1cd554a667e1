from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.checks import budget_of, check_config, check_models
from distill.config import Config, ConfigError
from distill.convert import config_from_dict

BASE = {"teacher": {"model": "embedded"}, "data": {"path": "pydoc"}}


def checked(over: dict[str, Any], world_size: int = 4) -> Config:
    return check_config(config_from_dict({**BASE, **over}), world_size=world_size)


def message(over: dict[str, Any], world_size: int = 4) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(over, world_size)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "dp"), [({}, 4), ({"pp": 2}, 2), ({"pp": 2, "tp": 2}, 1), ({"dp": 4}, 4), ({"tp": 4}, 1)]
)
def test_dp_takes_what_is_left(mesh: dict[str, int], dp: int) -> None:
    assert checked({"mesh": mesh}).mesh.dp == dp


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"mesh": {"pp": 3}}, "mesh.pp=3 x mesh.tp=1 = 3 does not divide the number of processes, 4; start a multiple of 3"),
        ({"mesh": {"dp": 2}}, "mesh.pp=1 x mesh.dp=2 x mesh.tp=1 = 2, but the number of processes is 4; start 2 or"),
        ({"mesh": {"dp": 0}}, "mesh.dp=0 must be at least 1, or -1"),
        ({"mesh": {"pp": 0}}, "mesh.pp=0 must be greater than 0"),
        ({"loss": {"temperature": 0}}, "loss.temperature=0.0 must be greater than 0"),
        ({"loss": {"temperature": float("nan")}}, "loss.temperature=nan must be greater than 0"),
        ({"loss": {"alpha": 1.5}}, "loss.alpha=1.5 is outside 0 to 1"),
        ({"loss": {"alpha": -0.1}}, "loss.alpha=-0.1 is outside 0 to 1"),
        ({"loss": {"kind": "forwardkl"}}, "loss.kind=forwardkl is not known; use forward_kl"),
        ({"rounds": [{"loss": {"alpha": 2}}]}, "loss.alpha=2.0 is outside 0 to 1"),
        ({"rounds": [{}, {}]}, "rounds has 2 entries; use one, progressive rounds are not built yet"),
        ({"rounds": []}, "rounds has 0 entries; use one"),
        ({"pipeline": {"teacher": "early"}}, "pipeline.teacher=early is not known; use fill, inline or batch"),
        ({"pipeline": {"schedule": "fast"}}, "pipeline.schedule=fast is not known; use gpipe, 1f1b, interleaved or zero_bubble"),
        ({"pipeline": {"virtual_stages": 2}}, "pipeline.virtual_stages=2 does not go with pipeline.schedule=1f1b; use interleaved, or 1"),
        ({"pipeline": {"virtual_stages": 2, "schedule": "interleaved"}}, "pipeline.virtual_stages=2 needs mesh.pp of 2 or more; use 1"),
        ({"pipeline": {"measure_steps": 0}}, "pipeline.measure_steps=0 must be greater than 0"),
        ({"optimizer": {"engine": "deepspeed"}}, "optimizer.engine=deepspeed is not built yet; use torch"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas=[0.9,1.0] must each be 0 or more and less than 1"),
        ({"optimizer": {"warmup_steps": 5}, "train": {"steps": 4}}, "optimizer.warmup_steps=5 is more than train.steps=4"),
        ({"train": {"dtype": "float16"}}, "train.dtype=float16 is not known; use bfloat16, float32 or float64"),
        ({"train": {"compile": True, "recompute": "selective"}}, "train.compile=true does not go with train.recompute"),
        ({"pipeline": {"student_layers": [3, 0]}}, "pipeline.student_layers=[3,0] must be 1 or more for each stage"),
        ({"train": {"steps": 0}}, "train.steps=0 must be greater than 0"),
        ({"checkpoint": {"every": -1}}, "checkpoint.every=-1 must be 0 or more"),
        ({"checkpoint": {"resume": "nowhere"}}, "checkpoint.resume=nowhere is no folder; use auto, none or"),
        ({"log": {"wandb": "on"}}, "log.wandb=on is not known; use offline, online or disabled"),
        ({"student": {"prune": {"pruning_ratio": 1.0}}}, "student.prune.pruning_ratio=1.0 must be 0 or more and less"),
        ({"student": {"prune": {"layers": [2, 1]}}}, "student.prune.layers=[2,1] must be layer indices from 0 up"),
        ({"student": {"prune": {"layers": [0, 1], "num_layers": 3}}}, "student.prune.num_layers=3 but student.prune.layers"),
        ({"data": {"path": "pydoc", "held_out_fraction": 0}}, "data.held_out_fraction=0.0 must be greater than 0"),
        ({"data": {"path": None}}, "data.path=null must be given; use a file, a folder"),
        ({"data": {"path": ["pydoc", "./nowhere.txt"]}}, "data.path=./nowhere.txt does not exist; use a file"),
        ({"teacher": {"model": None}}, "teacher.model=null must be given; use a hub id, a folder, a GGUF file or embedded"),
        ({"teacher": {"model": "/no/such/folder"}}, "teacher.model=/no/such/folder does not exist; use a hub id"),
        ({"student": {"model": "./no"}}, "student.model=./no does not exist; use a hub id or a folder"),
    ],
)  # fmt: skip
def test_mistakes(over: dict[str, Any], words: str) -> None:
    assert message(over).startswith(words)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    over = {"mesh": {"pp": 2}, "train": {"global_batch_size": 30, "microbatch_size": 4}}
    assert message(over) == (
        "train.global_batch_size=30 is not a multiple of mesh.dp=2 x train.microbatch_size=4 = 8; use 24 or 32"
    )
    over["train"]["global_batch_size"] = 3
    assert message(over).endswith("use 8")


def test_a_null_is_taken_where_it_means_something(tmp_path: Path) -> None:
    config = checked({"optimizer": {"clip": None}, "checkpoint": {"resume": str(tmp_path)}})
    assert config.optimizer.clip is None


def test_wandb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message({}) == "log.wandb=offline needs wandb, which is not installed; use disabled"
    checked({"log": {"wandb": "disabled"}})


def hf_config(**changes: Any) -> SimpleNamespace:
    values = {"num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 100}
    config = SimpleNamespace(**{**values, "max_position_embeddings": 1024, **changes})
    config.get_text_config = lambda: config
    config.per_layer_config = [config]
    return config


@pytest.mark.parametrize(
    ("mesh", "teacher", "student", "words"),
    [
        ({"tp": 3}, {}, {}, "mesh.tp=3 does not divide num_attention_heads=32 of the teacher; use 1, 2, 4 or 8"),
        (
            {"tp": 3},
            {"num_attention_heads": 24},
            {},
            "mesh.tp=3 does not divide num_key_value_heads=8 of the teacher; use 1, 2, 4 or 8",
        ),
        ({"tp": 4}, {}, {"num_key_value_heads": 6}, "mesh.tp=4 does not divide num_key_value_heads=6 of the student; use 1 or 2"),
        (
            {"tp": 2},
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            "mesh.tp=2 does not divide num_attention_heads=9 of the teacher; use 1 or 3",
        ),
        ({"pp": 4}, {}, {"num_hidden_layers": 3}, "mesh.pp=4 is more than num_hidden_layers=3 of the student; use at most 3"),
        ({}, {}, {"vocab_size": 99}, "student.model=null has vocab_size=99 but the teacher has vocab_size=100; use a student"),
        (
            {},
            {"max_position_embeddings": 256},
            {},
            "data.seq_len=512 is longer than max_position_embeddings=256 of the teacher; use at most 256",
        ),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(mesh: dict[str, int], teacher: Any, student: Any, words: str) -> None:
    config = config_from_dict({**BASE, "mesh": mesh})
    with pytest.raises(ConfigError) as caught:
        check_models(config, hf_config(**teacher), hf_config(**student))
    assert str(caught.value).startswith(words)


def test_every_layers_heads_are_looked_at() -> None:
    student = hf_config()
    student.per_layer_config = [hf_config(), hf_config(num_attention_heads=12, num_key_value_heads=3)]
    with pytest.raises(
        ConfigError, match=r"mesh.tp=2 does not divide num_key_value_heads=3 of the student; use 1"
    ):
        check_models(config_from_dict({**BASE, "mesh": {"tp": 2}}), hf_config(), student)


def test_models_that_fit() -> None:
    config = config_from_dict({**BASE, "mesh": {"pp": 4, "tp": 8}})
    check_models(config, hf_config(), hf_config(num_attention_heads=16))
    no_positions = hf_config()
    del no_positions.max_position_embeddings, no_positions.num_key_value_heads
    check_models(config, no_positions, hf_config())


@pytest.mark.parametrize(
    ("target", "expected"), [(7e7, 70_000_000), ("0.5B", 500_000_000), ("50%", 100), (9, 9)]
)
def test_a_budget_is_a_number_or_a_share(target: object, expected: int) -> None:
    assert budget_of(target, 200) == expected


@pytest.mark.parametrize("target", ["many", "100%", -3, "0M", "nan"])
def test_a_budget_that_is_none_is_refused(target: object) -> None:
    with pytest.raises(
        ConfigError, match=f"student.prune.target_params={target} must be a number of parameters"
    ):
        budget_of(target, 200)
