"""The timeline files of a step: written once, readable, with every action of every stage."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from distill.timeline import JSON_FILE, SVG_FILE, gather_events, write_timeline
from parallel.mesh import Mesh
from parallel.pipeline.actions import parse
from parallel.pipeline.simulate import Event
from tests.equivalence.trajectory import SINGLE, Case, make_step, mesh_of, save_models, train
from tests.workers import run_distributed


def _event(text: str, start_s: float, end_s: float) -> Event:
    action = parse(text)
    return Event(action.stage, action, start_s, end_s)


def _clocks() -> list[Event]:
    """Give the two ranks clocks that are far apart; events that ended at the barrier must coincide."""
    mesh = Mesh.create(pp=2, dp=1, tp=1)
    shift_s = 1000.0 * mesh.pp.rank
    real = time.perf_counter
    time.perf_counter = lambda: real() + shift_s
    try:
        now_s = time.perf_counter()
        return gather_events(mesh, [_event(f"{mesh.pp.rank}F0", now_s - 2, now_s - 1)])
    finally:
        time.perf_counter = real


def test_events_of_all_stages_share_one_clock() -> None:
    first, second = run_distributed(2, _clocks)
    assert first == second and [str(event.action) for event in first] == ["0F0", "1F0"]
    assert first[0].start_s == pytest.approx(first[1].start_s, abs=60)
    for event in first:
        assert event.end_s - event.start_s == pytest.approx(1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _write(cases: list[Case], folders: dict[str, str], root: Path) -> list[list[list[str]]]:
    """Train a step, write the timeline; return the plan's actions by pipeline rank."""
    plans = []
    for number, case in enumerate(cases):
        step = make_step(case, folders, mesh_of(case))
        train(step, range(2))
        plan = step.last_plan
        done = [event.action for event in step.last_events]
        assert sorted(done) == sorted(plan.ranks[step.mesh.pp.rank])
        # Only rank 0 may need the folder: the others get one that is not there.
        folder = root / str(number) if step.mesh.world.is_first else root / "nowhere"
        write_timeline(folder, step.mesh, plan, step.last_events)
        plans.append([[str(action) for action in actions] for actions in plan.ranks])
    return plans


def _check(folder: Path, ranks: list[list[str]]) -> None:
    assert {path.name for path in folder.iterdir()} == {SVG_FILE, JSON_FILE}
    trace = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    assert {event["pid"] for event in trace["traceEvents"]} == {0, 1}, "planned and measured"
    drawn = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 1]
    for rank, actions in enumerate(ranks):
        mine = sorted((e for e in drawn if e["tid"] // 2 == rank), key=lambda e: e["ts"])
        assert sorted(event["name"] for event in mine) == sorted(actions)
        assert [event["name"] for event in mine if event["cat"] == "F"] == [
            a for a in actions if "F" in a[:2]
        ]
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in mine)
    assert len(drawn) == sum(map(len, ranks))
    svg = ElementTree.fromstring((folder / SVG_FILE).read_text(encoding="utf-8"))
    assert svg.tag.endswith("svg")
    text = " ".join("".join(node.itertext()) for node in svg.iter())
    assert "planned: " in text and "measured: " in text


def test_files_are_written_by_rank_0_alone_and_parse(folders: dict[str, str], tmp_path: Path) -> None:
    cases = [
        replace(SINGLE, pp=2, teacher="fill", slices=2, num_microbatches=2),
        replace(SINGLE, dp=2),
        replace(SINGLE, tp=2, teacher="batch", slices=2),
    ]
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    plans = run_distributed(2, _write, cases, folders, tmp_path)[0]
    for number, ranks in enumerate(plans):
        _check(tmp_path / str(number), ranks)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "single" / "0").mkdir(parents=True)
    _check(tmp_path / "single" / "0", _write([SINGLE], folders, tmp_path / "single")[0])
