"""Faults, each provoked in a run of four processes (pp 2 x dp 2, two rounds, tiny models), and what comes of it.

To add one: a function that returns an `Outcome`, and its entry in `FAULTS`. `docs/faults/run.py` makes a table of them,
`test_faults.py` holds them to what is promised.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from parallel.checkpoint import complete_checkpoints
from tests.commands.tiny_run import Inputs, Started, same_weights
from tests.pace import slowness

TIMEOUT_S = round(20.0 * slowness())
"""`train.timeout_s` of the runs; longer on a machine that is slow right now, for processes that start apart wait as well."""
LATER_S = 20.0
"""By how much later than that all may be gone."""
LAUNCHER, PLAIN = "launch.torchrun", "torch.distributed.run"
ROUNDS = "rounds=[{},{student: {prune: {intermediate_size: 24}}}]"
_TOLD = r"warning: |passed over |.*step \d+ changes nothing: "
"""Lines on stdout by which a run tells what went wrong."""
NO_FAULT = {"what": "", "where": "log", "rank": -1}


@dataclass(frozen=True)
class Outcome:
    """How a run with a fault ended."""

    code: int
    err: str
    """stderr without progress bars."""
    out: str
    gone_s: float | None
    """Seconds from the fault until every process of the run was gone; None where there is no such moment."""
    left: int
    """Processes of the run that were still there when the launcher had ended."""
    kept: str
    """The newest checkpoint, or what there is in its place."""
    folder: Path

    @property
    def message(self) -> list[str]:
        """The lines on stderr that are no progress bar, no trace and no warning of a library, and the run's own warnings."""
        words = r" *rank \d|no rank|failed:|error:|all ranks|stopping|warning: "
        told = [line for line in self.err.splitlines() if re.match(words, line)]
        return told + [line for line in self.out.splitlines() if re.match(_TOLD, line)]


def settings(inputs: Inputs, folder: Path, *overrides: str) -> list[str]:
    """Return the command line of every run here."""
    return inputs.settings(
        folder,
        "mesh.pp=2",
        "train.steps=8",
        "train.global_batch_size=8",
        "checkpoint.every=2",
        "evaluate.every=5",
        f"train.timeout_s={TIMEOUT_S}",
        ROUNDS,
        *overrides,
    )


def start_run(
    inputs: Inputs,
    folder: Path,
    fault: dict[str, Any],
    *overrides: str,
    restarts: int = 0,
    launcher: str = LAUNCHER,
) -> Started:
    """Start a run with a fault in it, as a user starts one."""
    torchrun = ["-m", launcher, "--nproc-per-node", "4", "--max-restarts", str(restarts)]
    os.environ["REFLUX_FAULT_MARK"] = str(mark_of(folder))
    module = ["-m", "tests.commands.faulty_distill", json.dumps(fault)]
    return Started([*torchrun, *module, *settings(inputs, folder, *overrides)])


def mark_of(folder: Path) -> Path:
    """Return the file that gets the time of the fault."""
    return folder.parent / f"{folder.name}.fault"


def finish(run: Started, folder: Path, *, since_s: float | None = None) -> Outcome:
    """Wait for the end of a run.

    Args:
        since_s: time of the fault, where the run does not note it itself.
    """
    done = run.end(timeout_s=600)
    end_s = time.time()
    mark = mark_of(folder)
    if since_s is None and mark.exists():
        since_s = float(mark.read_text())
    saved = [path.name for path in complete_checkpoints(folder / "checkpoints")]
    kept = (
        "the finished run" if (folder / "student").is_dir() else saved[-1] if saved else "no checkpoint yet"
    )
    gone_s = None if since_s is None else end_s - since_s
    return Outcome(done.code, done.err, done.out, gone_s, len(processes_of(folder)), kept, folder)


def processes_of(folder: Path) -> list[tuple[int, int | None]]:
    """Return process id and rank of what runs in a folder; the launcher has no rank."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run.dir={folder}".encode() in arguments:
            ranks = [int(each[5:]) for each in environment if each.startswith(b"RANK=")]
            found.append((int(process.name), ranks[0] if ranks else None))
    return found


def provoke(inputs: Inputs, folder: Path, fault: dict[str, Any], *overrides: str, **how: Any) -> Outcome:
    """Run with a fault to its end."""
    return finish(start_run(inputs, folder, fault, *overrides, **how), folder)


def signalled(inputs: Inputs, folder: Path, number: signal.Signals) -> Outcome:
    """Send a signal to the launcher, as a batch system does, or to the whole job, as a terminal does."""
    run = start_run(inputs, folder, NO_FAULT)
    run.until("step  3/")
    since_s = time.time()
    if number == signal.SIGINT:
        run.ctrl_c()
    else:
        run.process.send_signal(number)
    return finish(run, folder, since_s=since_s)


def damaged(inputs: Inputs, folder: Path, harm: Callable[[Path], object]) -> Outcome:
    """Harm the newest checkpoint of a run that was killed, and go on with it."""
    # Late, so that there are two.
    killed = provoke(inputs, folder, in_action("kill") | {"step": 8})
    assert killed.kept.startswith("step-"), killed.err
    (file,) = (folder / "checkpoints" / killed.kept).glob("stage-001-tp-00.safetensors")
    harm(file)
    mark_of(folder).unlink()
    return provoke(inputs, folder, NO_FAULT)


def cut_short(file: Path) -> None:
    """Take the last bytes of a file away, as a machine does that loses its power."""
    os.truncate(file, file.stat().st_size - 100)


def flip(file: Path) -> None:
    """Change a bit in the middle of a file's tensors."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


def own_corpus(inputs: Inputs, folder: Path, *lines: str) -> Path:
    """Return a copy of the corpus for one run, with more lines."""
    corpus = folder.parent / f"{folder.name}.jsonl"
    corpus.write_text(inputs.corpus.read_text() + "".join(line + "\n" for line in lines))
    return corpus


def vanishing(inputs: Inputs, folder: Path) -> Outcome:
    """Take the corpus away in the middle of a run."""
    corpus = own_corpus(inputs, folder)
    return provoke(inputs, folder, at("log", "vanish", 0, 3) | {"path": str(corpus)}, f"data.path={corpus}")


def broken_record(inputs: Inputs, folder: Path) -> Outcome:
    """Give a corpus with a line that is no JSON."""
    corpus = own_corpus(inputs, folder, '{"text": "half of a rec')
    return provoke(inputs, folder, NO_FAULT, f"data.path={corpus}", restarts=3)


def without_wandb(inputs: Inputs, folder: Path) -> Outcome:
    """Log to a wandb server that does not answer."""
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    with mock.patch.dict(os.environ, server):
        return provoke(inputs, folder, NO_FAULT, "log.wandb=online")


def mistaken(inputs: Inputs, folder: Path) -> Outcome:
    """Ask for what only the models show to be impossible, with restarts allowed."""
    return provoke(inputs, folder, NO_FAULT, "student.prune.num_layers=99", restarts=3)


def in_action(what: str, **more: Any) -> dict[str, Any]:
    """Return a fault in the middle of a step's backward, on the last stage."""
    return {"what": what, "where": "action", "rank": 2, "step": 5, "action": "1B1", **more}


def nan_in(steps: list[int]) -> dict[str, Any]:
    """Return a teacher that gives NaN in these steps of each round, on one replica."""
    return {"what": "nan", "where": "action", "rank": 3, "steps": steps}


def at(where: str, what: str, rank: int, call: int = 1) -> dict[str, Any]:
    """Return a fault at the n-th call of a place."""
    return {"what": what, "where": where, "rank": rank, "call": call}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and what is promised."""

    name: str
    words: str
    """For the table."""
    run: Callable[[Inputs, Path], Outcome]
    code: int
    says: str
    """Regular expression that a line of the message matches; empty where nothing is to be said."""
    lines: int | None = None
    """Of the message; None where that is not promised."""
    killed_after_s: float = 0.0
    """How long the launcher lets a process be that does not heed SIGTERM."""


def _fault(fault: dict[str, Any], *overrides: str, **how: Any) -> Callable[[Inputs, Path], Outcome]:
    return lambda inputs, folder: provoke(inputs, folder, fault, *overrides, **how)


STUCK = r"  rank {} \(pp {}, dp {}, tp 0\) is stuck in .*{}"
FAULTS = (
    Fault(
        "raise",
        "an exception in one action of one rank",
        _fault(in_action("raise")),
        1,
        r"rank 2 \(pp 1, dp 0, tp 0\) failed:",
    ),
    Fault(
        "kill",
        "`kill -9` of a rank in the middle of a step",
        _fault(in_action("kill")),
        1,
        r"rank 2 .* is gone without a word, as one that was killed; it was last seen in ",
    ),
    Fault(
        "kill-restart",
        "the same with `--max-restarts 1`",
        _fault(in_action("kill"), restarts=1),
        0,
        r"all ranks start again, 1 of at most 1 times",
    ),
    Fault(
        "kill-plain",
        "the same under plain `torchrun --max-restarts 1`",
        _fault(in_action("kill"), restarts=1, launcher=PLAIN),
        0,
        r"rank 2 .* is gone without a word, as one that was killed; it was last seen in ",
    ),
    Fault(
        "kill-save",
        "`kill -9` of the rank that writes, during a save, `--max-restarts 1`",
        _fault(at("save", "kill", 0, 2), restarts=1),
        0,
        r"all ranks start again",
    ),
    Fault(
        "kill-rounds",
        "`kill -9` of a rank between two rounds, `--max-restarts 1`",
        _fault(at("export", "kill", 3), restarts=1),
        0,
        r"all ranks start again",
    ),
    Fault(
        "hang",
        "a rank that sleeps for ever in an action",
        _fault(in_action("hang")),
        1,
        STUCK.format(2, 1, 0, "step 5, 1B1"),
        lines=5,
    ),
    Fault(
        "hang-plain",
        "the same under plain `torchrun`",
        _fault(in_action("hang"), launcher=PLAIN),
        1,
        STUCK.format(2, 1, 0, "step 5, 1B1"),
    ),
    Fault(
        "hang-evaluate",
        "a rank that sleeps for ever in an evaluation",
        _fault(at("evaluate", "hang", 1, 3)),
        1,
        STUCK.format(1, 0, 1, "judging the student after step "),
        lines=5,
    ),
    Fault(
        "hang-prune",
        "a rank that sleeps for ever before it prunes",
        _fault(at("prune", "hang", 0)),
        1,
        STUCK.format(0, 0, 0, "loading, pruning"),
        lines=5,
    ),
    Fault(
        "hang-load",
        "a rank that sleeps for ever while it loads",
        _fault(at("load", "hang", 3)),
        1,
        STUCK.format(3, 1, 1, "loading"),
        lines=5,
    ),
    Fault(
        "hang-save",
        "a disk that never answers the rank that writes",
        _fault(at("save", "hang", 2, 2)),
        1,
        STUCK.format(2, 1, 0, ""),
    ),
    Fault(
        "hang-start",
        "a process that never comes",
        _fault(at("start", "hang", 1)),
        1,
        r"failed: rank 1 .* has not come within",
        lines=1,
    ),
    Fault(
        "freeze",
        "a process that is frozen (SIGSTOP), as on a machine that is gone",
        _fault(in_action("freeze")),
        1,
        r"  rank 2 .* gives no sign of life; it was last seen in ",
        killed_after_s=30.0,
    ),
    Fault(
        "full-disk",
        "a disk that is full, on one rank, while a checkpoint is written",
        _fault(at("save", "full", 2, 2)),
        0,
        r"warning: the checkpoint of step 4 could not be written: rank 2 .*No space left on device",
        lines=1,
    ),
    Fault(
        "cut-short",
        "the newest checkpoint was cut short; the run is started again",
        partial(damaged, harm=cut_short),
        0,
        r"passed over step-0000000\d: .* bytes, its checkpoint says .* set aside as step-0000000\d.damaged",
        lines=1,
    ),
    Fault(
        "flipped-bit",
        "a bit of the newest checkpoint has changed; the run is started again",
        partial(damaged, harm=flip),
        0,
        r"passed over step-0000000\d: .* set aside as step-0000000\d.damaged",
        lines=1,
    ),
    Fault(
        "data-gone",
        "the corpus disappears in the first round (whose rows are read by then)",
        vanishing,
        2,
        r"error: data.path=.*\.jsonl does not exist",
        lines=1,
    ),
    Fault(
        "data-broken",
        "a record of the corpus is broken, `--max-restarts 3`",
        broken_record,
        2,
        r"error: .*\.jsonl, line 41",
        lines=1,
    ),
    Fault(
        "wandb",
        "wandb is not reachable",
        without_wandb,
        0,
        r"warning: log.wandb=online did not start .* it goes on offline",
        lines=1,
    ),
    Fault(
        "nan",
        "a teacher that is NaN in two steps, on one replica",
        _fault(nan_in([3, 4])),
        0,
        r"(round \d: )?step 3 changes nothing: ",
        lines=4,
    ),
    Fault(
        "nan-always",
        "a teacher that is NaN from step 4 on, `train.max_skipped_steps=3`",
        _fault(nan_in(list(range(4, 99))), "train.max_skipped_steps=3"),
        1,
        r"failed: 3 steps in a row up to step 6 .* the checkpoint of step 2 is kept",
        lines=4,
    ),
    Fault("sigterm", "SIGTERM to the launcher", partial(signalled, number=signal.SIGTERM), 0, ""),
    Fault("ctrl-c", "Ctrl-C", partial(signalled, number=signal.SIGINT), 0, "stopping after the step"),
    Fault(
        "mistake",
        "a user's mistake, `--max-restarts 3`",
        mistaken,
        2,
        r"error: student.prune.num_layers=99",
        lines=1,
    ),
)


def wrong(fault: Fault, outcome: Outcome) -> str | None:
    """Return in what a fault's outcome is not as promised; None where it is."""
    message = outcome.message
    if outcome.code != fault.code:
        return f"exit code {outcome.code}, not {fault.code}"
    if fault.says and not any(re.match(fault.says, line) for line in message):
        return f"no line is like {fault.says!r}: {message}"
    if fault.lines is not None and len(message) != fault.lines:
        return f"{len(message)} lines, not {fault.lines}: {message}"
    limit_s = TIMEOUT_S + LATER_S * slowness() + fault.killed_after_s
    if outcome.code and outcome.gone_s is not None and outcome.gone_s > limit_s:
        return f"gone after {outcome.gone_s:.0f} s"
    return f"{outcome.left} processes are left" if outcome.left else None


def undisturbed(inputs: Inputs, folder: Path) -> Path:
    """Run without a fault; return its folder."""
    outcome = provoke(inputs, folder, NO_FAULT)
    assert outcome.code == 0, outcome.err
    return folder


def ends_alike(folder: Path, other: Path) -> bool:
    """Whether two finished runs have the same students in every round, bit for bit."""
    return all(same_weights(folder / name, other / name) for name in ("round-0", "student"))
