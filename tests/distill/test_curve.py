from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from distill.curve import BOTTOM, LEFT, MAX_POINTS, RIGHT, TOP, curve_svg, draw_curve, running_mean, ticks

SVG = "{http://www.w3.org/2000/svg}"


def steps(count: int, *, rounds: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "round": (step - 1) * rounds // count,
            "loss/hard": 3 + math.exp(-step / count * 5),
            "loss/soft": 2 * math.exp(-step / count * 5),
            "loss/total": 1 + math.exp(-step / count * 5),
        }
        for step in range(1, count + 1)
    ]


def evaluations() -> list[dict[str, Any]]:
    return [
        {"step": 0, "round": 0, "model": "teacher", "eval/loss": 2.68},
        {"step": 0, "round": 0, "model": "student", "eval/loss": 4.0},
        {"step": 10, "round": 0, "model": "student", "eval/loss": 3.01},
    ]


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def places(root: ElementTree.Element, style: str) -> list[tuple[float, float]]:
    (line,) = [
        element
        for element in root.findall(f"{SVG}polyline")
        if element.get("class") == style and "." in element.get("points", "")
    ]
    return [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]  # type: ignore[misc]


def test_lines_lie_where_their_numbers_say() -> None:
    root = parse(curve_svg(steps(20), []))
    points = places(root, "hard")
    assert len(points) == 20
    assert points[0][0] == pytest.approx(LEFT, abs=0.1) and points[-1][0] == pytest.approx(RIGHT, abs=0.1)
    top = (3 + math.exp(-0.25)) * 1.08
    assert points[-1][1] == pytest.approx(BOTTOM - (3 + math.exp(-5)) / top * (BOTTOM - TOP), abs=0.1)
    assert points[0][1] < points[-1][1], "a falling loss must fall on the picture"


def test_teacher_and_held_out_points_are_drawn() -> None:
    root = parse(curve_svg(steps(20), evaluations()))
    (level,) = [line for line in root.findall(f"{SVG}line") if line.get("class") == "teacher"]
    held = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.findall(f"{SVG}circle")][:2]
    assert level.get("y1") == level.get("y2")
    assert held[0][0] == LEFT and held[0][1] < held[1][1] < float(level.get("y1", 0))
    words = " ".join("".join(text.itertext()) for text in root.findall(f"{SVG}text"))
    for word in ("student 3.010, teacher 2.680", "optimizer step", "nats per token", "hard", "soft", "total"):
        assert word in words


def test_the_legend_names_what_the_losses_are() -> None:
    assert "soft: T\u00b2 \u00d7 skew_kl</text>" in curve_svg(steps(5), [], kinds=["skew_kl", "skew_kl"])
    assert "soft loss</text>" in curve_svg(steps(5), [], kinds=["skew_kl", "jsd"])
    assert "total</text>" in curve_svg([{**line, "loss/hidden": 0.0} for line in steps(5)], [])
    assert "total with hidden</text>" in curve_svg([{**line, "loss/hidden": 0.1} for line in steps(5)], [])


def test_rounds_are_parted() -> None:
    root = parse(curve_svg(steps(30, rounds=3), []))
    lines = [line for line in root.findall(f"{SVG}line") if line.get("class") == "round"]
    assert len(lines) == 2
    words = [text.text for text in root.findall(f"{SVG}text")]
    assert "round 1" in words and "round 2" in words and "round 0" not in words


def test_a_long_run_is_thinned_and_keeps_its_end() -> None:
    root = parse(curve_svg(steps(5000), []))
    points = places(root, "total raw")
    assert len(points) <= MAX_POINTS + 1
    assert points[-1][0] == pytest.approx(RIGHT, abs=0.1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_steps_make_a_picture(count: int) -> None:
    svg = curve_svg(steps(count), evaluations()[:count])
    parse(svg)
    assert not re.search(r"\bnan\b|\binf\b", svg)


def test_a_missing_number_is_left_out() -> None:
    lines = steps(5)
    lines[2]["loss/hard"] = None
    assert len(places(parse(curve_svg(lines, [])), "hard")) == 4


def test_running_mean_keeps_a_line_and_calms_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(200)]
    assert [y for _, y in running_mean(line)[:-5]] == pytest.approx([y for _, y in line[:-5]])
    noisy = [(float(x), float(x % 2)) for x in range(200)]
    middle = [y for _, y in running_mean(noisy)[20:-20]]
    assert max(middle) - min(middle) < 0.2
    assert running_mean(line[:10]) == line[:10]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4.2, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
        (1, 300, [50, 100, 150, 200, 250, 300]),
        (0, 0.013, [0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, count=7) == pytest.approx(expected)


def test_the_file_is_written(tmp_path: Path) -> None:
    draw_curve(tmp_path / "curve.svg", steps(3), [])
    assert parse((tmp_path / "curve.svg").read_text(encoding="utf-8")).tag == f"{SVG}svg"
