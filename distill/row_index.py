"""Which packed rows were made from which files, so that a start with the same files need not read the text again.

Decides: a file is known by its place, its size and the time of its last change, as `datasets` knows it too. A hub data set is
not known here, because only the hub says which version it is; its text is read at each start. An entry is one small file with
the name of a folder of rows, under a hash of the files and of all else that rows depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from distill.atomic import build_once
from distill.config import Data
from distill.corpus import corpus_files
from distill.held_out import RULES, Part
from distill.packing import Cutter, Rows, built_rows


class RowIndex:
    """The entry for one part of a corpus.

    Args:
        data: the `data` group of the configuration.
        cutter: tokenizer and rules of the rows.
        part, source: as `distill.data.load_rows` takes them.
        cache_dir: where rows are kept.
    """

    def __init__(
        self, data: Data, cutter: Cutter, *, part: Part, source: int | None, cache_dir: Path
    ) -> None:
        self._cutter, self._rows = cutter, cache_dir / "rows"
        files = corpus_files(data)
        self._entry: Path | None = None
        if files is not None:
            depends = (RULES, files, data.text_field, data.held_out_fraction, part, source)
            key = hashlib.sha256(cutter.fingerprint() + json.dumps(depends).encode())
            self._entry = cache_dir / "index" / key.hexdigest()[:24]

    def find(self) -> Rows | None:
        """Return the rows made from these files, if they are there and whole."""
        if self._entry is None or not self._entry.is_file():
            return None
        name = self._entry.read_text(encoding="utf-8", errors="replace").strip()
        if not name:
            return None
        return built_rows(self._rows / Path(name).name, self._cutter)

    def remember(self, rows: Rows) -> None:
        """Write down which rows these files make; where that cannot be written, the text is read again next time."""
        if self._entry is not None:
            name = f"{rows.folder.name}\n"
            with contextlib.suppress(OSError):
                build_once(self._entry, lambda file: file.write_text(name, encoding="utf-8"))
