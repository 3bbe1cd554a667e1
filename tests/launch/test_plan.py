from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from distill.config import ConfigError
from launch.command import run_alone
from launch.plan import plan

COSTS = ["plan.costs.forward=1", "plan.costs.backward=2", "plan.costs.teacher=4"]
CONTRACT = ("ideal_s", "bound_s", "step_s", "bubble_fraction", "queue_bytes", "advice")


def run(folder: Path, *arguments: str) -> Any:
    """Run the command on given costs and return the JSON."""
    out = folder / "plan.json"
    plan([*COSTS, *arguments, f"plan.out={out}"])
    return json.loads(out.read_text())


def test_a_layout_with_given_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """p = 8, m = 16, r = 4, latency 0.3 F, end 12 F: inline 1.652 of the ideal, filled 1.000."""
    arguments = [
        "mesh.pp=8",
        "train.global_batch_size=16",
        "plan.costs.latency=0.3",
        "plan.costs.step_end=12",
    ]
    found = run(tmp_path, *arguments, f"plan.svg={tmp_path / 'plan.svg'}")
    assert set(CONTRACT) <= set(found)
    assert found["ideal_s"] == found["bound_s"] == 112
    assert found["step_s"]["inline"] == pytest.approx(1.652 * 112, rel=1e-3)
    assert found["step_s"]["fill"] == pytest.approx(112, rel=1e-3)
    assert found["bubble_fraction"]["fill"] < 0.005 < found["bubble_fraction"]["inline"]
    assert found["queue_bytes"] is None and found["queue_tensors"] > 0
    assert [found[name] for name in ("pp", "dp", "tp", "num_microbatches")] == [8, 1, 1, 16]
    shown = capsys.readouterr().out
    assert "1.65x" in shown and "rank 7  " in shown and found["advice"] in shown.replace("\n  ", " ")
    picture = ElementTree.parse(tmp_path / "plan.svg").getroot()
    titles = [each.text or "" for each in picture.iter() if each.get("class") == "title"]
    assert [title.partition(":")[0] for title in titles] == [
        "teacher inline",
        "teacher batch",
        "teacher fill",
    ]


def test_lists_virtual_stages_and_slices(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        "mesh.pp=2",
        "pipeline.schedule=interleaved",
        "pipeline.virtual_stages=2",
        "train.global_batch_size=4",
        "plan.costs.forward=[1,1,1,2]",
        "plan.costs.teacher=[3,1]",
        "plan.slices=5",
    )
    assert found["ideal_s"] == 4 * max(1 + 2 + 1 + 2 + 3, 1 + 2 + 2 + 2 + 1)
    assert found["slices"] == 5 and found["costs"]["teacher"] == [3, 1]


def test_every_layout_of_some_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "mesh.pp=4", "train.global_batch_size=4", "plan.devices=8")
    layouts = [(row["pp"], row["dp"], row["tp"]) for row in found]
    assert sorted(layouts) == sorted(
        (pp, dp, 8 // pp // dp) for pp in (1, 2, 4, 8) for dp in (1, 2, 4) if 8 % (pp * dp) == 0
    )
    times = [row["step_s"]["fill"] for row in found]
    assert times == sorted(times)
    assert all(row["ideal_s"] == pytest.approx(4 * 28 / 8) for row in found), (
        "the same work on as many devices"
    )
    assert found[0]["tp"] == 1, "of equally fast ones what communicates less comes first"
    shown = capsys.readouterr().out
    assert "Left out, pp 1 dp 8 tp 1: train.global_batch_size=4 is not a multiple of mesh.dp=8" in shown
    assert "They are taken as those of pp 4 tp 1" in shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["mesh.pp=1"], "mesh.pp=1 has no bubbles to fill"),
        (["mesh.pp=4", "loss.alpha=1"], "loss.alpha=1 needs no teacher"),
    ],
)
def test_where_nothing_can_be_filled(arguments: list[str], part: str, tmp_path: Path) -> None:
    found = run(tmp_path, *arguments)
    assert found["advice"].startswith(part)
    assert found["step_s"]["fill"] == found["step_s"]["inline"]


def test_of_several_rounds_it_is_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = "rounds=[{train: {global_batch_size: 8}}, {}]"
    found = run(tmp_path, *COSTS, "mesh.pp=4", rounds)
    assert "The plan is the first round's; a run makes another for each." in capsys.readouterr().out
    alone = run(tmp_path, *COSTS, "mesh.pp=4", "train.global_batch_size=8")
    assert found == alone and "first round" not in capsys.readouterr().out
    assert found != run(tmp_path, *COSTS, "mesh.pp=4")


def test_help_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    plan(["--help"])
    shown = capsys.readouterr().out
    assert (
        "plan.costs.step_end" in shown and "mesh.pp=1" in shown and shown.startswith("python -m launch.plan")
    )
    plan(["mesh.pp=3", "plan.slices=2", "--cfg", "job"])
    shown = capsys.readouterr().out
    assert "pp: 3" in shown and "plan.slices: 2" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.costs.forward=1"], "plan.costs.backward, plan.costs.teacher must be given, because teacher.model=null"),
        ([*COSTS, "mesh.pp=2", "plan.costs.forward=[1,2,3]"], "plan.costs.forward=[1.0,2.0,3.0] has 3 entries, but"),
        (["mesh.pp=2", *(f"{each.partition('=')[0]}=0" for each in COSTS)], "plan.costs: all are zero, so a step takes"),
        ([*COSTS, "rounds=[]"], "rounds=[] must have an entry for each round"),
        ([*COSTS, "plan.speed=3"], "there is no key plan.speed"),
        ([*COSTS, "mesh.pps=3"], "there is no key mesh.pps; did you mean mesh.pp?"),
        ([*COSTS, "plan.devices=8", "train.global_batch_size=0"], "train.global_batch_size=0 must be greater than 0"),
        ([*COSTS, "mesh.dp=3"], "train.global_batch_size=32 is not a multiple of mesh.dp=3"),
        ([*COSTS, "plan.out=/proc/plan.json"], "plan.out=/proc/plan.json cannot be written"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    assert run_alone(plan) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1


def test_given_costs_need_no_torch() -> None:
    code = (
        "import sys; from launch.plan import plan; plan(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COSTS, "mesh.pp=4"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.endswith("\n[]\n") and done.stderr == ""


def test_a_plan_without_a_model_that_it_needs() -> None:
    with pytest.raises(ConfigError, match="teacher.model=/nowhere does not exist"):
        plan(["teacher.model=/nowhere"])
