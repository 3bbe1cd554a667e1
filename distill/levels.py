"""What the teacher reached, kept beside the corpora: it is judged once for the same weights, text and dtype.

Decides the key: a hash of what the figures depend on. Rows and questions are known by their content; of a model's weights,
place, size and time of each file stand for the content, as for converted models, because hashing many GB would cost more
than it saves. Figures do not depend on the layout, so neither does the key. One small JSON file a judgement; one that cannot
be read is made again, with a line that says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distill.atomic import build_once
from parallel.collectives import broadcast_object
from parallel.mesh import Mesh

Figures = Mapping[str, float | None]

# Counts changes of the figures or of the files.
_FORMAT = 3


@dataclass(frozen=True)
class Levels:
    """The judgements of one teacher."""

    folder: Path
    teacher: Path
    """Its Hugging Face folder."""
    dtype: str
    """In which it computes."""
    vocab_size: int
    """Ids that it chooses among; its padding may be left out."""

    def of(self, text: str, mesh: Mesh, measure: Callable[[], Figures]) -> tuple[Figures, bool]:
        """Return the teacher's figures on a text, and whether they were known before.

        Figures that are not finite are not kept.

        Args:
            text: what tells the text from others: a hash of its content.
            measure: makes the figures, the same on every rank; called on every rank or on none.
        Collectives: one broadcast over the world, then those of `measure`.
        """
        file = self._file(text) if mesh.world.is_first else None
        # Rank 0 looks for all: what the others see of a shared folder may lag behind.
        known = broadcast_object(None if file is None else _read(file), mesh.world)
        if known is not None:
            return known, True
        figures = measure()
        if file is not None and all(value is None or math.isfinite(value) for value in figures.values()):
            content = json.dumps({"teacher": str(self.teacher), "figures": dict(figures)}, indent=2) + "\n"
            build_once(file, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        return figures, False

    def _file(self, text: str) -> Path:
        content = (_FORMAT, _weights_print(self.teacher), self.dtype, self.vocab_size, text)
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}.json"


def _weights_print(folder: Path) -> list[tuple[str, int, int]]:
    """Return what tells the files of a model from those of another."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    # Resolved, because a hub snapshot is links to files that are named by their content.
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _read(file: Path) -> Figures | None:
    """Return the figures of a file; None, said aloud, for one that is none."""
    if not file.is_file():
        return None
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        # A figure may be null: the standard error of a single question.
        usable = bool(figures) and all(type(value) in (int, float, type(None)) for value in figures.values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        usable = False
    if usable:
        return figures
    print(f"{file} is broken; the teacher is judged again", flush=True)
    return None
