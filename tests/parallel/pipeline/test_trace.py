from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    _Action,
    _PipelineScheduleRuntime,
    _simulate_comms_compute,
    _validate_schedule,
)

from parallel.pipeline.actions import Plan
from parallel.pipeline.lower import add_communication
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs, Event, simulate
from parallel.pipeline.trace import to_ascii, to_chrome, to_svg, to_text, to_torch_csv
from tests.parallel.pipeline.sweep import lowered_plans, plans

COSTS = Costs(0.01, 0.01, 0.01, 0.01, latency=0.002, reduce=0.01, norm=0.001, step=0.01, gather=0.01)


def plan(schedule: str, teacher: str | None, num_ranks: int, num_microbatches: int, **sizes: int) -> Plan:
    return make_plan(
        schedule=schedule, teacher=teacher, num_ranks=num_ranks, num_microbatches=num_microbatches, **sizes
    )


def torch_actions(text: str) -> dict[int, list[_Action]]:
    return {
        rank: [_Action.from_str(cell) for cell in line.split(",")]
        for rank, line in enumerate(text.splitlines())
    }


def torch_runtime(made: Plan) -> _PipelineScheduleRuntime:
    """Torch's schedule object with as much in it as reading a plan needs."""
    runtime = object.__new__(_PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages = made.shape.num_ranks, made.shape.num_stages
    runtime._n_microbatches, runtime._stages = made.shape.num_microbatches, [SimpleNamespace()]
    runtime.pipeline_order, runtime._defer_pp_recv = {}, False
    return runtime


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_torch_accepts_the_students_part(num_ranks: int) -> None:
    for made, lowered in zip(plans(num_ranks), lowered_plans(num_ranks), strict=True):
        shape = made.shape
        actions = torch_actions(to_torch_csv(made))
        assert torch_actions(to_torch_csv(lowered)) == actions
        mapping = _validate_schedule(actions, shape.num_ranks, shape.num_stages, shape.num_microbatches)
        assert mapping == {stage: shape.rank_of(stage) for stage in range(shape.num_stages)}
        with_messages = torch_actions(to_torch_csv(lowered, messages=True))
        _simulate_comms_compute(with_messages, shape.rank_of, shape.num_stages)


@pytest.mark.parametrize(
    ("schedule", "virtual_stages"), [("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1), ("interleaved", 2)]
)
def test_torch_loads_both_forms(schedule: str, virtual_stages: int, tmp_path: Path) -> None:
    made = plan(schedule, "inline", 4, 8, virtual_stages=virtual_stages)
    lowered = add_communication(made)
    (tmp_path / "compute.csv").write_text(to_torch_csv(made))
    (tmp_path / "comms.csv").write_text(to_torch_csv(lowered, messages=True))
    runtime = torch_runtime(made)
    runtime._load_csv(str(tmp_path / "compute.csv"), "compute_only")
    assert runtime.pipeline_order == torch_actions(to_torch_csv(made))
    runtime = torch_runtime(made)
    runtime._load_csv(str(tmp_path / "comms.csv"), "compute_comms")
    assert runtime._simulate()


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_our_1f1b_is_torchs(num_ranks: int, num_microbatches: int) -> None:
    theirs = object.__new__(Schedule1F1B)
    theirs._num_stages, theirs._n_microbatches = num_ranks, num_microbatches
    order = theirs._get_pipeline_order()
    ours = to_torch_csv(plan("1f1b", None, num_ranks, num_microbatches)).splitlines()
    # On the last stage torch 2.13 describes forwards 1..m instead of 0..m-1 (what it runs is right).
    for rank in range(num_ranks - 1):
        names = [str(action) for action in order[rank] if action is not None and "REDUCE" not in str(action)]
        assert ",".join(names) == ours[rank]


def test_torch_names_of_split_and_whole_backwards() -> None:
    assert to_torch_csv(plan("zero_bubble", "inline", 2, 2)).splitlines() == [
        "0F0,0F1,0B0,0B1",
        "1F0,1I0,1F1,1I1,1W0,1W1",
    ]


def test_text_is_the_grid() -> None:
    assert to_text(plan("1f1b", "inline", 1, 1)).splitlines()[:3] == ["   rank 0", "0  0K0", "1  0F0"]


def test_ascii_shows_the_shape_of_a_step() -> None:
    timeline = simulate(plan("1f1b", None, 2, 2), Costs(1.0, 1.0, 1.0))
    drawing = to_ascii(timeline, width=9).splitlines()
    assert drawing[:2] == ["rank 0  FF..BW.BW", "rank 1  .FBWFBW.."]
    assert "1 column = 1 s" in drawing[2]


def test_ascii_takes_measured_events() -> None:
    events = [
        Event(0, action, 10 + start, 10 + start + 1)
        for start, action in enumerate(plan("1f1b", "inline", 1, 1).ranks[0][:4])
    ]
    assert to_ascii(events, width=4).splitlines()[0] == "rank 0  kFBW"


def test_chrome_events_load_and_keep_their_times() -> None:
    timeline = simulate(plan("1f1b", "inline", 4, 6, num_slices=2), COSTS)
    trace = json.loads(json.dumps(to_chrome(timeline)))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(timeline.events)
    assert max(event["ts"] + event["dur"] for event in complete) == pytest.approx(timeline.step_s * 1e6)
    first = next(event for event in complete if event["name"] == "2K1.1")
    assert first["args"] == {"stage": 2, "microbatch": 1, "slice": 1}
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {"rank 3", "rank 3 communication"} <= names
    lines: dict[int, float] = {}
    for event in sorted(
        (event for event in complete if event["tid"] % 2 == 0), key=lambda event: event["ts"]
    ):
        assert event["ts"] >= lines.get(event["tid"], 0.0) - 1e-6, "what occupies a rank must not overlap"
        lines[event["tid"]] = event["ts"] + event["dur"]


def drawn_width(svg: str, css: str) -> float:
    """Sum of the widths of all boxes of a colour."""
    root = ElementTree.fromstring(svg)
    paths = root.iter("{http://www.w3.org/2000/svg}path")
    outlines = [path.attrib["d"] for path in paths if path.attrib["class"] == css]
    return sum(
        float(width) for outline in outlines for width in re.findall(r"M[\d.]+ [\d.]+h([\d.]+)v", outline)
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
def test_the_picture_is_to_scale_and_well_formed(num_ranks: int) -> None:
    timeline = simulate(plan("1f1b", "inline", num_ranks, 8, num_slices=2), COSTS)
    svg = to_svg(timeline)
    assert f"bubble {timeline.bubble_fraction:.1%}" in svg
    scale = 1120 / timeline.step_s
    expected = num_ranks * 8 * 0.01 * scale
    assert drawn_width(svg, "f") == pytest.approx(expected, abs=0.7 * num_ranks * 8)
    assert drawn_width(svg, "k") == pytest.approx(2 * expected, abs=0.7 * num_ranks * 8)
    for label in (
        "F forward",
        "K teacher",
        "communication",
        "optimizer",
        "idle",
        "s</text>",
        f"rank {num_ranks - 1}<",
    ):
        assert label in svg


def test_planned_and_measured_share_a_scale() -> None:
    timeline = simulate(plan("1f1b", None, 2, 4), COSTS)
    slower = [Event(rank, action, 5 + 2 * start, 5 + 2 * end) for rank, action, start, end in timeline.events]
    svg = to_svg({"planned": timeline, "measured": slower})
    assert f"planned: {timeline.step_s * 1e3:.4g} ms" in svg
    assert f"measured: {2 * timeline.step_s * 1e3:.4g} ms, bubble {timeline.bubble_fraction:.1%}" in svg
    alone = to_svg(timeline)
    assert drawn_width(svg, "f") == pytest.approx(1.5 * drawn_width(alone, "f"), rel=0.05)


def test_names_are_escaped_and_long_steps_stay_small() -> None:
    timeline = simulate(plan("1f1b", "batch", 16, 64, num_slices=8), COSTS)
    svg = to_svg({"<b>": timeline})
    ElementTree.fromstring(svg)
    assert len(svg) < 400_000
