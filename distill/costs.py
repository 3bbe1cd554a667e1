"""What the actions of both models cost on each stage, and into how many slices the teacher is best cut.

Decides: a stage costs what its layers cost, the first one the embedding too, the last one both heads and the loss, which
run in its backward. A profile says what the parts cost: in seconds when `distill.profiling` measured it, in multiply-adds
of a token when `distill.balance` counted it; only ratios matter for a split. Imports no torch, so that a step can be
predicted from numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from parallel.pipeline.actions import Plan
from parallel.pipeline.fill import bound_s, fill_teacher
from parallel.pipeline.partition import Layers
from parallel.pipeline.simulate import Costs, simulate

MOST_SLICES = 16
"""More make the plan longer and the step no faster."""
_ABOUT_AS_FAST = 1.005


@dataclass(frozen=True)
class Split:
    """The layers of each stage."""

    student: tuple[range, ...]
    """One entry a stage of the student; stage s is on rank s % pp."""
    teacher: tuple[range, ...]
    """One entry a rank of the pipeline."""
    num_slices: int = 1
    """Pieces a rank's teacher forward is cut into."""


@dataclass(frozen=True)
class Profile:
    """What the parts of both models cost for one micro-batch on a rank that holds them whole.

    In each entry `layer_s` are the layers, `first_s` is the embedding, `last_s` the head; seconds, or any other unit.
    """

    forward: Layers
    """The student's forward; its head is part of the loss, so `last_s` is 0."""
    backward_input: Layers
    """The student's backward without weight gradients, what is computed again included; `last_s` is both heads and the loss."""
    backward_weight: Layers
    teacher: Layers
    """The teacher's forward without its head."""
    step: Layers
    """The optimizer, once a step."""
    call_s: float = 0.0
    """What calling a stage of a model costs beside its layers: attention masks and rotary positions."""

    @property
    def student(self) -> Layers:
        """The student's forward and backward together."""
        parts = (self.forward, self.backward_input, self.backward_weight)
        return Layers(
            layer_s=[sum(each) for each in zip(*(part.layer_s for part in parts), strict=True)],
            first_s=sum(part.first_s for part in parts),
            last_s=sum(part.last_s for part in parts),
        )

    def sharded(self, tp: int, *, message_s: float = 0.0) -> Profile:
        """Return the profile of a rank that shares each layer with tp - 1 others.

        All work is divided by tp. A layer has two sums over tp in its forward and two in its backward, an embedding and a
        head one each; each of them takes `message_s`, as what they move is not modelled.
        """
        if tp == 1:
            return self

        def shared(part: Layers, *, layer: float, first: float = 0.0, last: float = 0.0) -> Layers:
            return Layers(
                layer_s=[each / tp + layer * message_s for each in part.layer_s],
                first_s=part.first_s / tp + first * message_s,
                last_s=part.last_s / tp + last * message_s,
            )

        return replace(
            self,
            forward=shared(self.forward, layer=2, first=1),
            backward_input=shared(self.backward_input, layer=2, last=1),
            backward_weight=shared(self.backward_weight, layer=0),
            teacher=shared(self.teacher, layer=2, first=1),
            step=shared(self.step, layer=0),
        )


def stage_sums(layers: Layers, stages: Sequence[range]) -> list[float]:
    """Return what a model costs on each of its stages, embedding and head with the first and the last."""
    sums = [sum(layers.layer_s[stage.start : stage.stop]) for stage in stages]
    sums[0] += layers.first_s
    sums[-1] += layers.last_s
    return sums


def stage_costs(profile: Profile, split: Split, *, latency: float = 0.0) -> Costs:
    """Return the costs of a pipeline's actions under a split, in the profile's unit.

    Args:
        latency: of a message between neighbour ranks, in the same unit.
    """

    def each(layers: Layers, call_s: float = 0.0) -> list[float]:
        return [call_s + total for total in stage_sums(layers, split.student)]

    return Costs(
        forward=each(profile.forward, profile.call_s),
        backward_input=each(profile.backward_input),
        backward_weight=each(profile.backward_weight),
        teacher_slice=[
            profile.call_s + total / split.num_slices for total in stage_sums(profile.teacher, split.teacher)
        ],
        latency=latency,
        step=each(profile.step),
    )


def choose_slices(plan: Plan, costs_with: Callable[[int], Costs], *, most: int = MOST_SLICES) -> int:
    """Return the smallest number of slices with which filling is within 0.5 % of its fastest.

    Numbers are tried from 2 up (whole forwards suffer most when costs are not what was planned with) until one is that
    near to the bound that no number of slices can beat.

    Args:
        plan: the student's step, without teacher and without messages.
        costs_with: the costs with a number of slices; more slices must not make the whole teacher cheaper.
        most: how far to try.
    """
    least_s = bound_s(plan, costs_with(1), num_slices=1)
    step_s: dict[int, float] = {}
    for num_slices in range(min(2, most), most + 1):
        costs = costs_with(num_slices)
        filled = fill_teacher(plan, costs, num_slices=num_slices)
        step_s[num_slices] = simulate(filled, costs, num_steps=4).step_s
        if step_s[num_slices] <= least_s * _ABOUT_AS_FAST:
            break
    enough_s = min(step_s.values()) * _ABOUT_AS_FAST
    return next(number for number, each_s in step_s.items() if each_s <= enough_s)
