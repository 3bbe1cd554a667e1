"""Plans and timelines as text and pictures: for eyes, for torch, and for chrome://tracing.

Decides: how an action is written, drawn and coloured. Planned timelines and measured events go the same way, so that
they can be laid side by side. Draws nothing but text and SVG; measures nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from parallel.pipeline.actions import STEP_END, Action, Kind, Plan, format_grid
from parallel.pipeline.simulate import OCCUPYING, Event, Timeline, bubble_fraction

Source = Timeline | Sequence[Event]

_LETTERS = {Kind.F: "F", Kind.B: "B", Kind.W: "W", Kind.K: "k", Kind.STEP: "#"}


def to_text(plan: Plan) -> str:
    """Return the plan as a grid, one row a position in the lists, one column a rank."""
    return format_grid(plan.ranks)


def to_ascii(source: Source, *, width: int = 100) -> str:
    """Return a drawing for a terminal: one line a rank, one letter for each `width`-th part of the time.

    Args:
        source: a planned timeline, or measured events.
        width: columns of the drawing.
    """
    events = _events(source)
    start_s, span_s = _span(events)
    lines = []
    for rank in range(_num_ranks(events)):
        cells = ["."] * width
        for event in events:
            if event.rank == rank and event.action.kind in _LETTERS:
                first = round((event.start_s - start_s) / span_s * width)
                stop = round((event.end_s - start_s) / span_s * width)
                cells[first:stop] = _LETTERS[event.action.kind] * (stop - first)
        lines.append(f"rank {rank:<2d} {''.join(cells)}")
    scale = f"1 column = {_duration(span_s / width)}"
    return "\n".join([*lines, f"F forward  B, W backward  k teacher  # optimizer  . idle  {scale}"]) + "\n"


def to_torch_csv(plan: Plan, *, messages: bool = False) -> str:
    """Return the student's part of a plan in the CSV form of torch.distributed.pipelining, one line a rank.

    Torch's B is our B directly followed by its W, its I our B on its own. Teacher and step end are left out.

    Args:
        messages: False gives torch's `compute_only` form, True its `compute_comms` form (the plan must hold messages).
    """
    rows = []
    for actions in plan.ranks:
        student = [each for each in actions if each.kind in (Kind.F, Kind.B, Kind.W)]
        if messages:
            student = [
                each for each in actions if each.kind not in (*STEP_END, Kind.K, Kind.SEND_K, Kind.RECV_K)
            ]
        following = [*student[1:], None]
        names = []
        for action, after in zip(student, following, strict=True):
            whole = action.kind is Kind.B and after == action._replace(kind=Kind.W)
            if action.kind is Kind.W and names and names[-1] == f"{action.stage}B{action.microbatch}":
                continue
            kind = "I" if action.kind is Kind.B and not whole else action.kind.value
            names.append(f"{action.stage}{kind}{action.microbatch}")
        rows.append(",".join(names))
    return "\n".join(rows) + "\n"


def to_chrome(source: Source, *, process: int = 0, name: str = "step") -> dict[str, Any]:
    """Return the events in the form of chrome://tracing and Perfetto, times in microseconds.

    Each rank has two lines, one for what occupies it and one for the communication beside it.

    Args:
        source: a planned timeline, or measured events.
        process, name: of the group of lines, to lay several sources into one file.
    """
    events = _events(source)
    start_s, _ = _span(events)
    lines: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    ]
    for rank in range(_num_ranks(events)):
        for line, label in ((2 * rank, f"rank {rank}"), (2 * rank + 1, f"rank {rank} communication")):
            place = {"ph": "M", "pid": process, "tid": line}
            lines.append({**place, "name": "thread_name", "args": {"name": label}})
            lines.append({**place, "name": "thread_sort_index", "args": {"sort_index": line}})
    for rank, action, begin_s, end_s in events:
        args = {"stage": action.stage, "microbatch": action.microbatch, "slice": action.slice}
        lines.append(
            {
                "ph": "X",
                "name": str(action),
                "cat": action.kind.value,
                "pid": process,
                "tid": 2 * rank + (action.kind not in OCCUPYING),
                "ts": (begin_s - start_s) * 1e6,
                "dur": (end_s - begin_s) * 1e6,
                "args": {key: value for key, value in args.items() if value is not None},
            }
        )
    return {"traceEvents": lines, "displayTimeUnit": "ms"}


def to_svg(source: Source | Mapping[str, Source]) -> str:
    """Return a picture: one row a rank, a colour for each kind of work, micro-batch numbers where they fit.

    Several sources are drawn one below the other on one time scale. Colours follow the reader's light or dark theme.
    Later stages of a rank (virtual stages) are paler. Communication is a strip at the bottom of the row, as it runs
    beside the work.

    Args:
        source: a planned timeline, or measured events, or several of them by name.
    """
    panels = {"step": source} if isinstance(source, Timeline | Sequence) else dict(source)
    span_s = max(_span(_events(each))[1] for each in panels.values())
    body, top = [], 10.0
    for name, each in panels.items():
        lines, height = _panel(name, each, top, _PLOT_WIDTH / span_s, span_s)
        body += lines
        top += height
    legend, x = [], _LEFT
    for css, label in _LEGEND:
        legend.append(f'<rect class="{css}" x="{x:.0f}" y="{top:.0f}" width="14" height="12" rx="2"/>')
        legend.append(f'<text x="{x + 19:.0f}" y="{top + 10:.0f}">{label}</text>')
        x += 34 + 7 * len(label)
    size = f"{_LEFT + _PLOT_WIDTH + 24:.0f} {top + 24:.0f}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
    background = f'<rect class="bg" width="100%" height="{top + 24:.0f}"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", background, *body, *legend, "</svg>"]) + "\n"


_LEFT, _PLOT_WIDTH = 62.0, 1120.0
_CSS = {Kind.F: "f", Kind.B: "b", Kind.W: "w", Kind.K: "k", Kind.STEP: "o"}
_LEGEND = (
    ("f", "F forward"),
    ("b", "B input gradient"),
    ("w", "W weight gradient"),
    ("k", "K teacher"),
    ("c", "communication"),
    ("o", "optimizer"),
    ("row", "idle"),
)
_STYLE = """
text{font:12px ui-sans-serif,system-ui,'Segoe UI',Arial,sans-serif;fill:#1f2328}
.title{font-size:14px;font-weight:600}.axis{fill:#59636e;text-anchor:middle}.light,.dark{font-size:10px;text-anchor:middle}
.light{fill:#fff}.dark{fill:#1f2328}.bg{fill:#fff}.row{fill:#e9edf2}.tick{stroke:#b7bfc9;stroke-width:1}
.f{fill:#3f7fc4}.b{fill:#2b8a60}.w{fill:#86c9a3}.k{fill:#f0aa4f}.c{fill:#7d8590}.o{fill:#9a5fbf}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{fill:#9198a1}.light{fill:#fff}.dark{fill:#10151b}
.bg{fill:#0d1117}.row{fill:#222a35}.tick{stroke:#4a535f}.c{fill:#9198a1}}
"""


class _Box(NamedTuple):
    """Work drawn as one rectangle: slices of one micro-batch in a row, or what would be too narrow to see alone."""

    action: Action
    start_s: float
    end_s: float


def _panel(name: str, source: Source, top: float, scale: float, span_s: float) -> tuple[list[str], float]:
    """The lines of one panel and its height; `scale` is in pixels a second."""
    events = _events(source)
    num_ranks = _num_ranks(events)
    start_s, own_span_s = _span(events)
    if isinstance(source, Timeline):
        step_s, bubble = source.step_s, source.bubble_fraction
    else:
        step_s, bubble = own_span_s, bubble_fraction(events, num_ranks=num_ranks, step_s=own_span_s)
    height, pitch = (22.0, 28.0) if num_ranks <= 8 else (15.0, 19.0)
    first_row, bottom = top + 24, top + 24 + pitch * num_ranks
    title = f"{name}: {_duration(step_s)}, bubble {bubble:.1%}"
    lines = [f'<text class="title" x="{_LEFT:.0f}" y="{top + 14:.0f}">{escape(title)}</text>']
    for rank in range(num_ranks):
        y = first_row + pitch * rank
        lines.append(f'<text x="8" y="{y + height / 2 + 4:.1f}">rank {rank}</text>')
        width = own_span_s * scale
        lines.append(
            f'<rect class="row" x="{_LEFT:.0f}" y="{y:.1f}" width="{width:.1f}" height="{height:.0f}"/>'
        )
        lines += _row([event for event in events if event.rank == rank], start_s, scale, y, height, num_ranks)
    tick_s = _tick(span_s)
    for index in range(int(span_s / tick_s + 1e-9) + 1):
        x = _LEFT + index * tick_s * scale
        lines.append(f'<path class="tick" d="M{x:.1f} {bottom - 4:.1f}v6"/>')
        lines.append(
            f'<text class="axis" x="{x:.1f}" y="{bottom + 14:.1f}">{_duration(index * tick_s, unit_of=span_s)}</text>'
        )
    return lines, bottom + 32 - top


def _row(
    events: Sequence[Event], start_s: float, scale: float, y: float, height: float, num_ranks: int
) -> list[str]:
    """The boxes of one rank, one path for each colour, the numbers on top."""
    paths: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    boxes = _boxes(events, 1.5 / scale)
    for action, begin_s, end_s in boxes:
        x, width = _LEFT + (begin_s - start_s) * scale, (end_s - begin_s) * scale
        width -= 0.6 if width > 3 else 0.0
        paths[_CSS[action.kind], action.stage // num_ranks].append(_rectangle(x, y, width, height))
    for event in events:
        width = (event.end_s - event.start_s) * scale
        if event.action.kind not in OCCUPYING and width > 0.3:
            x = _LEFT + (event.start_s - start_s) * scale
            paths["c", 0].append(_rectangle(x, y + height - 4, width, 4))
    drawn = []
    for (css, virtual_stage), outlines in sorted(paths.items(), key=lambda item: item[0][0] == "c"):
        outline = "".join(outlines)
        drawn.append(f'<path class="{css}" fill-opacity="{0.7**virtual_stage:.2g}" d="{outline}"/>')
    for _, neighbours in groupby(boxes, key=lambda box: box.action[:3]):
        group = list(neighbours)
        first, last = group[0], group[-1]
        label = str(first.action.microbatch)
        width = (last.end_s - first.start_s) * scale
        if first.action.microbatch is not None and width > 6.4 * len(label) + 2:
            shade = "light" if first.action.kind in (Kind.F, Kind.B) else "dark"
            x = _LEFT + (first.start_s - start_s) * scale + width / 2
            drawn.append(f'<text class="{shade}" x="{x:.1f}" y="{y + height / 2 + 3.5:.1f}">{label}</text>')
    return drawn


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.2f} {y:.1f}h{width:.2f}v{height:.0f}h-{width:.2f}z"


def _boxes(events: Sequence[Event], narrow_s: float) -> list[_Box]:
    """Merge neighbours of one kind that belong to one micro-batch or are too narrow to see."""
    boxes: list[_Box] = []
    for _, action, begin_s, end_s in sorted(events, key=lambda event: event.start_s):
        if action.kind not in OCCUPYING or end_s <= begin_s:
            continue
        if boxes:
            last, last_begin_s, last_end_s = boxes[-1]
            touching = begin_s - last_end_s < 0.1 * narrow_s and last[:2] == action[:2]
            if touching and (last.microbatch == action.microbatch or end_s - begin_s < narrow_s):
                boxes[-1] = _Box(last, last_begin_s, end_s)
                continue
        boxes.append(_Box(action, begin_s, end_s))
    return boxes


def _duration(seconds: float, *, unit_of: float | None = None) -> str:
    """Write a time in seconds or milliseconds, whichever suits it, or suits `unit_of` (for ticks of one axis)."""
    if (seconds if unit_of is None else unit_of) >= 1:
        return f"{seconds:.4g} s"
    return f"{seconds * 1e3:.4g} ms"


def _tick(span_s: float) -> float:
    """A round distance of about a tenth of the span."""
    power = 10.0 ** math.floor(math.log10(span_s / 10))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span_s / 10)


def _events(source: Source) -> Sequence[Event]:
    return source.events if isinstance(source, Timeline) else source


def _span(events: Sequence[Event]) -> tuple[float, float]:
    """Start of the first event, and seconds from there to the end of the last; never zero."""
    start_s = min((event.start_s for event in events), default=0.0)
    return start_s, max((event.end_s - start_s for event in events), default=0.0) or 1e-9


def _num_ranks(events: Sequence[Event]) -> int:
    return 1 + max((event.rank for event in events), default=0)
