"""The kill test: `python docs/kills/run.py [RUNS [SEED]]`, from the root of the repository.

RUNS runs (30) of four processes (pp 2 x dp 2, tiny models, two rounds, a checkpoint every other step), in each of which a random
rank is ended by SIGKILL at a random moment, under `--max-restarts`. Every one must come to the same students and the same losses as
the run that nobody disturbs, bit for bit. Every third is killed while a checkpoint is being written, every third between the two
rounds, the others anywhere in the training. Writes docs/kills.md; ends with 1 when a run is not equal.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.commands.faults import NO_FAULT, ends_alike, finish, processes_of, start_run, undisturbed
from tests.commands.tiny_run import Inputs, Started, losses, make_inputs, metrics

TABLE = ROOT / "docs" / "kills.md"
HEAD = """# The kill test

Runs of `docs/kills/run.py` (seed {seed}): pp 2 x dp 2, two rounds of 8 steps, a checkpoint every other step, one rank killed by SIGKILL,
`--max-restarts 3`. Equal means: the students of both rounds and the losses of every step are those of the undisturbed run, bit for bit.
{equal} of {runs} are equal.

| run | rank | killed after s | after step | what was under way | resumed after step | equal |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Kill:
    """A run that was killed, as a row of the table."""

    number: int
    rank: int
    after_s: float
    step: int
    under_way: str
    resumed: str
    equal: bool

    def row(self) -> str:
        """Return the row."""
        cells = (
            self.number,
            self.rank,
            f"{self.after_s:.1f}",
            self.step,
            self.under_way,
            self.resumed,
            "yes" if self.equal else "**no**",
        )
        return "| " + " | ".join(map(str, cells)) + " |"


def under_way(folder: Path) -> str:
    """Return what a run is doing, as its folder shows."""
    if any(folder.glob("checkpoints/*.partial")):
        return "writing a checkpoint"
    step = steps_done(folder)
    if step >= 8 and not any(line["round"] for line in metrics(folder)):
        return "between the rounds"
    if step >= 16:
        return "the end of the run"
    return "a step, or a judgement"


def steps_done(folder: Path) -> int:
    """Return the steps that a run has written down."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def moment(kind: int, seconds: tuple[float, float], dice: random.Random, folder: Path) -> Callable[[], bool]:
    """Return what says that it is time to kill.

    Args:
        kind: 0 while a checkpoint is written, 1 between the rounds, 2 anywhere.
        seconds: from the first step to the last, in the undisturbed run, and all of it.
    """
    if kind == 0:
        number = dice.randint(1, 7)
        return lambda: any(folder.glob(f"checkpoints/step-{2 * number:08d}.partial"))
    if kind == 1:
        wait_s, begin = dice.uniform(0, seconds[1] / 8), []

        def between() -> bool:
            if steps_done(folder) >= 8:
                begin.append(time.monotonic())
            return bool(begin) and time.monotonic() - begin[0] >= wait_s

        return between
    wait_s, begin = dice.uniform(0, seconds[0]), []

    def anywhere() -> bool:
        if steps_done(folder):
            begin.append(time.monotonic())
        return bool(begin) and time.monotonic() - begin[0] >= wait_s

    return anywhere


def kill_when(run: Started, folder: Path, rank: int, is_time: Callable[[], bool]) -> tuple[int, str]:
    """Kill a rank when it is time; return the steps done by then and what was under way."""
    while not is_time():
        assert run.process.poll() is None, "the run ended before the moment came"
        time.sleep(0.002)
    step, what = steps_done(folder), under_way(folder)
    (pid,) = [pid for pid, its in processes_of(folder) if its == rank]
    os.kill(pid, signal.SIGKILL)
    return step, what


def one(
    number: int, inputs: Inputs, root: Path, whole: Path, seconds: tuple[float, float], dice: random.Random
) -> Kill:
    """Kill a run once, let it come to its end, and compare."""
    folder, rank = root / f"run-{number}", dice.randrange(4)
    is_time = moment(number % 3, seconds, dice, folder)
    run = start_run(inputs, folder, NO_FAULT, restarts=3)
    begin_s = time.monotonic()
    step, what = kill_when(run, folder, rank, is_time)
    after_s = time.monotonic() - begin_s
    outcome = finish(run, folder)
    found = re.findall(r"going on after step (\d+) of", outcome.out)
    equal = outcome.code == 0 and ends_alike(folder, whole) and losses(folder) == losses(whole)
    if not equal:
        print(outcome.out[-3000:], outcome.err[-3000:], file=sys.stderr)
    return Kill(number, rank, after_s, step, what, found[-1] if found else "the start", equal)


def main() -> int:
    """Run all, and write the table."""
    runs, seed = [int(each) for each in (*sys.argv[1:], *("30", "0")[len(sys.argv) - 1 :])]
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="reflux-kills-") as place:
        root = Path(place)
        inputs = make_inputs(root / "inputs")
        begin_s = time.monotonic()
        whole = undisturbed(inputs, root / "undisturbed")
        all_s = time.monotonic() - begin_s
        trained_s = sum(line["time/step_s"] for line in metrics(whole))
        print(
            f"undisturbed: {all_s:.0f} s; {runs} killed runs take about {runs * 2 * all_s / 60:.0f} minutes"
        )
        kills = []
        for number in range(runs):
            kills.append(one(number, inputs, root, whole, (trained_s, all_s), dice))
            print(kills[-1].row(), flush=True)
            text = HEAD.format(seed=seed, runs=len(kills), equal=sum(each.equal for each in kills))
            TABLE.write_text(text + "".join(each.row() + "\n" for each in kills), encoding="utf-8")
    return 0 if all(each.equal for each in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
