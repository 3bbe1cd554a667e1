"""A student's `config.json` as it is written: for transformers 5, and for engines that read the keys of transformers 4.

Decides that both forms stand side by side. An engine that finds no `rope_theta` beside `rope_parameters` takes its own default
without a word, and the model is worse the longer the text. transformers 5 reads the older keys as it reads its own
(`convert_rope_params_to_dict`), so nothing changes for it. Positions that differ from layer type to layer type have no older form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def save_config(config: PretrainedConfig, folder: Path) -> None:
    """Write config.json into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps({**values, **_older_keys(values)}, indent=2, sort_keys=True) + "\n"
    file.write_text(text, encoding="utf-8")


def _older_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 called the dtype and the rotary positions of a config."""
    older: dict[str, Any] = {}
    if "dtype" in values:
        older["torch_dtype"] = values["dtype"]
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope.get("rope_theta"), (int, float)):
        return older
    older["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = dict(rope)
    return older
