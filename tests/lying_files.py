"""Damage to a model's files that their own checks must see."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path


def change_header(file: Path, tensor: str, **changes: object) -> None:
    """Change what the header of a safetensors file says of one tensor, and keep the bytes of the tensors."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header[tensor] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def move_behind_link(file: Path) -> None:
    """Move a file out of its folder under a name without a suffix, and leave a link to it."""
    outside = file.parent.parent / "secret"
    shutil.move(file, outside)
    file.symlink_to(outside)
