"""`launch/kubernetes.yaml`: what its pods would start, taken apart; `tests/commands/test_schedulers.py` starts it."""

from __future__ import annotations

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from launch.environment import USER_ERROR
from tests.launch.schedulers import KUBERNETES, ROOT, container, job, pod_environment, read_call


def pod(index: int, folder: Path, python: str, *, finished: bool) -> subprocess.CompletedProcess[str]:
    """Run a pod's command with a shell script in place of the interpreter, in a run folder with that summary."""
    (folder / "summary.json").write_text(json.dumps({"finished": finished}, indent=2))
    (folder / "python").write_text(f"#!/usr/bin/env bash\n{python}\n")
    (folder / "python").chmod(0o700)
    places = {
        "RUN_ARGS": folder / "run.args",
        "PYTHON": folder / "python",
        "RUN_DIR": folder,
        "CACHE_DIR": folder / "cache",
    }
    return subprocess.run(
        [*container()["command"], *container()["args"]],
        cwd=ROOT,
        env=pod_environment(index, **{name: str(path) for name, path in places.items()}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_starts_the_main_job(index: int, tmp_path: Path) -> None:
    (tmp_path / "run.args").write_text(
        "# a run\nteacher=embedded\n\ndata=pydoc\nrounds=[{train: {steps: 2}}, {}]\n"
    )
    done = pod(index, tmp_path, r'printf "%s\0" "$0" "$@"', finished=True)
    assert done.returncode == 0
    call = read_call(done.stdout.split("\0")[:-1], world_size=16)
    assert call.module == "launch.distill"
    assert call.launcher == {
        "nnodes": "2",
        "nproc-per-node": "8",
        "rdzv-id": "reflux",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "reflux-0.reflux:29400",
        "rdzv-conf": f"is_host={1 - index},join_timeout=1800",
        "local-addr": f"reflux-{index}.reflux",
        "max-restarts": "3",
    }
    assert call.config.run.dir == str(tmp_path) and call.config.checkpoint.resume == "auto"
    assert call.config.data.cache_dir == str(tmp_path / "cache")
    assert call.config.log.health_port == 8080 and call.config.log.health_host == "0.0.0.0"
    assert len(call.config.rounds) == 2 and call.config.mesh.dp == 16


@pytest.mark.parametrize(
    ("python", "finished", "code"),
    [
        ("exit 0", True, 0),
        ("exit 0", False, 75),
        ("exit 2", False, 2),
        # The pod is evicted while the launcher runs, which saves and leaves.
        ("trap 'exit 0' TERM; kill -TERM $PPID; sleep 20 >&- 2>&- & wait", False, 75),
        ("trap 'exit 3' TERM; kill -TERM $PPID; sleep 20 >&- 2>&- & wait", False, 3),
    ],
)
def test_a_pod_whose_run_is_not_finished_has_not_completed(
    python: str, finished: bool, code: int, tmp_path: Path
) -> None:
    (tmp_path / "run.args").write_text("teacher=embedded\n")
    assert pod(0, tmp_path, python, finished=finished).returncode == code


def test_the_parts_fit_each_other() -> None:
    service, work = yaml.safe_load_all(KUBERNETES.read_text())
    spec = work["spec"]
    pod, environment = spec["template"]["spec"], pod_environment(0)
    name = work["metadata"]["name"]
    assert (spec["completionMode"], work["apiVersion"], service["apiVersion"]) == (
        "Indexed",
        "batch/v1",
        "v1",
    )
    assert str(spec["completions"]) == str(spec["parallelism"]) == environment["NNODES"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"] == {
        "job-name": name
    }
    assert (
        environment["POD_NAME"] == f"{name}-%d.{pod['subdomain']}" and service["spec"]["clusterIP"] == "None"
    )
    ports = {each["name"]: each["port"] for each in service["spec"]["ports"]}
    assert ports == {"rendezvous": 29400, "health": int(environment["HEALTH_PORT"])}
    assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert {each["name"] for each in container()["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    mistakes, stopped, _ = spec["podFailurePolicy"]["rules"]
    assert (
        stopped["action"] == "Ignore"
        and f"code={stopped['onExitCodes']['values'][0]}" in container()["args"][0]
    )
    assert mistakes["action"] == "FailJob" and mistakes["onExitCodes"]["values"] == [USER_ERROR]
    assert mistakes["onExitCodes"]["containerName"] == container()["name"] and pod["restartPolicy"] == "Never"


@pytest.mark.parametrize(("index", "code", "alive"), [(0, 200, True), (0, 503, False), (1, 503, True)])
def test_the_probe_asks_rank_0(index: int, code: int, alive: bool) -> None:
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *values: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = pod_environment(index, HEALTH_PORT=str(server.server_address[1]))
        probe = container()["livenessProbe"]
        done = subprocess.run(
            probe["exec"]["command"], cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False
        )
        server.shutdown()
    assert (done.returncode == 0) == alive and asked == (["/healthz"] if index == 0 else [])
    assert container()["startupProbe"]["exec"] == probe["exec"] and job()["spec"]["backoffLimit"] > 0
