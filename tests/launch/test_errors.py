"""How a run of several processes ends: mistakes, failures and signals, through the real launcher."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pace import slowness

FAKE = Path(__file__).with_name("fake_distill.py")
ROOT = Path(__file__).parents[2]


def start(how: str, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "launch.torchrun", "--nproc-per-node", "2"]
    settings = ["teacher=embedded", "data=pydoc", f"run.dir={folder}", "train.timeout_s=30", *overrides]
    return subprocess.Popen(
        [*launcher, str(FAKE), how, *settings],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [pytest.param("mistake", marks=pytest.mark.slow), "mistakes"])
def test_one_message_whichever_rank_sees_the_mistake(how: str, tmp_path: Path) -> None:
    process = start(how, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "error: data.path=empty.txt holds no text; use another one\n"


@pytest.mark.alone
def test_a_wrong_mesh_is_told_within_ten_seconds(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    process = start("steps", tmp_path, "mesh.tp=3")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and time.monotonic() - begin_s < 10 * slowness()
    assert err.startswith("error: mesh.pp=1 x mesh.tp=3 = 3 does not divide the number of processes, 2;")
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_failure_of_one_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    process = start("crash", tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("rank 1 (pp 0, dp 1, tp 0) failed:\nTraceback") and "the disk is on fire" in err
    assert err.count("Traceback") == 1
    assert "rank 0" not in err, "who only ends because of another says nothing"


def test_a_rank_that_hangs_is_named_and_all_leave(tmp_path: Path) -> None:
    limit_s = 3 * slowness()
    process = start("hang", tmp_path, f"train.timeout_s={limit_s}")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    first, *lines = err.splitlines()
    assert re.fullmatch(
        rf"no rank has got further for \d+ s \(train.timeout_s={limit_s:g}\), so the run is ended", first
    )
    assert re.match(r"  rank 1 \(pp 0, dp 1, tp 0\) is stuck in the long sleep for \d+ s, at ", lines[0]), err
    assert re.match(
        r"  rank 0 \(pp 0, dp 0, tp 0\) waits for an all-reduce over all ranks \(rank 1\): ", lines[1]
    )
    assert len(lines) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_loses_nothing(number: signal.Signals, tmp_path: Path) -> None:
    process = start("steps", tmp_path, "train.steps=1000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step    5/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, "saved, as asked to"
    last = out.splitlines()[-1]
    assert re.fullmatch(r"stopped after step \d+; the same command goes on from there", last)
    assert ("Ctrl-C again" in err) == (number == signal.SIGINT)
    done = int(last.split()[3].rstrip(";"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 1))
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in shown.splitlines()]
    history = [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]
    assert history == steps, "every step is in the wandb file, although it buffers 32 KiB"
    assert (tmp_path / "curve.svg").is_file()
