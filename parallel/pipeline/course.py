"""Which plans to run for which optimizer step, from the first to the last.

Decides: a plan with look-ahead is entered by its prologue (the teacher alone makes the look-ahead) and left by steps that
drain it: at the end of the data, and before another plan takes its place. Every plan is lowered and proven before it is
handed out. Pure Python; all ranks that hold the same plans and ask for the same steps get the same lists.
"""

from __future__ import annotations

from parallel.pipeline.actions import Action, Plan
from parallel.pipeline.fill import prologue, truncate
from parallel.pipeline.lower import add_communication
from parallel.pipeline.validate import check_deadlock, validate


class Course:
    """Hands out the plans of a run, step by step; after a resume it begins at any step.

    Args:
        plan: without messages: a step that repeats itself.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, plan: Plan, *, num_steps: int) -> None:
        self.plan, self.num_steps = plan, num_steps
        self._proven: dict[tuple[str, int], Plan] = {}
        self._following: Plan | None = None
        self._end = num_steps
        """The step at which the plan in force has drained."""
        self._expected: int | None = None
        """The step that the look-ahead was made for; None when there is none."""

    def change(self, plan: Plan) -> None:
        """Let another plan take over: at once when nothing is looked ahead, else after the steps that drain it."""
        self._following = plan
        if self._expected is not None:
            self._end = min(self._end, self._expected + look_ahead_steps(self.plan))

    def of(self, step: int) -> list[tuple[Plan, int]]:
        """Return the plans of an optimizer step with the number of their first micro-batch, lowered and proven.

        Raises:
            ValueError: the step is over the end, or not the one that the look-ahead was made for.
            PlanError: a plan cannot run.
        """
        if step >= self.num_steps or self._expected not in (None, step):
            raise ValueError(f"step {step} of {self.num_steps}; the teacher is ahead for {self._expected}")
        if self._expected is None and self._following is not None:
            self.plan, self._following, self._end = self._following, None, self.num_steps
            self._proven.clear()
        left = self._end - step
        first = step * self.plan.shape.num_microbatches
        runs = []
        if self.plan.carried and self._expected is None:
            runs.append((self._prologue(left), first - self.plan.shape.num_microbatches))
        cycle = self._cycle(left)
        self._expected = step + 1 if cycle.ahead() else None
        return [*runs, (cycle, first)]

    def _cycle(self, left: int) -> Plan:
        """One step without the teacher's work for micro-batches that will not come."""
        left = min(left, look_ahead_steps(self.plan) + 1)
        if ("cycle", left) not in self._proven:
            ahead = truncate(self.plan, left - 1).carried
            self._proven["cycle", left] = proven(truncate(self.plan, left), ahead=ahead)
        return self._proven["cycle", left]

    def _prologue(self, left: int) -> Plan:
        """What makes the look-ahead of the first step, which needs no more of it than there are steps."""
        return proven(truncate(prologue(self.plan), left + 1), ahead=truncate(self.plan, left).carried)


def proven(plan: Plan, *, ahead: frozenset[Action]) -> Plan:
    """Return a plan with its messages, which is known to be right, to close, and not to hang.

    Args:
        plan: without messages.
        ahead: the look-ahead that it must leave, numbered as seen from the next step.
    Raises:
        PlanError: the first thing that is wrong.
    """
    lowered = add_communication(plan)
    validate(lowered, ahead=ahead)
    check_deadlock(lowered)
    return lowered


def look_ahead_steps(plan: Plan) -> int:
    """Return the number of steps into which the look-ahead at the end of a step reaches."""
    num_microbatches = plan.shape.num_microbatches
    return max((1 + action.microbatch // num_microbatches for action in plan.carried), default=0)
