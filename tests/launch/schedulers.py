"""The launch files of Slurm and Kubernetes as a test runs them: with stand-ins for what a cluster has."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.checks import check_config
from distill.config import Config
from launch.config import compose_config, parse_command_line

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm.sbatch"
KUBERNETES = ROOT / "launch" / "kubernetes.yaml"
_MANY = 'exec "$@"'


@dataclass(frozen=True)
class Call:
    """A command line of the launcher, taken apart."""

    launcher: dict[str, str]
    """Options of torchrun, without their dashes."""
    module: str
    config: Config


def read_call(words: Sequence[str], *, world_size: int) -> Call:
    """Take a command line apart and check it as the command does.

    Args:
        words: from the interpreter on.
        world_size: processes that it would start in all.
    """
    assert list(words[1:3]) == ["-m", "launch.torchrun"], words
    rest, launcher = list(words[3:]), {}
    while rest[0].startswith("--"):
        name, value, *rest = rest
        launcher[name.removeprefix("--")] = value
    assert rest[0] == "-m", rest
    line = parse_command_line(rest[2:])
    assert line.shows is None
    return Call(launcher, rest[1], check_config(compose_config(line), world_size=world_size))


def slurm_environment(bin_dir: Path, *, srun: str = _MANY, **more: str) -> dict[str, str]:
    """Return what a job's script finds: Slurm's variables, and its programs as stand-ins in `bin_dir`.

    Args:
        srun: shell lines that stand in for it; `"$@"` is what it would start on each node.
    """
    bin_dir.mkdir(exist_ok=True)
    options = "while [[ $1 == --* ]]; do shift; done\n"
    for name, text in (("srun", options + srun), ("scontrol", 'printf "127.0.0.1\\nnode-1\\n"')):
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_dir / name).chmod(stat.S_IRWXU)
    known = {
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "reflux",
        "SLURM_GPUS_ON_NODE": "2",
    }
    return {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", **known, **more}


def job() -> dict[str, Any]:
    """Return the Job of the Kubernetes file."""
    return next(each for each in yaml.safe_load_all(KUBERNETES.read_text()) if each["kind"] == "Job")


def container() -> dict[str, Any]:
    """Return the Job's container."""
    (only,) = job()["spec"]["template"]["spec"]["containers"]
    return only


def pod_environment(index: int, **more: str) -> dict[str, str]:
    """Return what the container of a pod finds in its environment, with some of it for this machine."""
    given = {each["name"]: each["value"] for each in container()["env"]}
    assert not more.keys() - given.keys()
    return {**os.environ, **given, "JOB_COMPLETION_INDEX": str(index), **more}


def seconds(option: str, text: str) -> int:
    """Return the number behind an option of a script."""
    found = re.search(rf"{option}\D*(\d+)", text)
    assert found is not None, option
    return int(found[1])
