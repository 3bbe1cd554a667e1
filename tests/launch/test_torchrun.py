"""The launcher: when ranks start again, and the exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = r"""
import os, signal, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
open(f"{sys.argv[2]}/{attempt}-{rank}", "w").close()
if sys.argv[1] == "fails":
    if attempt == 0 and rank == 1:
        while not os.path.exists(f"{sys.argv[2]}/0-0"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 1 and rank == 1:
        sys.exit(2)
    time.sleep(60)
def stop(number, frame):
    sys.exit(0 if rank < 1 or sys.argv[1] == "saves" else 1)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready\n")
time.sleep(60)
"""


def start(how: str, folder: Path) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "launch.torchrun", "--nproc-per-node", "2", "--max-restarts", "3"]
    return subprocess.Popen(
        [*launcher, str(program), how, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_rank_starts_all_again_and_a_mistake_does_not(tmp_path: Path) -> None:
    process = start("fails", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines() == [
        "rank 1 was ended by SIGKILL, as the system does when memory runs out",
        "all ranks start again, 1 of at most 3 times",
    ]
    attempts = sorted(path.name for path in tmp_path.glob("?-?"))
    assert attempts == ["0-0", "0-1", "1-0", "1-1"]


def stopped(how: str, folder: Path) -> int:
    process = start(how, folder)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return process.returncode


def test_a_signal_is_success_if_every_rank_says_so(tmp_path: Path) -> None:
    for how, code in (("saves", 0), ("cannot", 128 + signal.SIGTERM)):
        folder = tmp_path / how
        folder.mkdir()
        assert stopped(how, folder) == code
        assert len(list(folder.glob("?-?"))) == 2, "and nothing starts again"
