"""The launch files of Slurm and Kubernetes, run with stand-ins for the cluster: tiny models, two processes on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.commands.tiny_run import ROOT, STEPS, Inputs, metrics
from tests.launch.schedulers import SBATCH, container, pod_environment, slurm_environment


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_slurm_runs_stops_at_sigterm_and_goes_on(inputs: Inputs, tmp_path: Path) -> None:
    more = {"PYTHON": sys.executable, "RENDEZVOUS_PORT": str(free_port())}
    environment = slurm_environment(tmp_path / "bin", **more)
    arguments = ["bash", str(SBATCH), *inputs.settings(tmp_path / "run", "mesh.pp=2", "train.steps=400")]
    first = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if re.match(r"step +7/", line):
            break
    # Slurm tells every process of the job.
    os.killpg(first.pid, signal.SIGTERM)
    out, _ = first.communicate(timeout=120)
    done = len(metrics(tmp_path / "run"))
    assert f"stopped after step {done} of 400" in out and 7 <= done < 400
    arguments[-1] = f"train.steps={done + 3}"
    second = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert second.returncode == 0, second.stderr
    assert f"going on after step {done} of {done + 3}" in second.stdout
    assert "health: http://127.0.0.1:" in second.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


@pytest.mark.slow
def test_two_pods_are_one_run(inputs: Inputs, tmp_path: Path) -> None:
    port = free_port()
    args_file = tmp_path / "run.args"
    args_file.write_text("\n".join(inputs.settings(tmp_path / "run", "mesh.pp=2", f"train.steps={STEPS}")))
    settings = {
        "RUN_ARGS": str(args_file),
        "RUN_DIR": str(tmp_path / "run"),
        "PYTHON": sys.executable,
        "PROCESSES_PER_NODE": "1",
        # Addresses of this machine, in the order of the pods.
        "POD_NAME": "127.0.1.%d",
        "HEALTH_PORT": str(port),
    }
    command = [*container()["command"], *container()["args"]]
    pods = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=pod_environment(index, **settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (1, 0)
    ]
    answers = set()
    deadline_s = time.monotonic() + 200
    while any(pod.poll() is None for pod in pods) and time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                answers.add(answer.status)
        except OSError:
            pass
        time.sleep(0.05)
    ends = [pod.communicate(timeout=20) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], ends
    assert len(metrics(tmp_path / "run")) == STEPS and answers == {200}
    assert "health: http://0.0.0.0:" in ends[1][0] and "health:" not in ends[0][0], "rank 0 is in pod 0"
