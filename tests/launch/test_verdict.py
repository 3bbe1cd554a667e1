"""The words about ranks that do not get further."""

from __future__ import annotations

from launch.verdict import SHOWN, Report, gone_message, hang_message
from parallel.activity import Sight

STUCK = Sight("step 7, 1B3", "", (), 61.2, "distill.step:200 _backward")
WAITS = Sight("step 7, 0RECV_B3", "a message from stage 1", (2,), 60.9, "parallel.pipeline.p2p:300 _receive")


def _reports(*sights: Sight | None, dead: tuple[int, ...] = ()) -> dict[int, Report]:
    return {rank: Report(f"rank {rank}", sight, rank not in dead) for rank, sight in enumerate(sights)}


def test_who_is_stuck_comes_first_and_then_who_waits() -> None:
    assert hang_message(_reports(WAITS, STUCK), 57.4, 60.0).splitlines() == [
        "no rank has got further for 57 s (train.timeout_s=60), so the run is ended",
        "  rank 1 is stuck in step 7, 1B3 for 61 s, at distill.step:200 _backward",
        "  rank 0 waits for a message from stage 1 (rank 2): step 7, 0RECV_B3, 61 s",
    ]


def test_who_has_not_come_or_gives_no_sign_of_life_is_to_blame() -> None:
    lines = hang_message(_reports(WAITS, None, WAITS, dead=(1, 2)), 4, 5).splitlines()
    assert lines[1].startswith("  rank 1 has not come: ")
    assert lines[2] == "  rank 2 gives no sign of life; it was last seen in step 7, 0RECV_B3"
    assert lines[3].startswith("  rank 0 waits for ") and len(lines) == 4


def test_nobody_is_to_blame_when_all_wait() -> None:
    first = hang_message(_reports(WAITS, WAITS), 57, 60).splitlines()[0]
    assert first.endswith("so the run is ended; they wait for one another")


def test_a_thousand_ranks_are_a_few_lines() -> None:
    many = Sight("step 7", "an all-reduce over all ranks", tuple(range(1000)), 60, "")
    lines = hang_message(_reports(STUCK, *[many] * 999), 57, 60).splitlines()
    assert len(lines) == 2 + SHOWN + 1 and lines[-1] == f"  and {999 - SHOWN} more ranks wait"
    assert max(map(len, lines)) < 150


def test_who_is_gone_is_told_with_what_it_was_doing() -> None:
    assert gone_message(_reports(WAITS, STUCK)) is None
    assert gone_message(_reports(WAITS, STUCK, dead=(1,))).splitlines() == [
        "rank 1 is gone without a word, as one that was killed; it was last seen in step 7, 1B3",
        "  rank 0 waits for a message from stage 1 (rank 2): step 7, 0RECV_B3, 61 s",
    ]
