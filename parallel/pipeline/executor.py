"""Walk one rank's actions through a table of handlers, and note when each ran.

The executor decides nothing: the order is the plan's, the meaning is the handlers'. `REDUCE`, `NORM` and `GATHER` run beside
the list on one background thread, in their order. `STEP` waits for the first two, the student's next forward for the last,
if need be in the next run: what stands between hides them. So they need process groups of their own. A kind without a
handler is an error before the first action runs. An exception is passed on with the rank and the action in its message,
because the peers will only report that they waited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

from parallel.background import Background
from parallel.pipeline.actions import Action, Kind, Plan
from parallel.pipeline.lanes import Lane, lane_of, lanes_of
from parallel.pipeline.lower import acknowledgements, count_received, requirements
from parallel.pipeline.p2p import Links
from parallel.pipeline.simulate import Event

Handler = Callable[[Action], None]
T = TypeVar("T")
_REDUCTIONS = "reductions"
_Done = tuple[Action, Any, Any]
"""An action and the marks of its start and its end."""


class _Entry(NamedTuple):
    """An action, and what running it takes."""

    action: Action
    handler: Handler
    lane: Lane
    needs: tuple[Action, ...]


_Prepared = tuple[list[_Entry], dict[Action, Counter[Kind]], Counter[Kind]]
"""A rank's entries, and what its receives and the whole list tell about its own messages."""


class ActionFailed(RuntimeError):
    """A handler raised; the message names the rank's place, the action and the cause."""

    def __init__(self, message: str, action: Action | None = None) -> None:
        super().__init__(message)
        self.action = action


class Executor:
    """Runs plans on one rank.

    Args:
        handlers: what to do for each kind but the communication; micro-batches are numbered over the whole run.
        links: this rank's channels; their handlers join the table.
        rank: pipeline rank.
        place: words for messages, such as `rank 3 (pp 1, dp 0, tp 1)`.
        in_order: run every action on one lane, for handlers that look at what actions they do not depend on have made.
    """

    def __init__(
        self,
        handlers: Mapping[Kind, Handler],
        links: Links,
        *,
        rank: int,
        place: str,
        in_order: bool = False,
    ) -> None:
        self._handlers = {**links.handlers(), **handlers}
        self._links, self._rank, self._place = links, rank, place
        self._in_order = in_order
        self._background = Background(_REDUCTIONS)
        self._lanes = lanes_of(links.mesh.device)
        self._prepared: tuple[Plan | None, _Prepared] = None, ([], {}, Counter())
        self._gathers: list[Future[_Done]] = []
        """What may still be under way after a run that carries it."""

    def run(self, plan: Plan, *, first_microbatch: int, carries: bool = False) -> list[Event]:
        """Run this rank's part of a plan and return one event for each action, in order of their ends.

        Args:
            plan: validated and lowered.
            first_microbatch: number in the run of the plan's micro-batch 0; handlers see it added.
            carries: leave `GATHER` under way at the end. The next run waits for it before its first `F`; before
                anything else looks at parameters, `settle` must be called.
        Returns:
            Events with the plan's numbers and `time.perf_counter` seconds; a receive's is the time spent waiting. A
                `GATHER` that was carried is an event of the run that waited for it.
        Raises:
            ValueError: a kind has no handler.
            ActionFailed: from a handler's exception.
        """
        entries, told, received = self._prepare(plan)
        numbered = [_numbered(entry.action, first_microbatch) for entry in entries]
        self._lanes.begin()
        self._links.announce(
            numbered,
            {_numbered(action, first_microbatch): counts for action, counts in told.items()},
            received,
        )
        done: list[_Done] = []
        reductions: list[Future[_Done]] = []
        for entry, its_number in zip(entries, numbered, strict=True):
            kind = entry.action.kind
            if entry.lane is Lane.REDUCTIONS:
                under_way = self._gathers if kind is Kind.GATHER else reductions
                # What it needs is on this lane by now, or beside before it; it may begin after this list has ended.
                with self._lanes.on(Lane.STUDENT):
                    under_way.append(self.beside(partial(self._do, entry, its_number)))
                continue
            if kind is Kind.STEP:
                done += self._results(reductions)
            elif kind is Kind.F:
                done += self._gathered(Lane.STUDENT)
            done.append(self._do(entry, its_number))
        done += self._results(reductions)
        if not carries:
            done += self._gathered(None)
        if not plan.ahead():
            self._links.finish()
        self._lanes.end(but=Lane.REDUCTIONS if self._gathers else None)
        starts_s = self._lanes.seconds(start for _, start, _ in done)
        ends_s = self._lanes.seconds(end for _, _, end in done)
        return [
            Event(self._rank, action, start_s, end_s)
            for (action, _, _), start_s, end_s in zip(done, starts_s, ends_s, strict=True)
        ]

    def beside(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the background thread, after what was given to it before and what has been issued here."""
        place = self._lanes.here()

        def run() -> T:
            with self._lanes.on(Lane.REDUCTIONS):
                self._lanes.wait_until(Lane.REDUCTIONS, place)
                return work()

        return self._background.submit(run)

    def result(self, work: Future[T], what: str) -> T:
        """Return what `beside` has been given to do comes to; the watch is told that this waits.

        Args:
            what: words for it.
        """
        if work.done():
            return work.result()
        with self._links.mesh.activity.waiting(what, thread=_REDUCTIONS):
            return work.result()

    def settle(self) -> None:
        """Wait for what a run has carried: what follows sees the parameters of all replicas."""
        self._gathered(None)

    def _gathered(self, lane: Lane | None) -> list[_Done]:
        """Wait for gathers under way, and let what follows on a lane, or outside all (None), wait for them."""
        done = self._results(self._gathers)
        for _, _, end in done:
            self._lanes.wait_until(lane, end)
        return done

    def _results(self, under_way: list[Future[_Done]]) -> list[_Done]:
        """Wait for all, and forget them."""
        if not under_way:
            return []
        with self._links.mesh.activity.waiting("its reductions", thread=_REDUCTIONS):
            done = [future.result() for future in under_way]
        under_way.clear()
        return done

    def close(self) -> None:
        """End the background thread."""
        self._background.close()

    def _prepare(self, plan: Plan) -> _Prepared:
        """Look up what each action of the rank's list needs; a plan that repeats itself is looked up once."""
        if plan is not self._prepared[0]:
            actions = plan.ranks[self._rank]
            unknown = {action.kind for action in actions} - self._handlers.keys()
            if unknown:
                raise ValueError(f"no handler for {', '.join(sorted(unknown))}")
            entries = [
                _Entry(
                    action,
                    self._handlers[action.kind],
                    Lane.STUDENT if self._in_order else lane_of(action.kind),
                    requirements(action, plan.shape, lowered=True),
                )
                for action in actions
            ]
            told = acknowledgements(plan, self._rank)
            self._prepared = plan, (entries, told, count_received(plan, self._rank))
        return self._prepared[1]

    def _do(self, entry: _Entry, its_number: Action) -> _Done:
        action, handler, lane, needs = entry
        with self._lanes.on(lane), self._links.mesh.activity.doing(action):
            self._lanes.wait_for(lane, needs)
            start = self._lanes.mark()
            try:
                handler(its_number)
            except Exception as error:
                raise ActionFailed(
                    f"{self._place} failed at {action}: {type(error).__name__}: {error}", action
                ) from error
            end = self._lanes.mark()
            self._lanes.done(action, lane)
        return action, start, end


def _numbered(action: Action, first_microbatch: int) -> Action:
    if action.microbatch is None:
        return action
    return action._replace(microbatch=action.microbatch + first_microbatch)
