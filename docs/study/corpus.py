"""Make the corpus of the study out of three Debian packages with prose: `python docs/study/corpus.py FOLDER`.

Writes FOLDER/{anarchism,python,linux}.jsonl, one document a line, duplicates left out, in an order that depends on the
texts alone, until LIMIT characters each. Needs `apt-get` and `dpkg-deb`, and a package source of Debian 12.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 8_000_000
"""Characters of each part, so that none outweighs the others."""
SHORTEST = 1_000
"""Characters below which a document is an index or a stub."""
PARTS = {
    "anarchism": ("anarchism", "*.md.gz"),
    "python": ("python3.11-doc", "*.rst.txt"),
    "linux": ("linux-doc-6.1", "*.rst.gz"),
}


def texts(package: str, pattern: str) -> list[str]:
    """Download a package and return its documents, each once, ordered by the hash of the text."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["apt-get", "download", package], cwd=place, check=True)
        (archive,) = Path(place).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, Path(place) / "files"], check=True)
        by_hash = {}
        for path in (Path(place) / "files").rglob(pattern):
            if path.is_symlink():
                continue
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            by_hash[hashlib.sha256(data).hexdigest()] = data.decode("utf-8", errors="replace").strip()
    return [text for _, text in sorted(by_hash.items()) if len(text) >= SHORTEST]


def main(folder: Path) -> None:
    """Write all parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, pattern) in PARTS.items():
        size = count = 0
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for text in texts(package, pattern):
                if size >= LIMIT:
                    break
                file.write(json.dumps({"text": text}) + "\n")
                size, count = size + len(text), count + 1
        print(f"{folder / name}.jsonl: {count} documents, {size:,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
