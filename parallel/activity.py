"""What the threads of this process are doing and whom they wait for, for a watch that asks from a thread of its own.

Decides: entering or leaving anything is a mark of progress; a rank is known to wait only where the code says so. What
is done between two marks should take less than the watch's patience. Work that cannot make marks (a download, a
library's own loop, a compiler) says `computes`: while it uses a processor, that counts as progress too. Costs two
clock readings an entry. Knows no texts but those it is given, and nothing of process groups.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

_OWN = ("launch", "distill", "parallel")
"""Packages whose lines are worth naming."""


class Doing:
    """Something that a thread is in, while the context lasts."""

    __slots__ = ("_activity", "_stack", "computes", "peers", "since_s", "thread", "waits", "what")

    def __init__(
        self,
        activity: Activity,
        what: object,
        *,
        waits: bool = False,
        peers: Sequence[int] = (),
        thread: str | None = None,
        computes: bool = False,
    ) -> None:
        self._activity, self.what, self.waits = activity, what, waits
        self.peers, self.thread, self.computes = peers, thread, computes

    def __enter__(self) -> None:
        self._stack = self._activity.stack()
        self.since_s = self._activity.last_mark_s = time.monotonic()
        self._stack.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.pop()
        self._activity.last_mark_s = time.monotonic()


@dataclass(frozen=True)
class Sight:
    """What a process was seen doing."""

    doing: str
    """From the outside in: `round 0, step 7, 1B3`; empty for nothing that has a name."""
    waits_for: str
    """What it waits for from other ranks; empty for a process that waits for none."""
    peers: tuple[int, ...]
    """The ranks it waits for, among them perhaps itself."""
    for_s: float
    """Seconds for which nothing has changed."""
    line: str
    """The line of the project's code that it is in."""


class Activity:
    """What this process is doing; one object a process, handed to whoever has something to say or wants to know.

    The thread that makes it is the main one: it is what a process is said to be doing.

    Args:
        asynchronous: work is only issued where the code stands (a GPU), so that any of it may hide a wait.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self._asynchronous = asynchronous
        self._main = threading.current_thread()
        self._stacks: dict[int, tuple[threading.Thread, list[Doing]]] = {}
        self.last_mark_s = time.monotonic()
        """When something was entered or left last, in `time.monotonic` seconds."""

    def doing(self, what: object, *, computes: bool = False) -> Doing:
        """Return the context of doing `what`, which is made a text only when somebody asks."""
        return Doing(self, what, computes=computes)

    def waiting(
        self, what: object, peers: Sequence[int] = (), *, thread: str | None = None, computes: bool = False
    ) -> Doing:
        """Return the context of waiting.

        Args:
            what: what comes from the others: `a broadcast over dp`.
            peers: world ranks that have to do something for it.
            thread: name of the thread of this process that is waited for instead.
            computes: that thread makes no marks, so what it computes counts.
        """
        return Doing(self, what, waits=True, peers=peers, thread=thread, computes=computes)

    def mark(self) -> None:
        """Note progress inside something long."""
        self.last_mark_s = time.monotonic()

    def stack(self) -> list[Doing]:
        """Return what the calling thread is in, from the outside in."""
        here = threading.get_ident()
        known = self._stacks.get(here)
        if known is None or not known[0].is_alive():
            known = self._stacks[here] = (threading.current_thread(), [])
        return known[1]

    @property
    def computes(self) -> bool:
        """Whether the main thread is in something that makes no marks of its own (or has no name), and does not wait."""
        main = self._of(self._main)
        return not main or (main[-1].computes if main[-1].waits else any(each.computes for each in main))

    def waited_s(self, now_s: float) -> float:
        """Return the seconds that the main thread has been waiting for; 0 where it is not known to wait."""
        main = self._of(self._main)
        if main and (main[-1].waits or (self._asynchronous and not self.computes)):
            return now_s - max(main[-1].since_s, self.last_mark_s)
        return 0.0

    def look(self) -> Sight:
        """Return what the main thread is doing, and on which thread if it waits for another of its own."""
        thread = self._main
        stack = self._of(thread)
        names = [str(each.what) for each in stack if not each.waits]
        if stack and stack[-1].thread is not None:
            others = [each for each, _ in list(self._stacks.values()) if each.name == stack[-1].thread]
            # Threads of the same name that have nothing to do are those of other objects.
            thread = max(others, key=lambda each: len(self._of(each)), default=thread)
            stack = self._of(thread)
            names += [str(each.what) for each in stack if not each.waits]
        inner = stack[-1] if stack else None
        waits = inner is not None and inner.waits and inner.thread is None
        return Sight(
            doing=", ".join(names),
            waits_for=str(inner.what) if waits else "",
            peers=tuple(inner.peers) if waits else (),
            for_s=time.monotonic() - (inner.since_s if inner else self.last_mark_s),
            line=_line(thread),
        )

    def _of(self, thread: threading.Thread) -> list[Doing]:
        """Return a copy of what another thread is in."""
        known = self._stacks.get(thread.ident or 0)
        return list(known[1]) if known is not None else []


def _line(thread: threading.Thread) -> str:
    """Return where a thread is in the project's own code: `distill.train:120 _train`."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _OWN and module != __name__:
            return f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
