"""What a checkpoint holds beside its tensors, so that it is enough by itself: the student's small files and the settings.

    student/     config.json, tokenizer, generation config and kept indices, as the folder had them that the training began with
    scores.safetensors, settings.json

Decides which files these are, and reads them back. They are read once when a round begins, so that a checkpoint does not
depend on what becomes of the run's other folders. Everything but the teacher is there; no random state is, because none is
used once a student is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.convert import config_from_dict, config_to_dict
from distill.prune import KEPT_FOLDER, companion_paths
from distill.student import SCORES_FILE
from parallel.checkpoint_manifest import CheckpointError, reaching
from parallel.hashed_files import size_of

STUDENT = "student"
CONFIG_FILE = "config.json"
SETTINGS_FILE = "settings.json"


def companions(settings: Config, student_folder: Path) -> dict[str, bytes]:
    """Return the small files of a round's checkpoints by their paths in them.

    Args:
        settings: of the round.
        student_folder: what its training began with.
    """
    found = [student_folder / CONFIG_FILE, student_folder / KEPT_FOLDER, *companion_paths(student_folder)]
    files = {
        f"{STUDENT}/{path.relative_to(student_folder).as_posix()}": path.read_bytes()
        for place in found
        for path in (sorted(place.rglob("*")) if place.is_dir() else [place])
        if path.is_file()
    }
    scores = Path(settings.run.dir or ".") / SCORES_FILE
    if scores.is_file():
        files[SCORES_FILE] = scores.read_bytes()
    files[SETTINGS_FILE] = (json.dumps(config_to_dict(settings), indent=2) + "\n").encode()
    return files


def read_settings(folder: Path) -> Config:
    """Return the settings of the round that a checkpoint was written in.

    Raises:
        CheckpointError: they are not there, or are none.
        CheckpointOutOfReach: they may be there and cannot be read.
    """
    file = folder / SETTINGS_FILE
    with reaching(file):
        content = None if size_of(file) is None else file.read_bytes()
    if content is None:
        raise CheckpointError(f"{file} cannot be read: it is not there")
    try:
        return config_from_dict(json.loads(content.decode(), object_hook=_with_whole_names))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _with_whole_names(values: dict[str, Any]) -> dict[Any, Any]:
    """Turn `{"0": 4}` back into `{0: 4}`: JSON names things by text only, a schedule names its steps by numbers."""
    whole = bool(values) and all(name.isdecimal() for name in values)
    return {int(name): value for name, value in values.items()} if whole else values
