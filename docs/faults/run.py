"""What comes of each fault: `python docs/faults/run.py [NAME ...]`, from the root of the repository.

Provokes every fault of `tests/commands/faults.py`, or those named, and writes docs/faults.md: the message, the exit code, the seconds
until all processes are gone, and what is kept. Ends with 1 when a fault does not end as promised. About a minute a fault on two cores.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.commands.faults import FAULTS, Fault, Outcome, ends_alike, undisturbed, wrong
from tests.commands.tiny_run import make_inputs

TABLE = ROOT / "docs" / "faults.md"
KNOWN = ROOT / "docs" / "faults" / "rows.json"
"""The rows so far, by name: a fault is provoked by itself as well as with all others."""
HEAD = """# What comes of each fault

Made by `docs/faults/run.py`: runs of four processes (pp 2 x dp 2, tiny models, two rounds of 8 steps, a checkpoint every other step),
with `train.timeout_s` of 20, or more where the machine was slow (the message tells it), each with one fault. *Gone* is the time from the
fault until no process of the run is left; a run that goes on has none (a frozen process heeds no SIGTERM: torchrun waits 30 s before
it kills it). *Kept* is the newest complete checkpoint; "the finished run, equal" means that its students are those of the
undisturbed run, bit for bit.

| fault | exit code | gone after s | kept | message |
| --- | --- | --- | --- | --- |
"""


def row(fault: Fault, outcome: Outcome, whole: Path) -> str:
    """Return a fault's row."""
    gone = "" if outcome.gone_s is None or outcome.code == 0 else f"{outcome.gone_s:.0f}"
    kept = outcome.kept
    if (outcome.folder / "student").is_dir() and ends_alike(outcome.folder, whole):
        kept += ", equal"
    words = [re.sub(r"\S*/(?=inputs|reflux)", "", line) for line in outcome.message]
    message = "<br>".join(line.strip().replace("|", "\\|") for line in words)
    return f"| {fault.words} | {outcome.code} | {gone} | {kept} | {message} |"


def main() -> int:
    """Provoke, and write the table."""
    named = sys.argv[1:]
    rows = json.loads(KNOWN.read_text()) if named and KNOWN.exists() else {}
    broken = 0
    with tempfile.TemporaryDirectory(prefix="reflux-faults-") as place:
        root = Path(place)
        inputs = make_inputs(root / "inputs")
        whole = undisturbed(inputs, root / "undisturbed")
        chosen = {each.name: each for each in FAULTS}
        for fault in (chosen[name] for name in named or chosen):
            begin_s = time.monotonic()
            outcome = fault.run(inputs, root / fault.name)
            rows[fault.name] = row(fault, outcome, whole)
            if (found := wrong(fault, outcome)) is not None:
                broken += 1
                print(f"{fault.name}: {found}\n{outcome.out[-2000:]}\n{outcome.err[-4000:]}", file=sys.stderr)
            print(f"{fault.name}: {time.monotonic() - begin_s:.0f} s {rows[fault.name]}", flush=True)
            KNOWN.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            ordered = [rows[each.name] for each in FAULTS if each.name in rows]
            TABLE.write_text(HEAD + "\n".join(ordered) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
