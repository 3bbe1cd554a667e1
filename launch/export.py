"""Write the student of a checkpoint as a Hugging Face folder, in one process and from the checkpoint alone.

Decides the command's keys: `checkpoint`, `out`, and those of the group `export`, whose values stand in for the run's own. The
work is `distill.deploy.from_checkpoint`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.checks import check_config
from distill.config import ConfigError
from distill.convert import config_from_dict
from launch.command import run_alone
from launch.config import parse_options
from launch.environment import FAILURE

USAGE = "python -m launch.export checkpoint=RUN/checkpoints/step-N out=FOLDER [export.KEY=VALUE ...]"
ABOUT = "write the student of a checkpoint as a Hugging Face folder; the teacher and the rest of the run are not needed"
_OWN = ("checkpoint", "out")
_GROUP = "export."


def export(arguments: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: a mistake of the user.
        RunFailed: the checkpoint cannot be read here and now.
    """
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"{USAGE}\n{ABOUT}")
        return
    options = parse_options(arguments)
    settings = _settings(options)
    checkpoint, out = (_path(options, name) for name in _OWN)
    # Imported late: torch takes seconds, and a mistake should be told before.
    from distill.deploy.from_checkpoint import export_checkpoint

    try:
        export_checkpoint(checkpoint, out, low_rank=settings.get("low_rank"))
    except OSError as error:
        print(f"failed: out={out} could not be written: {error}", file=sys.stderr)
        raise SystemExit(FAILURE) from error
    print(f"student: {out}", flush=True)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given of the group `export`, by the names of its keys, checked."""
    given = {}
    for key, value in options.items():
        if key.startswith(_GROUP):
            given[key.removeprefix(_GROUP)] = value
        elif key not in _OWN:
            raise ConfigError(
                f"there is no key {key} here; use checkpoint, out, and those of {_GROUP.rstrip('.')}"
            )
    config = config_from_dict({"export": given, "log": {"wandb": "disabled"}})
    check_config(config, world_size=1, needs=())
    return given


def _path(options: Mapping[str, Any], name: str) -> Path:
    value = options.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}=FOLDER must be given; {USAGE}")
    return Path(value).expanduser()


if __name__ == "__main__":
    sys.exit(run_alone(export))
