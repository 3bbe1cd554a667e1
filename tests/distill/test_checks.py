from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distill.checks import check_config
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
        ({"loss": {"kind": "forwardkl"}}, "loss.kind=forwardkl is not known; use forward_kl, reverse_kl, jsd, skew_kl, tvd or top_k_kl"),
        ({"loss": {"beta": 0}}, "loss.beta=0.0 must be 0.001 to 0.999; use loss.kind=forward_kl or reverse_kl for the limits"),
        ({"loss": {"beta": 1.0}}, "loss.beta=1.0 must be 0.001 to 0.999"),
        ({"loss": {"skew": float("nan")}}, "loss.skew=nan must be 0.001 to 0.999"),
        ({"loss": {"top_k": 0}}, "loss.top_k=0 must be greater than 0"),
        ({"loss": {"temperature": {"kind": "linear", "start": 4, "end": 0}}}, "loss.temperature={kind: linear,start: 4.0,end: 0.0} must be greater than 0"),
        ({"loss": {"alpha": {"kind": "cosine", "start": 1.5, "end": 0}}}, "loss.alpha={kind: cosine,start: 1.5,end: 0.0} is outside 0 to 1"),
        ({"loss": {"alpha": {"kind": "steps", "values": {0: 1, 9: -1}}}}, "loss.alpha={kind: steps,values: {0: 1.0,9: -1.0}} is outside 0 to 1"),
        ({"loss": {"alpha": {"kind": "steps", "values": {3: 1}}}}, "loss.alpha={kind: steps,values: {3: 1.0}} must name step 0 as the first"),
        ({"loss": {"alpha": {"kind": "steps", "values": {-1: 1, 0: 1}}}}, "loss.alpha={kind: steps,values: {-1: 1.0,0: 1.0}} must name step 0"),
        ({"loss": {"alpha": {"kind": "steps", "values": {}}}}, "loss.alpha={kind: steps,values: {}} must name step 0"),
        ({"loss": {"temperature": {"kind": "steps", "values": {0: 4, 4: 1}}}, "train": {"steps": 4}}, "loss.temperature={kind: steps,values: {0: 4.0,4: 1.0}} names step 4, but with train.steps=4 the last one is 3; use earlier steps, or more train.steps"),
        ({"loss": {"hidden": {"weight": -1}}}, "loss.hidden.weight=-1.0 must be 0 or more"),
        ({"loss": {"hidden": {"weight": {"kind": "linear", "start": 1, "end": -1}}}}, "loss.hidden.weight={kind: linear,start: 1.0,end: -1.0} must be 0 or more"),
        ({"loss": {"hidden": {"weight": {"kind": "steps", "values": {2: 1}}}}}, "loss.hidden.weight={kind: steps,values: {2: 1.0}} must name step 0"),
        ({"loss": {"hidden": {"kind": "l2"}}}, "loss.hidden.kind=l2 is not known; use mse or cosine"),
        ({"loss": {"hidden": {"projection": "fixed"}}}, "loss.hidden.projection=fixed is not known; use learned or none"),
        ({"loss": {"hidden": {"every": 0}}}, "loss.hidden.every=0 must be greater than 0"),
        ({"loss": {"hidden": {"layers": []}}}, "loss.hidden.layers=[] must be pairs [student's layer, teacher's layer]"),
        ({"loss": {"hidden": {"layers": [[1, 2], [1, 3]]}}}, "loss.hidden.layers=[[1,2],[1,3]] must be pairs"),
        ({"loss": {"hidden": {"layers": [[1, -2]]}}}, "loss.hidden.layers=[[1,-2]] must be pairs"),
        ({"rounds": [{"loss": {"alpha": 2}}]}, "loss.alpha=2.0 is outside 0 to 1"),
        ({"rounds": [{}, {"loss": {"alpha": 2}}]}, "rounds[1]: loss.alpha=2.0 is outside 0 to 1"),
        ({"rounds": [{}, {"train": {"steps": 4}}], "optimizer": {"warmup_steps": 5}}, "rounds[1]: optimizer.warmup_steps=5 is more than train.steps=4"),
        ({"loss": {"alpha": 2}, "rounds": [{}, {"train": {"steps": 4}}]}, "loss.alpha=2.0 is outside 0 to 1"),
        ({"rounds": [{}, {"teacher": {"model": "./nowhere"}}]}, "teacher.model=./nowhere does not exist"),
        ({"rounds": [{}, {"student": {"prune": {"pruning_ratio": 0.2, "num_layers": 3}}}]}, "rounds[1].student.prune.pruning_ratio=0.2 does nothing beside student.prune.num_layers=3; leave it out, or set num_layers to null"),
        ({"train": {"steps": 3, "tokens": 4096}}, "train.steps=3 does nothing beside train.tokens=4096; leave one of them out"),
        ({"rounds": [{"student": {"sparsity": {"method": "magnitude", "pattern": "2:4"}}}, {"student": {"sparsity": {"method": "wanda", "ratio": 0.4}}}]}, "rounds[1].student.sparsity holds 0.4 of the weights at zero, but the round before 0.5, and what is held stays held; use a ratio of 0.5 or more, or method: null"),
        ({"student": {"prune": {"target_params": "50%"}}, "rounds": [{"student": {"prune": {"pruning_ratio": 0}}}, {}]}, "rounds[0].student.prune.pruning_ratio=0.0 does nothing beside student.prune.target_params=50%"),
        ({"student": {"sparsity": {"method": "wanda"}, "low_rank": {"energy": 0.9}}}, "student.sparsity.method=wanda holds weights of dense linears, but student.low_rank.energy=0.9 factors them"),
        ({"rounds": []}, "rounds=[] must have an entry for each round; use [{}]"),
        ({"pipeline": {"teacher": "early"}}, "pipeline.teacher=early is not known; use fill, inline or batch"),
        ({"pipeline": {"schedule": "fast"}}, "pipeline.schedule=fast is not known; use gpipe, 1f1b, interleaved or zero_bubble"),
        ({"pipeline": {"virtual_stages": 2}}, "pipeline.virtual_stages=2 does not go with pipeline.schedule=1f1b; use interleaved or gpipe, or 1"),
        ({"pipeline": {"virtual_stages": 2, "schedule": "interleaved"}}, "pipeline.virtual_stages=2 needs mesh.pp of 2 or more; use 1"),
        ({"pipeline": {"measure_steps": 0}}, "pipeline.measure_steps=0 must be greater than 0"),
        ({"optimizer": {"engine": "apex"}}, "optimizer.engine=apex is not known; use torch or deepspeed"),
        ({"optimizer": {"zero_stage": 3}}, "optimizer.zero_stage=3 gathers parameters inside every forward"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas=[0.9,1.0] must each be 0 or more and less than 1"),
        ({"optimizer": {"warmup_steps": 5}, "train": {"steps": 4}}, "optimizer.warmup_steps=5 is more than train.steps=4"),
        ({"optimizer": {"clip": 0}}, "optimizer.clip=0.0 must be a number above 0; use null for no clipping"),
        ({"optimizer": {"clip": float("inf")}}, "optimizer.clip=inf must be a number above 0; use null for no clipping"),
        ({"train": {"dtype": "float16"}}, "train.dtype=float16 is not known; use bfloat16, float32 or float64"),
        ({"train": {"compile": True, "recompute": "selective"}}, "train.compile=true does not go with train.recompute"),
        ({"pipeline": {"student_layers": [3, 0]}}, "pipeline.student_layers=[3,0] must be 1 or more for each stage"),
        ({"train": {"steps": 0}}, "train.steps=0 must be greater than 0"),
        ({"checkpoint": {"every": -1}}, "checkpoint.every=-1 must be 0 or more"),
        ({"log": {"wandb": "on"}}, "log.wandb=on is not known; use offline, online or disabled"),
        ({"student": {"prune": {"pruning_ratio": 1.0}}}, "student.prune.pruning_ratio=1.0 must be 0 or more and less"),
        ({"student": {"prune": {"method": "l3"}}}, "student.prune.method=l3 is not known; use activation, l1, l2 or random"),
        ({"student": {"prune": {"depth_method": "l1"}}}, "student.prune.depth_method=l1 is not known; use null, block_influence, leave_one_out or random"),
        ({"student": {"prune": {"layers": [2, 1]}}}, "student.prune.layers=[2,1] must be layer indices from 0 up"),
        ({"student": {"prune": {"layers": [0, 1], "num_layers": 3}}}, "student.prune.num_layers=3 but student.prune.layers"),
        ({"student": {"sparsity": {"method": "random"}}}, "student.sparsity.method=random is not known; use null, magnitude or wanda"),
        ({"student": {"sparsity": {"pattern": "4:8"}}}, "student.sparsity.pattern=4:8 is not known; use unstructured or 2:4"),
        ({"student": {"sparsity": {"ratio": 1}}}, "student.sparsity.ratio=1.0 must be greater than 0 and less than 1"),
        ({"student": {"sparsity": {"pattern": "2:4", "ratio": 0.6}}}, "student.sparsity.ratio=0.6 does not go with student.sparsity.pattern=2:4; use 0.5"),
        ({"student": {"sparsity": {"steps": 5}}}, "student.sparsity.steps=5 does not go with student.sparsity.schedule=at_once"),
        ({"student": {"sparsity": {"steps": 5, "schedule": "cubic"}}, "train": {"steps": 4}}, "student.sparsity.steps=5 is more than train.steps=4"),
        ({"student": {"low_rank": {"ratio": 1.0}}}, "student.low_rank.ratio=1.0 must be greater than 0 and less than 1, or null"),
        ({"student": {"low_rank": {"energy": 0}}}, "student.low_rank.energy=0.0 must be greater than 0 and less than 1, or null"),
        ({"student": {"low_rank": {"params": 0}}}, "student.low_rank.params=0 must be greater than 0"),
        ({"student": {"low_rank": {"params": 0.5}}}, "student.low_rank.params=0.5 must be a whole number or null"),
        ({"student": {"low_rank": {"ratio": 0.5, "params": 9}}}, "student.low_rank.ratio=0.5 and student.low_rank.params=9 each say how"),
        ({"student": {"low_rank": {"modules": "mlp"}}}, "student.low_rank.modules=mlp is not known; use ffn, attention, or a list"),
        ({"student": {"low_rank": {"modules": []}}}, "student.low_rank.modules=[] is not known; use ffn, attention, or a list"),
        ({"student": {"low_rank": {"layers": [1, 1]}}}, "student.low_rank.layers=[1,1] must be layer indices from 0 up"),
        ({"student": {"low_rank": {"whiten": "yes"}}}, "student.low_rank.whiten=yes must be true or false"),
        ({"export": {"low_rank": "dense"}}, "export.low_rank=dense is not known; use merged or factored"),
        ({"data": {"path": "pydoc", "held_out_fraction": 0}}, "data.held_out_fraction=0.0 must be greater than 0"),
        ({"data": {"path": None}}, "data.path=null must be given; use a file, a folder"),
        ({"data": {"path": ["pydoc", "./nowhere.txt"]}}, "data.path=./nowhere.txt does not exist; use a file"),
        ({"teacher": {"model": None}}, "teacher.model=null must be given; use a hub id, a folder, a GGUF file or embedded"),
        ({"teacher": {"model": "/no/such/folder"}}, "teacher.model=/no/such/folder does not exist; use a hub id"),
        ({"student": {"model": "./no"}}, "student.model=./no does not exist; use a hub id, a folder or a GGUF file"),
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
