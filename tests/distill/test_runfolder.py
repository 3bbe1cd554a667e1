from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distill.config import Checkpoint, Config, ConfigError, Log, Loss, MeshShape, Pipeline, Run, Train
from distill.runfolder import (
    CONFIG_FILE,
    METRICS_FILE,
    check_run_folder,
    cut_lines,
    read_summary,
    write_config,
    write_whole,
)
from distill.student_config import LowRank, Student


def config_in(folder: Path) -> Config:
    return replace(Config(), run=Run(dir=str(folder)), mesh=MeshShape(pp=2, dp=1))


def begin(config: Config) -> None:
    """Do what a run does to its folder first."""
    write_config(config)
    (Path(config.run.dir or ".") / "pruned").mkdir()


def test_a_new_folder_and_the_same_settings_pass(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    check_run_folder(config)
    begin(config)
    check_run_folder(config)


def test_a_run_that_was_refused_does_not_bind_the_next(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    write_config(config)
    check_run_folder(replace(config, loss=Loss(temperature=5.0)))


@pytest.mark.parametrize("name", ["pruned", "student", "checkpoints"])
def test_what_no_run_made_is_not_taken_or_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(
        ConfigError, match=f"holds {name} but no config.yaml, so it is not the folder of a run; use"
    ):
        check_run_folder(config_in(tmp_path))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"file/run cannot be written \(Not a directory\); use another run.dir"
    ):
        write_config(config_in(tmp_path / "file" / "run"))


def test_another_config_is_refused_with_its_key(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    begin(config)
    with pytest.raises(ConfigError) as caught:
        check_run_folder(replace(config, loss=Loss(temperature=5.0)))
    assert str(caught.value) == (
        f"run.dir={tmp_path} holds a run with loss.temperature=2.0, this one has loss.temperature=5.0; use another "
        "run.dir or loss.temperature=2.0"
    )
    with pytest.raises(ConfigError, match=r"loss.alpha=0.3, this one has loss.alpha=0.5 \(and 2 more\)"):
        check_run_folder(replace(config, loss=Loss(alpha=0.5), train=Train(seed=3, global_batch_size=8)))


def test_what_does_not_shape_the_result_may_change(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    begin(config)
    more = replace(config, train=Train(steps=2000, timeout_s=5.0), log=Log(wandb="disabled"))
    check_run_folder(replace(more, checkpoint=Checkpoint(every=7)))
    layout = replace(more, mesh=MeshShape(pp=1, dp=2, tp=4), pipeline=Pipeline(schedule="gpipe"))
    check_run_folder(replace(layout, train=replace(more.train, microbatch_size=2)))
    with pytest.raises(ConfigError, match="train.seed=0, this one has train.seed=1"):
        check_run_folder(replace(config, train=Train(seed=1)))


def test_rounds_may_be_executed_otherwise_and_not_be_others(tmp_path: Path) -> None:
    def with_round(**train: int) -> Config:
        return replace(config_in(tmp_path), rounds=({"train": {"steps": 3, **train}}, {}))

    begin(with_round(microbatch_size=1))
    check_run_folder(with_round(microbatch_size=4))
    check_run_folder(with_round())
    for other in (with_round(steps=4), with_round(global_batch_size=2), replace(with_round(), rounds=({},))):
        with pytest.raises(ConfigError, match="holds a run with rounds="):
            check_run_folder(other)


def test_steps_may_change_in_a_run_of_one_round_only(tmp_path: Path) -> None:
    """A round that was cut from an earlier one belongs to the steps which that one had."""
    config = replace(config_in(tmp_path), rounds=({}, {}))
    begin(config)
    with pytest.raises(ConfigError, match="train.steps=1000, this one has train.steps=2000"):
        check_run_folder(replace(config, train=Train(steps=2000)))
    with pytest.raises(ConfigError, match="train.tokens=null, this one has train.tokens=64000"):
        check_run_folder(replace(config, train=Train(tokens=64000)))
    alone = replace(config_in(tmp_path / "alone"), train=Train(tokens=32000))
    begin(alone)
    check_run_folder(replace(alone, train=Train(tokens=64000)))


def resuming(folder: Path, resume: object) -> Config:
    return replace(config_in(folder / "run"), checkpoint=Checkpoint(resume=str(resume)))


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        check_run_folder(config)
    return str(caught.value)


def test_what_a_run_begins_with_belongs_to_its_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = (complete(tmp_path / "other" / f"step-{step:08d}") for step in (10, 20))
    begin(resuming(tmp_path, first))
    # Neither what a kill has left of a save nor what was set aside is a checkpoint to go on from.
    for name in ("step-00000012.partial", "step-00000011.damaged"):
        complete(run / "checkpoints" / name)
    check_run_folder(resuming(tmp_path, first))
    for resume in ("auto", "none", second):
        assert refused(resuming(tmp_path, resume)) == (
            f"run.dir={run} holds a run that was started with checkpoint.resume={first} and has no checkpoint of its own "
            f"yet, this one has checkpoint.resume={resume}; use another run.dir or checkpoint.resume={first}"
        )
    own = complete(run / "checkpoints" / "step-00000012")
    for resume in ("auto", first, own):
        check_run_folder(resuming(tmp_path, resume))
    assert refused(resuming(tmp_path, second)) == (
        f"run.dir={run} holds a run that was started with checkpoint.resume={first} and has checkpoints of its own, this one "
        f"has checkpoint.resume={second}; use another run.dir or checkpoint.resume={first} or auto"
    )


def test_a_run_that_began_anew_does_not_go_on_from_another_ones_checkpoint(tmp_path: Path) -> None:
    """What is in its folder was not made out of that."""
    run, other = tmp_path / "run", complete(tmp_path / "other" / "step-00000010")
    begin(resuming(tmp_path, "auto"))
    for stands in ("no checkpoint of its own yet", "checkpoints of its own"):
        assert refused(resuming(tmp_path, other)) == (
            f"run.dir={run} holds a run that was started with checkpoint.resume=auto and has {stands}, this one has "
            f"checkpoint.resume={other}; use another run.dir or checkpoint.resume=auto"
        )
        own = run / "checkpoints" / "step-00000012"
        own.is_dir() or complete(own)
    check_run_folder(resuming(tmp_path, own))


def test_a_named_checkpoint_may_go_when_the_run_has_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for gone in (tmp_path / "other" / "step-00000010", run / "checkpoints" / "step-00000002"):
        told = f"checkpoint.resume={gone} is no folder; use auto, none or a folder of checkpoints/"
        assert refused(resuming(tmp_path, gone)) == told
        begin(resuming(tmp_path, gone))
        assert refused(resuming(tmp_path, gone)) == told
        complete(run / "checkpoints" / "step-00000012")
        check_run_folder(resuming(tmp_path, gone))
        write_config(resuming(tmp_path, "auto"))
        assert refused(resuming(tmp_path, gone)) == told, "it is not the same command"
        shutil.rmtree(run)


def test_checkpoints_that_cannot_be_looked_at_are_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = complete(tmp_path / "other" / "step-00000010")
    begin(resuming(tmp_path, other))

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    check_run_folder(resuming(tmp_path, "auto"))


def test_a_factored_student_belongs_to_its_settings(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    write_config(config)
    (tmp_path / "factored").mkdir()
    with pytest.raises(ConfigError, match=r"student.low_rank.ratio=null, this one has"):
        check_run_folder(replace(config, student=Student(low_rank=LowRank(ratio=0.3))))


def test_starting_anew_does_not_overwrite_a_run(tmp_path: Path) -> None:
    config = replace(config_in(tmp_path), checkpoint=Checkpoint(resume="none"))
    write_config(config)
    check_run_folder(config)
    (tmp_path / METRICS_FILE).write_text("{}\n")
    with pytest.raises(ConfigError, match="checkpoint.resume=none starts anew, but run.dir="):
        check_run_folder(config)


def test_a_file_in_place_of_the_folder_or_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; use a folder"):
        check_run_folder(config_in(tmp_path / "file"))
    begin(config_in(tmp_path))
    (tmp_path / CONFIG_FILE).write_text("- a list\n")
    with pytest.raises(ConfigError, match="is not the settings of a run"):
        check_run_folder(config_in(tmp_path))


def test_lines_after_the_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "los')
    assert [line["step"] for line in cut_lines(file, last_step=3)] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert cut_lines(tmp_path / "none.jsonl", last_step=3) == []


def test_a_broken_line_in_the_middle_is_told(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON: 'nonsense'"):
        cut_lines(file, last_step=3)


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "one")
    write_whole(file, "two")
    assert file.read_text() == "two" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_summary_of_a_run_that_did_not_end(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text("")
    assert read_summary(tmp_path) is None
