from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from distill.config import ConfigError
from launch import bench

ROW = {"case": "small", "ours": 1.0, "peer": 2.0, "peer_name": "naive", "ratio": 0.5, "bound": 1.0}


def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    module = types.ModuleType("launch.benchmarks.fake", doc="Options: rows.")
    module.run = lambda options: seen.append(options) or [{**ROW, "note": "more"}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "launch.benchmarks.fake", module)
    monkeypatch.setattr(bench, "benchmark_names", lambda: ["fake", "other"])
    return seen


def test_options_rows_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = fake(monkeypatch)
    bench.bench(["fake", "rows=3", f"bench.out={tmp_path / 'rows.json'}"])
    assert seen == [{"rows": 3}]
    assert json.loads((tmp_path / "rows.json").read_text()) == [{**ROW, "note": "more"}]
    assert capsys.readouterr().out.splitlines()[2].split("|")[1].strip() == "small"


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake(monkeypatch)
    bench.bench([])
    bench.bench(["fake", "--help"])
    assert capsys.readouterr().out.splitlines()[-1] == "Options: rows."


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    with pytest.raises(ConfigError, match="there is no benchmark fast; use fake or other"):
        bench.bench(["fast"])
    with pytest.raises(ConfigError, match="the argument rows is not an override"):
        bench.bench(["fake", "rows"])
    with pytest.raises(ConfigError, match="bench.out=/nowhere/rows.json cannot be written: /nowhere is no"):
        bench.bench(["fake", "bench.out=/nowhere/rows.json"])
    with pytest.raises(ConfigError, match="stepz is no option; use tp or steps"):
        importlib.import_module("launch.benchmarks.tp").run({"stepz": 3})


def test_benchmarks_are_found() -> None:
    assert all(
        (Path(bench.__file__).parent / "benchmarks" / f"{name}.py").is_file()
        for name in bench.benchmark_names()
    )
