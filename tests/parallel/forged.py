"""Checkpoints that were changed by hand and whose sizes, hashes and checksum agree all the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


def checksum(body: Mapping[str, Any]) -> str:
    """Return a manifest's checksum, from the description of the format."""
    return hashlib.sha256(json.dumps(body, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a manifest says, and give it the checksum of that."""
    body = json.loads((folder / MANIFEST).read_text())
    del body["checksum"]
    body = change(body)
    (folder / MANIFEST).write_text(json.dumps({"checksum": checksum(body), **body}))


def record_of(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    content = file.read_bytes()
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def admit(folder: Path, file: str, *, to: str = "files") -> None:
    """Let the manifest agree with a file as it is now."""
    edit_manifest(folder, lambda body: {**body, to: {**body[to], file: record_of(folder / file)}})


def rewrite(
    folder: Path, file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **header: Any
) -> None:
    """Change the tensors of a file, or what its header says of shards, and let the manifest agree with it."""
    with safe_open(folder / file, framework="pt") as opened:
        metadata = {**opened.metadata(), **{name: json.dumps(value) for name, value in header.items()}}
    save_file(change(load_file(folder / file)), folder / file, metadata=metadata)
    admit(folder, file)
