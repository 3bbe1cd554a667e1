"""Whether a run makes progress, and its latest numbers, over HTTP: `/healthz` for probes, `/metrics` for Prometheus.

Decides: healthy is a run that has given a sign of progress within `log.health_limit_s`: a step, the begin of a phase such as
loading or judging, a mark of `parallel.activity`, or, in work that makes no marks (a download, tokenising), processor time. Rank 0 serves, because all ranks end with it; the training loop only puts down a dictionary and a time,
and texts are made when somebody asks, on threads of the server. Numbers of `metrics.jsonl` become gauges named by rule,
so that a new one needs nothing here. Off unless `log.health_port` is set; the address is this machine's own unless
`log.health_host` says otherwise, because nothing asks who wants to know. Standard library only.
"""

from __future__ import annotations

import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from distill.config import Config, ConfigError
from parallel.activity import Activity

_COUNTED = {"step": "steps", "tokens": "tokens", "optim/skipped_steps": "skipped_steps"}
"""Numbers of a line that count up over the run, by the name that they get here."""
_UNITS = {"_per_s": "_per_second", "_s": "_seconds", "_total": ""}
"""Endings that Prometheus wants otherwise; `_total` is for counters."""
_TEXT = "text/plain; charset=utf-8"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_ANSWER_S = 5.0
"""How long a client may take."""
_LOOK_S = 1.0
"""Processor time is compared over this long at least."""
_WORKS = 0.1
"""Share of a processor that work takes at least; the threads of idle process groups take a quarter of it."""


class Health:
    """The latest signs of a run.

    Args:
        run: its name, the label of all numbers.
        limit_s: longest time without a sign of progress.
        checkpoints: the run's folder of checkpoints.
        activity: what the process is doing.
        clock: seconds, never going back; those of `activity`.
        used: seconds of processor time so far.
    """

    def __init__(
        self,
        run: str,
        *,
        limit_s: float,
        checkpoints: Path,
        activity: Activity | None = None,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
    ) -> None:
        self._run, self._limit_s, self._checkpoints, self._clock = run, limit_s, checkpoints, clock
        self._activity, self._used = activity, used
        self._computed_s = -math.inf
        self._looked = (clock(), used())
        self._looking = threading.Lock()
        # One tuple, replaced whole: a reader on another thread sees the old or the new one.
        self._sign = (clock(), "starting")
        self._line: Mapping[str, float | None] = {}
        self._num_saves = 0

    def begin(self, phase: str) -> None:
        """Note that the run has begun to do something that is no step: `loading`, `pruning`, `judging` ..."""
        self._sign = (self._clock(), phase)

    def step(self, line: Mapping[str, float | None]) -> None:
        """Note that a step is done.

        Args:
            line: its numbers by their names in `metrics.jsonl`.
        """
        self._line = line
        self._sign = (self._clock(), f"step {line['step']:.0f}, round {line['round']:.0f}")

    def saving(self) -> None:
        """Note that a checkpoint is written from now on."""
        self._num_saves += 1

    def verdict(self) -> tuple[bool, str]:
        """Return whether the run is healthy, and a sentence that says why."""
        since_s, what = self._sign
        worked_s, now_s = self._worked_s(), self._clock()
        age_s = now_s - max(since_s, worked_s)
        if age_s < self._limit_s:
            later = f", and at work {age_s:.0f} s ago" if worked_s - since_s >= 1 else ""
            return True, f"ok: {what}, {now_s - since_s:.0f} s ago{later}"
        return False, (
            f"no progress for {age_s:.0f} s, log.health_limit_s={self._limit_s:g}; the last sign was: {what}"
        )

    def _worked_s(self) -> float:
        """Return when the process was last seen to get on with something between two signs."""
        if self._activity is None:
            return -math.inf
        with self._looking:
            (before_s, used_s), now_s = self._looked, self._clock()
            if now_s - before_s >= _LOOK_S:
                self._looked = now_s, self._used()
                works = self._looked[1] - used_s > _WORKS * (now_s - before_s)
                if works and self._activity.computes:
                    self._computed_s = now_s
        return max(self._activity.last_mark_s, self._computed_s)

    def metrics_text(self) -> str:
        """Return all numbers in Prometheus' text format 0.0.4."""
        line = self._line
        labels = f'run="{_escaped(self._run)}",round="{line.get("round") or 0:.0f}"'
        lines: list[str] = []
        for name, kind, meaning, value in self._numbers(line):
            shown = repr(float(value)).replace("inf", "Inf").replace("nan", "NaN")
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name}{{{labels}}} {shown}"]
        return "".join(f"{each}\n" for each in lines)

    def _numbers(self, line: Mapping[str, float | None]) -> Iterator[tuple[str, str, str, float]]:
        """Yield name, type, meaning and value of each number."""
        for name, short in _COUNTED.items():
            yield f"reflux_{short}_total", "counter", f"{name} of the run so far.", line.get(name) or 0
        yield "reflux_checkpoints_total", "counter", "Checkpoints begun by this process.", self._num_saves
        yield "reflux_healthy", "gauge", "1 while /healthz answers 200.", self.verdict()[0]
        age_s = self._clock() - max(self._sign[0], self._worked_s())
        yield "reflux_progress_age_seconds", "gauge", "Seconds since the last sign of progress.", age_s
        checkpoint_s = self._checkpoint_age_s()
        if checkpoint_s is not None:
            meaning = "Seconds since the newest complete checkpoint."
            yield "reflux_checkpoint_age_seconds", "gauge", meaning, checkpoint_s
        for name, value in line.items():
            if name not in _COUNTED and value is not None:
                yield metric_name(name), "gauge", f"{name} of the last step, as in metrics.jsonl.", value

    def _checkpoint_age_s(self) -> float | None:
        """Return the age of the newest complete checkpoint; only a complete one has its final name."""
        times = []
        for folder in self._checkpoints.glob("step-*"):
            # One that is too old goes while this looks.
            with suppress(OSError):
                times.append(folder.stat().st_mtime)
        return max(0.0, time.time() - max(times)) if times else None


def metric_name(name: str) -> str:
    """Return the Prometheus name of a number of `metrics.jsonl`: `time/step_s` is `reflux_time_step_seconds`."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    for ending, proper in _UNITS.items():
        if plain.endswith(ending):
            return f"reflux_{plain.removesuffix(ending)}{proper}"
    return f"reflux_{plain}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@contextmanager
def watched(config: Config, activity: Activity, *, serves: bool) -> Iterator[Health]:
    """Give the state that a run puts its signs into, served while the block runs if the settings ask for it.

    Args:
        config: checked settings.
        activity: what this process is doing.
        serves: whether this rank is the one that may serve.
    Raises:
        ConfigError: the address or the port cannot be had.
    """
    folder = Path(config.run.dir or ".")
    health = Health(
        folder.name,
        limit_s=config.log.health_limit_s,
        checkpoints=folder / "checkpoints",
        activity=activity,
    )
    if not serves or config.log.health_port is None:
        yield health
        return
    server = _opened(config.log.health_host, config.log.health_port, health)
    place, port = config.log.health_host, server.server_address[1]
    print(f"health: http://{f'[{place}]' if ':' in place else place}:{port}/healthz and /metrics", flush=True)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True, name="health").start()
    try:
        yield health
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    """A server of one address, whose threads end with the process."""

    block_on_close = False

    def __init__(self, family: int, address: tuple[str, int], health: Health) -> None:
        self.address_family = socket.AddressFamily(family)
        self.health = health
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the standard library's look-up of the machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that goes away in the middle is no matter of the run's."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    timeout = _ANSWER_S

    def do_GET(self) -> None:
        """Answer `/healthz` and `/metrics`."""
        path = self.path.partition("?")[0]
        if path == "/healthz":
            healthy, sentence = self.server.health.verdict()
            self._answer(200 if healthy else 503, _TEXT, f"{sentence}\n")
        elif path == "/metrics":
            self._answer(200, _PROMETHEUS, self.server.health.metrics_text())
        else:
            self._answer(404, _TEXT, "there is /healthz and /metrics\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing: the terminal is the run's."""


def _opened(host: str, port: int, health: Health) -> _Server:
    """Return a server that has its port."""
    try:
        kind = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
        family, *_, address = socket.getaddrinfo(host, port, **kind)[0]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"log.health_host={host} is no address ({error}); use 127.0.0.1, 0.0.0.0 for all, or a name of this machine"
        ) from error
    try:
        return _Server(family, (address[0], port), health)
    except OSError as error:
        raise ConfigError(
            f"log.health_port={port} cannot be had at log.health_host={host} ({error.strerror}); use another one, 0 for any "
            "that is free, or null for none"
        ) from error
