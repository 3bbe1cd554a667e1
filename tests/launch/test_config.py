from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

import recipes
from distill.checks import check_config
from distill.config import Config, ConfigError, Run
from distill.convert import config_from_dict
from launch.config import CommandLine, compose_config, config_text, groups, parse_command_line, parse_options
from launch.help import key_meanings

RECIPES = Path(recipes.__file__).parent
EXPERIMENTS = sorted(path.stem for path in (RECIPES / "experiment").glob("*.yaml"))


def compose(*arguments: str) -> Config:
    return compose_config(parse_command_line(arguments))


def test_the_default_recipes_are_the_defaults_of_the_settings() -> None:
    assert replace(compose(), run=Run()) == Config()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_run_that_could_start(name: str) -> None:
    config = compose(f"experiment={name}")
    assert config.run.dir == f"runs/{name}"
    checked = check_config(config, world_size=2)
    assert checked.mesh.pp * checked.mesh.dp * checked.mesh.tp == 2


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/default.yaml")), ids=lambda path: path.parent.name)
def test_the_comment_above_each_key_is_its_meaning(path: Path) -> None:
    meanings = key_meanings()
    comment: list[str] = []
    branches = [path.parent.name]
    documented = 0
    for line in path.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.removeprefix("#").strip())
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        key = ".".join([*branches[: depth + 1], text.partition(":")[0]])
        branches = [*branches[: depth + 1], text.partition(":")[0]]
        if key in meanings:
            assert " ".join(comment) == meanings[key], key
            documented += 1
        comment = []
    assert documented == sum(key.startswith(f"{path.parent.name}.") for key in meanings)


def test_every_field_has_a_meaning_and_every_group_a_recipe() -> None:
    groups_of_keys = {item.name for item in fields(Config) if is_dataclass(getattr(Config(), item.name))}
    assert groups_of_keys | {"experiment"} == set(groups())
    assert all(len(meaning) > 8 for meaning in key_meanings().values())


def test_overrides_groups_and_experiments_are_hydras() -> None:
    config = compose(
        "experiment=quickstart",
        "mesh.tp=3",
        "data.path=[a.txt, b.txt]",
        "optimizer.lr=1e-5",
        "optimizer.clip=null",
    )
    assert (config.teacher.model, config.mesh.tp, config.optimizer.lr) == ("embedded", 3, 1e-5)
    assert config.data.path == ("a.txt", "b.txt") and config.optimizer.clip is None
    assert compose("teacher=embedded").teacher.model == "embedded"
    assert compose("loss={temperature: 3, alpha: 0}").loss.temperature == 3.0
    loss = compose(
        "loss.temperature={kind: linear, start: 4, end: 1}",
        "loss.alpha={kind: steps, values: {0: 1, 100: 0.5}}",
    ).loss
    assert (loss.at(0, 200).temperature, loss.at(199, 200).temperature) == (4.0, 1.0)
    assert (loss.at(99, 200).alpha, loss.at(100, 200).alpha) == (1.0, 0.5)
    assert compose("loss.temperature=4.0").loss.temperature == 4.0
    assert compose("rounds=[{loss: {alpha: 0.5}}]").rounds == ({"loss": {"alpha": 0.5}},)
    assert compose("run.dir=/somewhere").run.dir == "/somewhere"
    assert compose().run.dir == "runs/default"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.stepz=3"], "there is no key train.stepz; did you mean train.steps?"),
        (["+train.stepz=3"], "there is no key train.stepz; did you mean train.steps?"),
        (["experiment=nope"], "there is no recipe experiment=nope; use "),
        (["teacher=nope"], "there is no recipe teacher=nope; use default or embedded"),
        (["train=3"], "train=3 does not name a recipe; use train=default"),
        (["train.steps=[1,"], "the override train.steps=[1, cannot be read"),
        (["train.steps=x"], "train.steps=x must be a whole number"),
        (["quickstart"], "the argument quickstart is not an override; use experiment=quickstart"),
        (["nonsense"], "the argument nonsense is not an override; use key=value"),
        (["data.path=a,b"], "data.path=a,b is a sweep, and a command is one run; a list is written 'data.path=[a,b]'"),
        (["~train.steps"], "~train.steps is not supported: keys are neither added nor removed"),
        (["+train.steps=3"], "Could not append to config. An item is already at 'train.steps'"),
        (["hydra.run.dir=x"], "hydra.run.dir has no effect here: no Hydra job is started; use run.dir"),
        (["rounds.0.loss={}"], "rounds.0.loss is part of a list, and lists are replaced whole"),
        (["teacher.model=${nope}"], "Interpolation key 'nope' not found"),
        (["--multirun", "train.steps=1"], "--multirun is not supported: a command is one run"),
        (["-m"], "-m is not supported"),
        (["--info"], "there is no option --info; use --help, --cfg job"),
        (["--cfg", "hydra"], "--cfg hydra is not known; use --cfg job"),
        (["--config-dir", "/no/such"], "--config-dir /no/such is no folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(*arguments)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_recipes_of_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 7\n")
    (folder / "wrong.yaml").write_text("# @package _global_\ntrain:\n  stepz: 7\n")
    (folder / "placeless.yaml").write_text("train:\n  steps: 7\n")
    (folder / "broken.yaml").write_text("# @package _global_\ntrain: [7\n")
    config = compose("--config-dir", str(tmp_path), "experiment=mine")
    assert (config.train.steps, config.run.dir) == (7, "runs/mine")
    with pytest.raises(ConfigError, match=r"there is no key train.stepz; did you mean train.steps\?"):
        compose("--config-dir", str(tmp_path), "experiment=wrong")
    with pytest.raises(ConfigError) as caught:
        compose("--config-dir", str(tmp_path), "experiment=placeless")
    assert str(caught.value) == "recipe experiment=placeless needs the first line `# @package _global_`"
    with pytest.raises(ConfigError, match="a recipe is no valid YAML: ") as caught:
        compose("--config-dir", str(tmp_path), "experiment=broken")
    assert "\n" not in str(caught.value)


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("experiment=quickstart")
    assert os.listdir(tmp_path) == [] and Path.cwd() == tmp_path


def test_the_printed_settings_compose_again() -> None:
    config = compose("experiment=quickstart")
    assert config_from_dict(yaml.safe_load(config_text(config))) == config


def test_command_line() -> None:
    line = parse_command_line(["a=1", "--cfg", "job", "b=-1"])
    assert line == CommandLine(overrides=("a=1", "b=-1"), shows="config")
    assert parse_command_line(["--cfg=job", "-h"]).shows == "help"


def test_options_of_benchmarks() -> None:
    assert parse_options(["rows=3", "sizes=[1,2]", "bench.out=x.json"]) == {
        "rows": 3,
        "sizes": [1, 2],
        "bench.out": "x.json",
    }
    with pytest.raises(ConfigError, match="is a sweep"):
        parse_options(["rows=1,2"])
