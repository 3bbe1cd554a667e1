"""`curve.svg`: how the losses came down over all rounds, and how far the teacher's level is.

Decides the picture: training losses as lines (raw values faint behind a running mean when there are many), held-out
losses of the student as points, the teacher's held-out loss as a level, rounds parted by upright lines. Hand-written
SVG with its own background, so that it reads in light and in dark. Assumes the lines of `metrics.jsonl` and
`evaluations.jsonl`. Draws nothing but these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from distill.runfolder import write_whole

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 820, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 796, 64, 388
SMOOTH_FROM = 40
"""Steps from which a running mean is drawn over the raw values."""
MAX_POINTS = 800
"""Points a line is thinned to: more cannot be told apart at this width."""

_SERIES = (("loss/total", "total"), ("loss/hard", "hard"), ("loss/soft", "soft"))
"""Keys of the lines that are drawn, and their styles."""
_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
  .paper { fill: #ffffff; stroke: #d0d7de } .grid { stroke: #e6eaee } .axis { stroke: #57606a }
  .note { fill: #57606a } .title { font-size: 15px; font-weight: 600 }
  polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round } .raw { stroke-width: 1; opacity: .28 }
  .total { stroke: #57606a } .hard { stroke: #0969da } .soft { stroke: #bc4c00 }
  .held { fill: #0969da; stroke: #ffffff; stroke-width: 1.5 } .teacher { stroke: #1a7f37; stroke-width: 2; stroke-dasharray: 7 5 }
  .teacher-name { fill: #1a7f37; stroke: #ffffff; stroke-width: 4; paint-order: stroke } .round { stroke: #8c959f; stroke-dasharray: 2 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .paper { fill: #0d1117; stroke: #30363d } .grid { stroke: #21262d } .axis { stroke: #8b949e }
    .note { fill: #9198a1 } .total { stroke: #9198a1 } .hard { stroke: #58a6ff } .soft { stroke: #f0883e }
    .held { fill: #58a6ff; stroke: #0d1117 } .teacher { stroke: #3fb950 } .teacher-name { fill: #3fb950; stroke: #0d1117 }
    .round { stroke: #6e7681 }
  }
"""


@dataclass(frozen=True)
class Scale:
    """Maps data to the panel's coordinates; both axes are linear, the upright one begins at 0."""

    first_step: float
    last_step: float
    top_loss: float

    def x(self, step: float) -> float:
        """Return the place of a step."""
        share = (step - self.first_step) / (self.last_step - self.first_step)
        return LEFT + share * (RIGHT - LEFT)

    def y(self, loss: float) -> float:
        """Return the place of a loss; what is higher than the panel stays at its upper edge."""
        return BOTTOM - min(1.0, loss / self.top_loss) * (BOTTOM - TOP)


def draw_curve(
    file: Path,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    kinds: Collection[str] = (),
) -> None:
    """Write the picture of a run.

    Args:
        file: where the SVG goes.
        steps: lines of `metrics.jsonl`; losses in nats per valid token.
        evaluations: lines of `evaluations.jsonl` with `model` and `eval/loss`.
        kinds: `loss.kind` of the rounds.
    """
    write_whole(file, curve_svg(steps, evaluations, kinds=kinds))


def curve_svg(
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    kinds: Collection[str] = (),
) -> str:
    """Return the picture as SVG text; arguments as `draw_curve`."""
    raw = {key: _points(steps, key) for key, _ in _SERIES}
    smooth = {key: running_mean(points) for key, points in raw.items()}
    held = _points([line for line in evaluations if line["model"] == "student"], "eval/loss")
    levels = _points([line for line in evaluations if line["model"] == "teacher"], "eval/loss")
    teacher = levels[-1][1] if levels else None
    scale = _scale([*smooth.values(), held], teacher)
    parts = [*_frame(scale), *_rounds(steps, scale)]
    level, name = _teacher(teacher, scale) if teacher is not None else ([], [])
    parts += level
    for key, style in _SERIES:
        if smooth[key] != raw[key]:
            parts.append(_line(raw[key], f"{style} raw", scale))
        parts.append(_line(smooth[key], style, scale))
    parts += [f'<circle class="held" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="5"/>' for x, y in held]
    # The name comes last, so that the losses that cross the level do not cross it out.
    parts += name
    parts += _legend(_names(steps, kinds), has_held_out=bool(held))
    parts.append(f'<text class="title" x="{LEFT}" y="24">{_title(held, teacher)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img">\n<title>Loss over the steps of the run</title>\n<style>{_STYLE}</style>\n{body}\n</svg>\n'
    )


def running_mean(points: Points) -> Points:
    """Return the mean over the twentieth of the run around each point; few points stay as they are."""
    if len(points) < SMOOTH_FROM:
        return points
    reach = len(points) // 40
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    smooth = []
    for index, (x, _) in enumerate(points):
        # The window is even at the steep beginning, where a lopsided one would bend the line.
        before, after = min(reach, index), min(reach, index, len(points) - 1 - index)
        smooth.append((x, (sums[index + after + 1] - sums[index - before]) / (before + after + 1)))
    return smooth


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    first, last = math.ceil(low / step), math.floor(high / step * (1 + 1e-9))
    return [index * step for index in range(first, last + 1)]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]


def _scale(series: Sequence[Points], teacher: float | None) -> Scale:
    xs = [x for points in series for x, _ in points] or [0.0]
    ys = [y for points in series for _, y in points] + ([teacher] if teacher is not None else [])
    top = max(ys, default=1.0) * 1.08 or 1.0
    return Scale(first_step=min(xs), last_step=max(max(xs), min(xs) + 1), top_loss=top)


def _frame(scale: Scale) -> list[str]:
    """Return background, grid, ticks and titles."""
    parts = [f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>']
    for loss in ticks(0, scale.top_loss, count=6):
        y = scale.y(loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="note" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.4g}</text>')
    for step in ticks(scale.first_step, scale.last_step, count=8):
        if step != int(step):
            continue
        x = scale.x(step)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 5}"/>')
        parts.append(
            f'<text class="note" x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle">{int(step)}</text>'
        )
    middle = (LEFT + RIGHT) / 2
    parts += [
        f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>',
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">optimizer step</text>',
        f'<text transform="translate(18 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">nats per token</text>',
    ]
    return parts


def _rounds(steps: Sequence[Mapping[str, Any]], scale: Scale) -> list[str]:
    """Return an upright line with its name where each round after the first begins."""
    parts = []
    for before, line in itertools.pairwise(steps):
        if line["round"] != before["round"]:
            x = scale.x((before["step"] + line["step"]) / 2)
            parts.append(f'<line class="round" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
            parts.append(f'<text class="note" x="{x + 5:.1f}" y="{TOP + 12}">round {line["round"]}</text>')
    return parts


def _teacher(level: float, scale: Scale) -> tuple[list[str], list[str]]:
    """Return the level as a line, and its name."""
    y = scale.y(level)
    return (
        [f'<line class="teacher" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'],
        [
            (
                f'<text class="teacher-name" x="{RIGHT - 12}" y="{y - 8:.1f}" text-anchor="end">'
                f"teacher, held out: {level:.3f}</text>"
            )
        ],
    )


def _line(points: Points, style: str, scale: Scale) -> str:
    if len(points) == 1:  # a line of one point shows nothing
        points = [(scale.first_step, points[0][1]), *points]
    every = -(-len(points) // MAX_POINTS) or 1
    thinned = points[::every] + (points[-1:] if (len(points) - 1) % every else [])
    places = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in thinned)
    return f'<polyline class="{style}" points="{places}"/>'


def _title(held: Points, teacher: float | None) -> str:
    known = [f"student {held[-1][1]:.3f}"] if held else []
    known += [f"teacher {teacher:.3f}"] if teacher is not None else []
    return f"Held-out loss: {', '.join(known)} nats per token" if known else "Loss over the steps of the run"


def _names(steps: Sequence[Mapping[str, Any]], kinds: Collection[str]) -> list[str]:
    """Return the words for the lines of `_SERIES`."""
    has_hidden = any(line.get("loss/hidden") for line in steps)
    soft = f"soft: T\u00b2 \u00d7 {next(iter(kinds))}" if len(set(kinds)) == 1 else "soft loss"
    return ["total with hidden" if has_hidden else "total", "hard: cross-entropy", soft]


def _legend(names: Sequence[str], *, has_held_out: bool) -> list[str]:
    parts, x, y = [], LEFT, 47
    for name, (_, style) in zip(names, _SERIES, strict=True):
        parts.append(f'<polyline class="{style}" points="{x},{y - 4} {x + 22},{y - 4}"/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{escape(name)}</text>')
        x += 28 + 7 * len(name) + 22
    if has_held_out:
        parts.append(f'<circle class="held" cx="{x + 8}" cy="{y - 4}" r="5"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">student, held out (hard)</text>')
    return parts
