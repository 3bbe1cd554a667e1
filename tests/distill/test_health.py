from __future__ import annotations

import re
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from distill.config import Config, ConfigError, Log, Run
from distill.health import Health, metric_name, watched
from parallel.activity import Activity

LINE = {
    "step": 7,
    "round": 1,
    "tokens": 700,
    "loss/total": 2.5,
    "optim/skipped_steps": 2,
    "time/step_s": 0.25,
    "throughput/tokens_per_s": 400.0,
    "memory/peak_bytes": 1000,
    "pipeline/planned_step_s": None,
}
"""As a line of `metrics.jsonl`: with a number that is not there yet."""
_SAMPLE = re.compile(r'^([a-z][a-z0-9_]*)\{run="((?:[^"\\]|\\.)*)",round="(\d+)"\} (\S+)$')


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def config(folder: Path, **log: object) -> Config:
    return Config(run=Run(dir=str(folder / "my run")), log=replace(Log(), **log))


def ask(url: str) -> tuple[int, str, str]:
    """Return code, type and text of an answer."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def address(capsys: pytest.CaptureFixture[str]) -> str:
    found = re.search(
        r"^health: (http://.*)/healthz and /metrics$", capsys.readouterr().out, flags=re.MULTILINE
    )
    assert found is not None
    return found[1]


def samples(text: str) -> dict[str, tuple[str, float]]:
    """Return type and value of each number, by the rules of Prometheus' text format."""
    lines, found = text.splitlines(), {}
    assert text.endswith("\n") and len(lines) % 3 == 0
    for meaning, kind, sample in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name, _, _, value = _SAMPLE.match(sample).groups()  # type: ignore[union-attr]
        assert meaning.startswith(f"# HELP {name} ") and kind in (
            f"# TYPE {name} counter",
            f"# TYPE {name} gauge",
        )
        assert name not in found and name.endswith("_total") == kind.endswith("counter")
        found[name] = (kind.rpartition(" ")[2], float(value))
    return found


def test_healthy_is_a_run_with_a_sign_younger_than_the_limit(tmp_path: Path) -> None:
    clock = Clock()
    health = Health("run", limit_s=60, checkpoints=tmp_path, clock=clock)
    assert health.verdict() == (True, "ok: starting, 0 s ago")
    clock.now_s += 59
    assert health.verdict()[0]
    clock.now_s += 1
    assert health.verdict() == (
        False,
        "no progress for 60 s, log.health_limit_s=60; the last sign was: starting",
    )
    health.begin("judging")
    assert health.verdict() == (True, "ok: judging, 0 s ago")
    clock.now_s += 60
    assert not health.verdict()[0]
    health.step(LINE)
    clock.now_s += 3
    assert health.verdict() == (True, "ok: step 7, round 1, 3 s ago")
    health.saving()
    clock.now_s += 57
    assert not health.verdict()[0], "a checkpoint alone is no progress"


def test_what_happens_between_two_signs_counts(tmp_path: Path) -> None:
    clock, activity, used = Clock(), Activity(), Clock()
    activity.last_mark_s = clock()
    health = Health("run", limit_s=60, checkpoints=tmp_path, activity=activity, clock=clock, used=used)
    for computed_s, healthy in ((50, True), (0.5, False)):
        clock.now_s, used.now_s = clock.now_s + 100, used.now_s + computed_s
        assert health.verdict()[0] is healthy
    activity.last_mark_s = clock() - 10
    assert health.verdict() == (True, "ok: starting, 200 s ago, and at work 10 s ago")
    with activity.waiting("a broadcast over dp", [1]):
        activity.last_mark_s = clock() - 10
        clock.now_s, used.now_s = clock.now_s + 100, used.now_s + 100
        assert not health.verdict()[0], "a loop that waits for others may keep a processor busy"


def test_numbers_are_those_of_the_last_line_under_proper_names(tmp_path: Path) -> None:
    clock = Clock()
    health = Health('a "b"\\', limit_s=60, checkpoints=tmp_path, clock=clock)
    assert samples(health.metrics_text())["reflux_steps_total"] == ("counter", 0.0)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000006.part").mkdir()
    health.step(LINE)
    health.saving()
    clock.now_s += 5
    text = health.metrics_text()
    assert 'run="a \\"b\\"\\\\",round="1"' in text
    found = samples(text)
    age_s = found.pop("reflux_checkpoint_age_seconds")
    assert age_s[0] == "gauge" and 0 <= age_s[1] < 60
    assert found == {
        "reflux_steps_total": ("counter", 7.0),
        "reflux_tokens_total": ("counter", 700.0),
        "reflux_skipped_steps_total": ("counter", 2.0),
        "reflux_checkpoints_total": ("counter", 1.0),
        "reflux_healthy": ("gauge", 1.0),
        "reflux_progress_age_seconds": ("gauge", 5.0),
        "reflux_round": ("gauge", 1.0),
        "reflux_loss": ("gauge", 2.5),
        "reflux_time_step_seconds": ("gauge", 0.25),
        "reflux_throughput_tokens_per_second": ("gauge", 400.0),
        "reflux_memory_peak_bytes": ("gauge", 1000.0),
    }
    assert metric_name("eval/\u00dcn\u00ef-code") == "reflux_eval__n__code"


def test_served_over_http_until_the_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(config(tmp_path, health_port=0, health_limit_s=0.2), Activity(), serves=True) as health:
        url = address(capsys)
        assert url.startswith("http://127.0.0.1:")
        health.step(LINE)
        code, kind, text = ask(f"{url}/metrics?x=1")
        assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert 'run="my run",round="1"' in text and samples(text)["reflux_steps_total"][1] == 7
        assert ask(f"{url}/other")[0] == 404
        time.sleep(0.25)
        code, _, text = ask(f"{url}/healthz")
        assert code == 503 and text.startswith("no progress for ") and text.count("\n") == 1
        silent = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        health.begin("loading")
        assert ask(f"{url}/healthz")[0] in (200, 503), "a client that says nothing holds nobody up"
        begin_s = time.monotonic()
    assert time.monotonic() - begin_s < 3, "nor the end of the run"
    silent.close()
    with pytest.raises(OSError, match="refused"):
        ask(f"{url}/healthz")
    assert not [thread for thread in threading.enumerate() if thread.name == "health"]


def test_signs_cost_a_step_nothing(tmp_path: Path) -> None:
    health = Health("run", limit_s=60, checkpoints=tmp_path)
    begin_s = time.perf_counter()
    for _ in range(1000):
        health.step(LINE)
    assert (time.perf_counter() - begin_s) / 1000 < 1e-3


def test_only_the_rank_that_serves_opens_a_port_and_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched(config(tmp_path), Activity(), serves=True) as health:
        health.step(LINE)
    with watched(config(tmp_path, health_port=0), Activity(), serves=False) as health:
        health.step(LINE)
    assert capsys.readouterr().out == ""


def test_an_address_that_cannot_be_had_is_a_mistake(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(
                ConfigError, match=rf"^log.health_port={port} cannot .*in use.*; use another one, 0 "
            ),
            watched(config(tmp_path, health_port=port), Activity(), serves=True),
        ):
            pass
    for host in ("no.such.host.invalid", "a" * 100):
        with (
            pytest.raises(ConfigError, match=rf"^log.health_host={host} is no address .*use 127.0.0.1"),
            watched(config(tmp_path, health_port=0, health_host=host), Activity(), serves=True),
        ):
            pass
