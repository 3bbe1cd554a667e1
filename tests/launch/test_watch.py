"""The watch, with threads for ranks: who is told to be stuck, gone or wrong, once, and that all leave."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import pytest

from distill.config import ConfigError
from distill.failures import RunFailed
from launch import watch
from launch.board import Board
from launch.watch import Watch
from parallel.activity import Activity
from tests.launch.shared_store import SharedStore
from tests.pace import slowness

# Leaving is an exception here.
pytestmark = [
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
TIMEOUT_S = 0.4 * slowness()
BEAT_S = TIMEOUT_S / 4
Work = Callable[[Activity, Watch], None]


class Run:
    """Ranks that run, and how each of them left."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.codes: dict[str, int] = {}
        """Exit code of each rank that left against its will, by the name of its thread."""
        self.saved: list[int] = []
        self.timers: list[float] = []
        self.store = SharedStore()

    def leave(self, code: int) -> None:
        """Stand in for `os._exit`, which ends all threads of a rank; here the one that calls it."""
        self.codes.setdefault(threading.current_thread().name, code)
        raise SystemExit

    def __call__(self, *works: Work, num_ranks: int | None = None) -> None:
        """Let each rank work; a rank that waits is a thread that hangs, and is left behind."""
        places = [f"rank {rank}" for rank in range(num_ranks or len(works))]
        threads = [
            threading.Thread(target=self._rank, args=(rank, places, work), name=f"main {rank}", daemon=True)
            for rank, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + 30 * TIMEOUT_S
        while time.monotonic() < deadline_s and len(self.left) < len(works):
            time.sleep(0.01)
        assert sorted(self.left) == list(range(len(works))), "every rank must end"

    @property
    def left(self) -> set[int]:
        """Ranks that have ended, by themselves or not."""
        return {int(name.split()[1]) for name in self.codes}

    def _rank(self, rank: int, places: list[str], work: Work) -> None:
        activity = Activity()
        its = Watch(
            Board(self.store, places, rank=rank),
            activity,
            timeout_s=self.timeout_s,
            save_buffers=lambda: self.saved.append(rank),
            leave=self.leave,
            arm=self.timers.append,
        )
        its._thread.name = f"watch {rank}"
        work(activity, its)
        its.close()
        self.codes[f"main {rank}"] = 0


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_S", BEAT_S)
    for name in ("SIGNS_S", "SPEAKS_S", "FAREWELL_S"):
        monkeypatch.setattr(watch, name, TIMEOUT_S)


@pytest.fixture
def run(short: None) -> Run:
    """Return ranks that are told to be stuck after `TIMEOUT_S`."""
    return Run(TIMEOUT_S)


@pytest.fixture
def patient_run(short: None) -> Run:
    """Return ranks that wait longer for one another than any test here takes."""
    return Run(100 * TIMEOUT_S)


def waits(activity: Activity, its: Watch) -> None:
    with activity.doing("step 7"), activity.waiting("a message from stage 1", (1,)):
        time.sleep(60 * TIMEOUT_S)


def stuck(activity: Activity, its: Watch) -> None:
    with activity.doing("step 7"), activity.doing("1B3"):
        time.sleep(60 * TIMEOUT_S)


def test_a_run_that_was_suspended_goes_on(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock has gone on meanwhile, on all ranks, and nobody has done anything."""
    real, jump = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump[0])

    def waits_in_a_job_that_is_suspended(activity: Activity, its: Watch) -> None:
        with activity.doing("step 7"), activity.waiting("a message from stage 1", (1,)):
            time.sleep(2 * TIMEOUT_S)
            jump[0] = 20 * TIMEOUT_S
            time.sleep(2 * TIMEOUT_S)

    def works(activity: Activity, its: Watch) -> None:
        with activity.doing("step 7"), activity.doing("1B3"):
            time.sleep(4 * TIMEOUT_S)

    run = Run(4 * TIMEOUT_S)
    run(waits_in_a_job_that_is_suspended, works)
    assert run.codes == {"main 0": 0, "main 1": 0}


def test_a_hang_is_told_once_and_all_leave(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    start_s = time.monotonic()
    run(waits, stuck, waits)
    assert time.monotonic() - start_s > 0.75 * TIMEOUT_S
    assert set(run.codes.values()) == {1} and sorted(run.saved) == [0, 1, 2]
    assert set(run.timers) == {TIMEOUT_S + watch.STUCK_S}, "against an interpreter that does not run any more"
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"no rank has got further for \d+ s \(train.timeout_s={TIMEOUT_S:g}\), so the run is ended", lines[0]
    )
    assert lines[1].startswith("  rank 1 is stuck in step 7, 1B3 for ")
    assert [line.split(" waits ")[0] for line in lines[2:]] == ["  rank 0", "  rank 2"]


def test_who_gets_further_may_take_as_long_as_it_likes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    done = threading.Event()

    def long(activity: Activity, its: Watch) -> None:
        with activity.doing("judging"):
            for _ in range(40):
                time.sleep(TIMEOUT_S / 10)
                activity.mark()
        done.set()

    def patient(activity: Activity, its: Watch) -> None:
        with activity.waiting("a broadcast over all ranks", (0, 1)):
            assert done.wait(60 * TIMEOUT_S)

    run(long, patient)
    assert run.codes == {"main 0": 0, "main 1": 0} and capsys.readouterr().err == ""


@pytest.mark.parametrize("computes", [True, False])
def test_what_makes_no_marks_may_compute_but_not_sleep(
    computes: bool, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The ranks here share a process, and with it the processor's time.
    monkeypatch.setattr(watch, "_computed_s", lambda: time.monotonic() if computes else 0.0)
    done = threading.Event()

    def library(activity: Activity, its: Watch) -> None:
        with activity.doing("pruning", computes=True):
            time.sleep(4 * TIMEOUT_S)
        done.set()

    def patient(activity: Activity, its: Watch) -> None:
        with activity.waiting("a broadcast over all ranks", (0, 1)):
            done.wait(60 * TIMEOUT_S)

    run(library, patient)
    assert ("rank 0 is stuck in pruning" in capsys.readouterr().err) is not computes


def failing(error: Exception) -> Work:
    return lambda activity, its: its.end_by_failure(error)


def test_who_fails_tells_why_and_the_others_say_nothing(
    patient_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    patient_run(waits, failing(ValueError("the disk is on fire")), waits)
    err = capsys.readouterr().err
    assert err.startswith("rank 1 failed:\n") and err.endswith("ValueError: the disk is on fire\n")
    assert set(patient_run.codes.values()) == {1} and patient_run.saved.count(0) == 1


def test_what_ends_all_ranks_alike_is_one_line(patient_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    patient_run(*[failing(RunFailed("10 steps in a row are not finite"))] * 3)
    assert capsys.readouterr().err == "failed: 10 steps in a row are not finite\n"
    assert set(patient_run.codes.values()) == {1}


def test_a_broken_connection_is_blamed_on_the_rank_that_is_gone(
    patient_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(activity: Activity, its: Watch) -> None:
        with activity.doing("step 7"), activity.doing("1B3"):
            time.sleep(2 * BEAT_S)
            its._closed.set()
            time.sleep(2 * BEAT_S)
        patient_run.codes["main 1"] = -9

    def victim(activity: Activity, its: Watch) -> None:
        time.sleep(4 * BEAT_S)
        its.end_by_failure(RuntimeError("Connection closed by peer [10.0.0.1]:1234"))

    patient_run(victim, killed, waits)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("rank 1 is gone without a word") and lines[0].endswith("in step 7, 1B3")
    assert lines[1].startswith("  rank 2 waits for ") and len(lines) == 2
    assert patient_run.codes["main 0"] == 1


def test_the_victim_lets_the_culprit_speak(patient_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def culprit(activity: Activity, its: Watch) -> None:
        time.sleep(TIMEOUT_S / 2)
        its.end_by_failure(ValueError("the disk is on fire"))

    patient_run(failing(RuntimeError("Connection reset by peer")), culprit)
    err = capsys.readouterr().err
    assert err.count("failed:") == 1 and err.endswith("ValueError: the disk is on fire\n")


def test_a_connection_that_breaks_by_itself_is_told_as_it_is(
    patient_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    patient_run(failing(RuntimeError("Connection reset by peer")), waits)
    assert capsys.readouterr().err.endswith("RuntimeError: Connection reset by peer\n")


def test_a_mistake_is_told_by_the_first_rank_if_it_sees_it(
    patient_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(activity: Activity, its: Watch) -> None:
        rank = int(threading.current_thread().name.split()[1])
        time.sleep(0.1 * TIMEOUT_S if rank == 0 else 0)
        its.end_by_mistake(ConfigError(f"data.path, as rank {rank} sees it"), speaks_first=rank == 0)

    patient_run(mistaken, mistaken)
    assert capsys.readouterr().err == "error: data.path, as rank 0 sees it\n"
    assert set(patient_run.codes.values()) == {2}


def test_a_rank_that_never_comes_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(waits, waits, num_ranks=3)
    assert "  rank 2 has not come: " in capsys.readouterr().err


def test_without_the_store_nobody_stays(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def lonely(activity: Activity, its: Watch) -> None:
        with activity.doing("step 7"):
            time.sleep(TIMEOUT_S)
            run.store.is_lost = True
            time.sleep(60 * TIMEOUT_S)

    run(lonely)
    assert capsys.readouterr().err.startswith("rank 0 has lost the store by which the ranks met")
    assert run.codes == {"watch 0": 1}


def test_the_time_of_work_is_counted_and_not_that_of_who_asks() -> None:
    def burn(seconds: float) -> None:
        end_s = time.thread_time() + seconds
        while time.thread_time() < end_s:
            pass

    before_s = watch._computed_s()
    burn(0.1)
    # On Linux the caller's own share is left out, elsewhere too.
    assert watch._computed_s() - before_s < 0.05
    # It counts while the thread lives.
    release = threading.Event()
    done = threading.Event()

    def work() -> None:
        burn(0.2)
        done.set()
        release.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert done.wait(60 * slowness())
    assert watch._computed_s() - before_s >= 0.15
    release.set()
    thread.join()
