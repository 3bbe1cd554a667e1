"""The run's folder: which config it belongs to, and its line files when a run goes on.

Decides: a folder belongs to the settings in its `config.yaml` from the first thing on that a run has made in it; another
run may continue there only if everything that shapes the result is the same. `MAY_CHANGE` lists what does not: how long,
how watched, and how executed. The checkpoint that a run begins with shapes it too: another one needs another folder; once the
run has checkpoints of its own it goes on from those, also when the one that is named has gone. The settings are written before anything is made, so a killed run leaves nothing of unknown
settings, and a run that is refused leaves nothing that binds the next. When a run goes on from step N, lines after N are dropped, so that there is one line a step. Assumes that one rank writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.config import Config, ConfigError
from distill.convert import config_to_dict, either, flatten, show
from distill.places import check_writable

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SUMMARY_FILE = "summary.json"
_MADE = ("pruned", "factored", METRICS_FILE, "checkpoints", "student")
"""What a run makes out of its settings."""

MAY_CHANGE = (
    "train.steps",  # the learning rate's schedule is then laid over the new number
    "train.tokens",
    "train.timeout_s",
    "train.max_skipped_steps",
    "train.microbatch_size",
    "train.recompute",
    "train.compile",
    "mesh.",
    "pipeline.",
    "optimizer.engine",
    "optimizer.zero_stage",
    "optimizer.offload",
    "data.cache_dir",
    "checkpoint.",
    "log.",
    "run.",
    "evaluate.every",
    "evaluate.lm_eval",
    "evaluate.out",
)
"""Keys, or groups with a dot at the end, that may differ when a run goes on: the trajectory does not depend on them."""
_ROUND_STAYS = ("train.steps", "train.tokens")
"""Of them, what may not differ in an entry of `rounds`, nor at all where there are several: how long a round was has shaped
what came after it."""
CHECKPOINTS = "checkpoints"
_COMPLETE = re.compile(r"step-\d+")
"""Name of a checkpoint that is not being written, nor set aside."""


def check_run_folder(config: Config) -> None:
    """Refuse to write into the folder of another run.

    Every rank may ask this on its own, before any of them writes: a folder that rank 0 has already made for this run passes.

    Raises:
        ConfigError: `run.dir` is a file, holds a run with other settings or one that is not to be continued, or models
            or numbers that no run of this command made; `checkpoint.resume` names nothing, or another run's checkpoint
            for a run that has begun otherwise.
    """
    folder = Path(config.run.dir or ".")
    check_writable("run.dir", folder)
    made = [name for name in _MADE if (folder / name).is_dir() or _has_content(folder / name)]
    if not made:
        _check_named(config.checkpoint.resume)
        return
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"run.dir={folder} holds {made[0]} but no {CONFIG_FILE}, so it is not the folder of a run; use another run.dir"
        )
    differing = _differing_keys(folder, config)
    if differing:
        key, theirs, ours = differing[0]
        others = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise ConfigError(
            f"run.dir={folder} holds a run with {key}={theirs}, this one has {key}={ours}{others}; use another run.dir "
            f"or {key}={theirs}"
        )
    _check_beginning(folder, config.checkpoint.resume)
    if config.checkpoint.resume == "none" and (folder / METRICS_FILE).is_file():
        raise ConfigError(
            f"checkpoint.resume=none starts anew, but run.dir={folder} already holds this run; use another run.dir or "
            "checkpoint.resume=auto"
        )


def _check_beginning(folder: Path, ours: str) -> None:
    """Refuse a run that would begin otherwise than the one in the folder, which has made its work out of its beginning.

    Args:
        ours: the value of `checkpoint.resume`.
    """
    theirs, owns = read_resume(folder) or "auto", _has_checkpoints(folder)
    if ours != theirs or not owns:
        # Otherwise it goes on from its own, whatever has become of this one.
        _check_named(ours)
    foreign = [each for each in (theirs, ours) if is_foreign(each, folder)]
    if ours == theirs or not foreign or (owns and ours not in foreign):
        return
    stands = "checkpoints of its own" if owns else "no checkpoint of its own yet"
    right = [theirs] if theirs in foreign else []
    right += ["auto"] if owns or not right else []
    raise ConfigError(
        f"run.dir={folder} holds a run that was started with checkpoint.resume={theirs} and has {stands}, this one has "
        f"checkpoint.resume={ours}; use another run.dir or checkpoint.resume={either(right)}"
    )


def _check_named(resume: str) -> None:
    if resume not in ("auto", "none") and not os.path.isdir(resume):
        raise ConfigError(
            f"checkpoint.resume={resume} is no folder; use auto, none or a folder of {CHECKPOINTS}/"
        )


def is_foreign(resume: str, folder: Path) -> bool:
    """Whether a value of `checkpoint.resume` names a checkpoint outside a run's folder."""
    own = (folder / CHECKPOINTS).resolve()
    return resume not in ("auto", "none") and Path(resume).resolve().parent != own


def _has_checkpoints(folder: Path) -> bool:
    """Whether a run has a complete checkpoint; one that cannot be looked at counts, and is told when it is looked for."""
    try:
        found = [each for each in (folder / CHECKPOINTS).iterdir() if _COMPLETE.fullmatch(each.name)]
        return any((each / "manifest.json").is_file() for each in found)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def write_config(config: Config) -> None:
    """Make the run's folder and write its settings; the settings that may change are those of the latest run.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    folder = Path(config.run.dir or ".")
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, width=110)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG_FILE, f"# The settings of this run, everything filled in.\n{text}")
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be written ({error.strerror}); use another run.dir"
        ) from error


def read_resume(folder: Path) -> str | None:
    """Return the `checkpoint.resume` that the folder's run was started with the last time; None in an empty folder.

    Raises:
        ConfigError: its settings cannot be read.
    """
    file = folder / CONFIG_FILE
    return flatten(_read_config(file)).get("checkpoint.resume") if file.is_file() else None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run that came to its end, or None; a file that a machine's end has cut short is none."""
    file = folder / SUMMARY_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        return None


def drop_summary(folder: Path) -> None:
    """Remove the summary of a run that goes on: it has not come to its end."""
    (folder / SUMMARY_FILE).unlink(missing_ok=True)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` whole."""
    write_whole(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def read_lines(file: Path, *, last_step: int) -> list[dict[str, Any]]:
    """Return the lines of a JSON lines file up to a step.

    A last line that was cut short by a kill is left out.

    Raises:
        ValueError: another line cannot be read.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{file}, line {number} is not JSON: {line[:60]!r}") from error
        if values["step"] <= last_step:
            kept.append(values)
    return kept


def cut_lines(file: Path, *, last_step: int) -> list[dict[str, Any]]:
    """Drop the lines after a step from a JSON lines file, and return the others."""
    kept = read_lines(file, last_step=last_step)
    if file.is_file():
        write_lines(file, kept)
    return kept


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a whole JSON lines file."""
    write_whole(file, "".join(json.dumps(values) + "\n" for values in lines))


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there either whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _differing_keys(folder: Path, config: Config) -> list[tuple[str, str, str]]:
    """Return key, the folder's value and ours, for each setting that differs and may not."""
    theirs = _comparable(_read_config(folder / CONFIG_FILE))
    ours = _comparable(config_to_dict(config))
    return [
        (key, show(theirs.get(key)), show(ours.get(key)))
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); use another run.dir") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not the settings of a run; use another run.dir")
    return values


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may not differ, also those inside the entries of `rounds`."""
    rounds = values.get("rounds")
    stays = _ROUND_STAYS if isinstance(rounds, list) and len(rounds) > 1 else ()
    flat = _without_what_may_change(values, stays)
    if isinstance(rounds, list):
        flat["rounds"] = [_without_what_may_change(entry, _ROUND_STAYS) for entry in rounds]
    return flat


def _without_what_may_change(values: Mapping[str, Any], stays: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in flatten(values).items() if key in stays or not _may_change(key)}


def _may_change(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)
