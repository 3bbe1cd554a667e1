"""What a round takes from those before it, and when it is good enough."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, ConfigError, Gate, Run, Teacher, Train
from distill.rounds import Progress, lineage_of, rounds_of, verdict
from distill.student_config import Prune, Student


def config(*rounds: dict, model: str | None = None) -> Config:
    return Config(
        teacher=Teacher(model="big"), student=Student(model=model), run=Run(dir="run"), rounds=tuple(rounds)
    )


def test_rounds_have_their_own_settings_and_name_earlier_students() -> None:
    first, second, third = rounds_of(
        config(
            {"loss": {"alpha": 0.5}},
            {"teacher": {"model": "previous"}, "train": {"tokens": 10_000}},
            {"teacher": {"model": "round-0"}, "data": {"seq_len": 64}},
        )
    )
    assert (first.teacher.model, second.teacher.model, third.teacher.model) == (
        "big",
        "run/round-0",
        "run/round-0",
    )
    assert (first.loss.alpha, second.loss.alpha) == (0.5, 0.3)
    assert second.train.steps == 1 and first.train.steps == 1000, "10,000 tokens are less than 32 rows of 512"
    assert (second.data.seq_len, third.data.seq_len) == (512, 64)


def test_a_round_that_names_its_steps_does_not_inherit_tokens() -> None:
    of_tokens = replace(config({}, {"train": {"steps": 5}}), train=Train(tokens=10**6))
    assert [each.train.steps for each in rounds_of(of_tokens)] == [62, 5]


@pytest.mark.parametrize(
    ("index", "name"), [(0, "previous"), (0, "round-0"), (1, "round-1"), (1, "round-7"), (2, "round-2")]
)
def test_a_student_that_is_not_there_yet_teaches_nobody(index: int, name: str) -> None:
    rounds = [{}, {}, {}]
    rounds[index] = {"teacher": {"model": name}}
    with pytest.raises(ConfigError, match=rf"rounds\[{index}\].teacher.model={name}"):
        rounds_of(config(*rounds))


def test_where_students_come_from() -> None:
    smaller = {"student": {"prune": {"num_layers": 3}}}
    rounds = rounds_of(config({}, smaller, {**smaller, "loss": {"alpha": 0}}, {}))
    lineages = [lineage_of(rounds, index) for index in range(4)]
    folder = Path("run")
    assert [each.origin for each in lineages] == ["big"] * 4
    assert [each.made_in for each in lineages] == [0, 1, 1, 3], "the third goes on with the second's"
    assert [each.previous for each in lineages] == [
        None,
        *(folder / f"round-{number}" for number in (0, 0, 2)),
    ]
    begins = [folder / name for name in ("pruned", "pruned-1", "pruned-1", "pruned-3")]
    assert [each.begins for each in lineages] == begins
    assert [each.factored.name for each in lineages] == ["factored", "factored-1", "factored-1", "factored-3"]
    assert [each.continued for each in lineages] == [None, None, folder / "round-1", None]


def test_a_ready_student_is_not_cut_in_the_first_round() -> None:
    rounds = rounds_of(config({}, {"student": {"prune": {"num_layers": 3}}}, model="small"))
    first, second = lineage_of(rounds, 0), lineage_of(rounds, 1)
    assert first.begins is None and first.previous is None
    assert second.begins == Path("run/pruned-1") and second.previous == Path("run/round-0")
    assert rounds[1].student == replace(Student(model="small"), prune=Prune(num_layers=3))


@pytest.mark.parametrize(
    ("gate", "gap", "attempt", "expected"),
    [
        (Gate(), 9.0, 0, "next"),
        (Gate(stop_if=0.5), 0.5, 0, "next"),
        (Gate(stop_if=0.5), 0.6, 0, "stop"),
        (Gate(repeat_until=0.5), 0.5, 0, "next"),
        (Gate(repeat_until=0.5), 0.6, 0, "again"),
        (Gate(repeat_until=0.5), 0.6, 1, "again"),
        (Gate(repeat_until=0.5), 0.6, 2, "next"),
        (Gate(repeat_until=0.5, stop_if=0.55), 0.6, 2, "stop"),
        (Gate(repeat_until=0.5, repeats=1), 0.6, 0, "next"),
        (Gate(), math.nan, 0, "stop"),
        (Gate(repeat_until=0.5, stop_if=9.0), math.nan, 0, "stop"),
        (Gate(repeat_until=0.5), math.inf, 0, "stop"),
    ],
)
def test_gates(gate: Gate, gap: float, attempt: int, expected: str) -> None:
    assert verdict(gate, gap=gap, attempt=attempt)[0] == expected


def test_why_a_round_is_not_followed_by_the_next() -> None:
    gate = Gate(repeat_until=0.5, repeats=2, stop_if=0.7)
    whys = [
        verdict(gate, gap=gap, attempt=at)[1] for gap, at in ((0.6, 0), (0.6, 1), (0.8, 1), (math.nan, 0))
    ]
    assert whys == [
        "gap 0.6000 is above gate.repeat_until=0.5: once more",
        "",
        "gap 0.8000 is above gate.stop_if=0.7: the run ends here",
        "gap nan is not finite: the run ends here",
    ]


def test_progress_counts_what_the_next_round_needs() -> None:
    progress = Progress().after_step(tokens=100).after_step(tokens=90)
    assert progress == Progress(step=2, round_step=2, tokens=190)
    again = progress.again({"0": 64, "1": 128})
    assert again == Progress(step=2, attempt=1, tokens=190, read={"0": 64, "1": 128})
    # What a round does not read stays where it is.
    assert again.next_round({"1": 192}) == Progress(step=2, round=1, tokens=190, read={"0": 64, "1": 192})
    cut = again.after_pruning(1.5)
    assert cut.prune_s == (1.5,)
    # A round that cuts nothing takes no time, and one that is begun again adds to its own.
    third = replace(cut, round=2).after_pruning(0.5).after_pruning(0.25)
    assert third.prune_s == (1.5, 0, 0.75)
    assert Progress.from_dict(json.loads(json.dumps(asdict(third)))) == third


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("read", value) for value in ([64], 64, {"0": -1}, {"0": 0.5}, {"0": True}, {"0": None})),
        *(("prune_s", value) for value in (0.5, {"0": 0.5}, [-0.5], ["0.5"], [math.inf], [math.nan])),
        *(("tokens", value) for value in (-1, 0.5, "1", [1], {"0": 1}, 2**53)),
    ],
)
def test_a_checkpoint_that_holds_no_progress_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"extras\.{name} is"):
        Progress.from_dict({**json.loads(json.dumps(asdict(Progress()))), name: value})
