"""The text of `--help`: how a command is used, its recipes, and every key with its default and meaning.

Decides: the meanings are the strings below the fields in `distill/config.py` and `distill/student_config.py`, read out
of their source, so that they stand in one place. Does not know what a command does; each passes that in.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import distill.config
import distill.student_config
from distill.config import Config
from distill.convert import config_to_dict, flatten, show
from launch.config import groups

_WIDTH = 100
_SETTINGS = (distill.config, distill.student_config)


def help_text(command: str, about: str) -> str:
    """Return what `--help` prints for one command."""
    lines = [f"{command}: {about.strip()}", "", "Recipes (GROUP=OPTION):"]
    lines += [f"  {group:<14}{', '.join(options)}" for group, options in groups().items()]
    lines += ["", "Keys (KEY=VALUE), with their defaults:"]
    meanings = key_meanings()
    for key, default in flatten(config_to_dict(Config())).items():
        lines.append(f"  {key}={show(default)}")
        lines += textwrap.wrap(meanings[key], _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += [
        "",
        "Options: --cfg job prints the composed settings; --config-dir DIR adds a folder of recipes;",
    ]
    lines += ["         --help prints this."]
    return "\n".join(lines)


def key_meanings() -> dict[str, str]:
    """Return what each dotted key means, out of the source of the settings."""
    nodes = [node for module in _SETTINGS for node in ast.parse(inspect.getsource(module)).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    return _meanings(classes, "Config", prefix="")


def _meanings(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> dict[str, str]:
    body = classes[name].body
    meanings: dict[str, str] = {}
    for position, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        key = f"{prefix}{node.target.id}"
        if isinstance(node.annotation, ast.Name) and node.annotation.id in classes:
            meanings.update(_meanings(classes, node.annotation.id, f"{key}."))
        else:
            meanings[key] = _string(body[position + 1], key)
    return meanings


def _string(node: Any, key: str) -> str:
    assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), (
        f"{key} has no meaning below it"
    )
    return str(node.value.value)
