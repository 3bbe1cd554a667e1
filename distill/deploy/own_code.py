"""Whether a model needs the Python files in its folder, and whether they are those that an export writes: then they may be run
without being asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

from distill.cut_config import MODELING_FILE
from distill.deploy import modeling_reflux_low_rank
from distill.prune import modeling_code

_BASE = re.compile(r"^from transformers import (\w+)  # noqa: E402$", re.MULTILINE)
_FILES = (MODELING_FILE, Path(modeling_reflux_low_rank.__file__).name)
"""What exports have called their code, of whatever version."""


def needs_code(folder: Path) -> bool:
    """Return whether the model in a folder is none, or another one, without the code that its config.json names.

    Transformers builds most families that name some by a class of its own; an export's code changes that class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    file = folder / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    name = (raw.get("auto_map") or {}).get("AutoModelForCausalLM")
    if name is None:
        return False
    module = str(name).rpartition("--")[2].partition(".")[0]
    return raw.get("model_type") not in CAUSAL or f"{module}.py" in _FILES


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
