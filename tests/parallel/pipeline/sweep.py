"""The plans that the tests of the pipeline sweep over, each made once."""

from __future__ import annotations

from functools import cache

from parallel.pipeline.actions import Plan
from parallel.pipeline.lower import add_communication
from parallel.pipeline.schedules import SCHEDULES, TRAINING, make_plan

NUM_MICROBATCHES = (1, 2, 3, 5, 8, 13)
NUM_MICROBATCHES_OF_LONG_PIPELINES = (1, 5, 9)


@cache
def plans(num_ranks: int) -> tuple[Plan, ...]:
    """Return every schedule, with and without a teacher; small pipelines with all slices and virtual stages."""
    made = []
    for schedule in TRAINING:
        wide = SCHEDULES[schedule].takes_virtual_stages and num_ranks <= 4
        for num_microbatches in NUM_MICROBATCHES if num_ranks <= 8 else NUM_MICROBATCHES_OF_LONG_PIPELINES:
            for teacher in (None, "inline", "batch"):
                rotated = 1 + (num_ranks + num_microbatches) % 3
                for num_slices in (1, 2, 3) if teacher and num_ranks == 2 else (rotated,):
                    for virtual_stages in (1, 2, 3) if wide else (1,):
                        plan = make_plan(
                            schedule=schedule,
                            teacher=teacher,
                            num_ranks=num_ranks,
                            num_microbatches=num_microbatches,
                            num_slices=num_slices,
                            virtual_stages=virtual_stages,
                        )
                        made.append(plan)
    return tuple(made)


@cache
def lowered_plans(num_ranks: int) -> tuple[Plan, ...]:
    """Return the same plans with their messages."""
    return tuple(map(add_communication, plans(num_ranks)))
