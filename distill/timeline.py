"""The run's timeline files: one measured step of one replica, beside the same plan simulated.

The clocks of the pipeline's ranks are set by a barrier, so the picture is right to about a message's latency.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from distill.planning import costs_of, medians
from parallel.collectives import barrier, gather_objects
from parallel.mesh import Mesh
from parallel.pipeline.actions import Plan
from parallel.pipeline.simulate import Costs, Event, steady_state
from parallel.pipeline.trace import to_chrome, to_svg

SVG_FILE, JSON_FILE = "timeline.svg", "timeline.json"


def gather_events(mesh: Mesh, events: Sequence[Event]) -> list[Event]:
    """Return the events of all stages of this replica on one clock. Collectives: barrier and gather over pp."""
    barrier(mesh.pp)
    now_s = time.perf_counter()
    mine = [event._replace(start_s=event.start_s - now_s, end_s=event.end_s - now_s) for event in events]
    return [event for stage in gather_objects(mine, mesh.pp) for event in stage]


def write_timeline(
    folder: Path, mesh: Mesh, plan: Plan, events: Sequence[Event], costs: Costs | None = None
) -> None:
    """Write `timeline.svg` and `timeline.json` from rank 0.

    Args:
        plan: by which the events ran; a plan with look-ahead is drawn in its steady state.
        events: of one step on this rank.
        costs: what the plan was made from; the events' own by default.
    Collectives: those of `gather_events`.
    """
    measured = gather_events(mesh, events)
    if not mesh.world.is_first:
        return
    if costs is None:
        costs = costs_of(medians(measured), plan.shape)
    planned = steady_state(plan, costs)
    (folder / SVG_FILE).write_text(to_svg({"planned": planned, "measured": measured}), encoding="utf-8")
    trace = {"traceEvents": []}
    for process, (name, source) in enumerate({"planned": planned, "measured": measured}.items()):
        lines = to_chrome(source, process=process, name=name)
        trace = {**lines, "traceEvents": [*trace["traceEvents"], *lines["traceEvents"]]}
    (folder / JSON_FILE).write_text(json.dumps(trace) + "\n", encoding="utf-8")
