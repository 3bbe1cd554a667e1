"""What a run answers over HTTP while it trains."""

from __future__ import annotations

import re
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch import distill
from tests.commands.tiny_run import STEPS, Inputs, call


def test_a_run_is_watched_while_it_trains(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen: dict[str, set[str]] = {"healthz": set(), "metrics": set()}
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.01):
            for name, answers in seen.items():
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=5) as answer:
                        answers.add(answer.read().decode())
                except OSError:
                    time.sleep(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        done = call(distill.COMMAND, inputs.settings(tmp_path / "run", f"log.health_port={port}"))
    finally:
        over.set()
        asking.join()
    assert done.code == 0, done.err
    assert f"health: http://127.0.0.1:{port}/healthz and /metrics\n" in done.out
    phases = {
        re.sub(r"step \d+", "step", text.partition(": ")[2].partition(",")[0]) for text in seen["healthz"]
    }
    assert {"loading the teacher", "making the student", "judging the student", "step"} <= phases, phases
    steps = {
        int(float(found))
        for text in seen["metrics"]
        for found in re.findall(r"reflux_steps_total\{.*\} (\S+)", text)
    }
    assert 0 in steps and max(steps) > 0 and steps <= set(range(STEPS + 1))
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)


def test_a_port_in_use_is_told_before_weights_are_read(inputs: Inputs, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        overrides = [f"log.health_port={port}", f"teacher.model={tmp_path}"]
        done = call(distill.COMMAND, inputs.settings(tmp_path / "run", *overrides))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: log.health_port={port} cannot be had") and done.err.count("\n") == 1
