"""The run's timeline files: one measured step of one replica, beside the same plan simulated at the measured costs.

The clocks of the pipeline's ranks are set by a barrier, so the picture is right to about a message's latency.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from parallel.collectives import barrier, gather_objects
from parallel.mesh import Mesh
from parallel.pipeline.actions import STEP_END, Kind, Plan
from parallel.pipeline.simulate import Costs, Event, simulate
from parallel.pipeline.trace import to_chrome, to_svg

SVG_FILE, JSON_FILE = "timeline.svg", "timeline.json"


def gather_events(mesh: Mesh, events: Sequence[Event]) -> list[Event]:
    """Return the events of all stages of this replica on one clock. Collectives: barrier and gather over pp."""
    barrier(mesh.pp)
    now_s = time.perf_counter()
    mine = [event._replace(start_s=event.start_s - now_s, end_s=event.end_s - now_s) for event in events]
    return [event for stage in gather_objects(mine, mesh.pp) for event in stage]


def measured_costs(events: Sequence[Event], plan: Plan) -> Costs:
    """Return the median seconds of each kind of action on each stage.

    A whole backward is measured as one: it is booked as B, and its W costs nothing.
    """
    durations: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for event in events:
        durations[event.action.kind, event.action.stage].append(event.end_s - event.start_s)

    def each(kind: Kind, count: int) -> list[float]:
        return [
            statistics.median(durations[kind, stage]) if durations[kind, stage] else 0.0
            for stage in range(count)
        ]

    stages, ranks = plan.shape.num_stages, plan.shape.num_ranks
    ends = {kind: each(kind, stages) for kind in STEP_END}
    return Costs(
        forward=each(Kind.F, stages),
        backward_input=each(Kind.B, stages),
        backward_weight=each(Kind.W, stages),
        teacher_slice=each(Kind.K, ranks),
        # A rank that comes early to a collective only waits there.
        reduce=min(ends[Kind.REDUCE]),
        norm=min(ends[Kind.NORM]),
        step=ends[Kind.STEP],
        gather=ends[Kind.GATHER],
    )


def write_timeline(folder: Path, mesh: Mesh, plan: Plan, events: Sequence[Event]) -> None:
    """Write `timeline.svg` and `timeline.json` from rank 0. Collectives: those of `gather_events`."""
    measured = gather_events(mesh, events)
    if not mesh.world.is_first:
        return
    planned = simulate(plan, measured_costs(measured, plan))
    (folder / SVG_FILE).write_text(
        to_svg({"planned at measured costs": planned, "measured": measured}), encoding="utf-8"
    )
    (folder / JSON_FILE).write_text(json.dumps(to_chrome(measured)) + "\n", encoding="utf-8")
