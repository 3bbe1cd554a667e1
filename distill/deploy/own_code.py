"""Whether the Python files of a model's folder are those that an export writes: then they may be run without being asked for."""

from __future__ import annotations

import re
from pathlib import Path

from distill.cut_config import MODELING_FILE
from distill.deploy import modeling_reflux_low_rank
from distill.prune import modeling_code

_BASE = re.compile(r"^from transformers import (\w+)  # noqa: E402$", re.MULTILINE)


def has_own_code(folder: Path) -> bool:
    """Return whether a folder has code, and all of it is ours, letter for letter."""
    files = sorted(folder.rglob("*.py"))
    return bool(files) and all(file.parent == folder and _is_own(file) for file in files)


def _is_own(file: Path) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    ours = Path(modeling_reflux_low_rank.__file__)
    if file.name == ours.name:
        return text == ours.read_text(encoding="utf-8")
    base = _BASE.search(text)
    return file.name == MODELING_FILE and base is not None and text == modeling_code(base[1])
