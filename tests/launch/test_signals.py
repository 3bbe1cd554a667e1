from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import time
from distill.stop import Stop
from launch import signals
signals.SAVE_AFTER_S = {save_after_s}
stop = Stop()
signals.listen(stop, announces=True, waits={waits})
stop.call_before_kill(lambda: print("saved", flush=True))
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.01)
print("step done", flush=True)
time.sleep({then_s})
print("end", flush=True)
"""


def start(*, save_after_s: float = 60, then_s: float = 0, waits: bool = True) -> subprocess.Popen[str]:
    code = PROGRAM.format(save_after_s=save_after_s, then_s=then_s, waits=waits)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "\nstopping after the step under way; Ctrl-C again ends at once\n"),
        (signal.SIGTERM, ""),
    ],
)
def test_a_signal_lets_the_step_end(number: int, said: str) -> None:
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("step done\nend\n", said, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_without_steps_ends_at_the_first_signal(number: int) -> None:
    process = start(waits=False)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("saved\n", "", 128 + number)


def test_a_second_signal_ends_at_once_and_saves() -> None:
    process = start(then_s=60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # the same Ctrl-C, as torchrun passes it on
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert out == "step done\nsaved\n" and process.returncode == 128 + signal.SIGTERM


def test_what_is_buffered_is_saved_when_the_step_takes_long() -> None:
    process = start(save_after_s=0.2, then_s=1.0)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert out == "step done\nsaved\nend\n" and process.returncode == 0
