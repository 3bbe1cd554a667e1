"""A distillation step under torch's own pipeline engine, `torch.distributed.pipelining`: the peer of our schedules.

Decides how a user of that engine would distil: the whole batch through the teacher's stages (`schedule.eval`), then the
student's schedule with the teacher's outputs as targets. It has no way to mix the two. Neither part ends with a
barrier, so the first stages turn to the student while the last ones still run the teacher. With several stages a rank
the teacher is cut the same way and runs as that schedule's forwards, which is its shorter way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining


@dataclass(frozen=True)
class Engine:
    """One of torch's schedules, and the stages a rank that it is given."""

    schedule: str
    virtual_stages: int = 1


ENGINES = {
    "torch_1f1b": Engine("Schedule1F1B"),
    "torch_interleaved": Engine("ScheduleInterleaved1F1B", virtual_stages=2),
    "torch_zero_bubble": Engine("ScheduleInterleavedZeroBubble", virtual_stages=2),
}


class TorchPipeline:
    """Teacher and student of one rank under torch's engine.

    Args:
        engine: a name of `ENGINES`.
        teacher, student: this rank's stages, as many as the engine wants, in ascending order.
        num_microbatches: of a step.
        loss: (student output, teacher output) of a micro-batch -> loss; runs on the last stage. A step's gradients are
            those of the sum.
        hidden: what travels between stages, where all stages take and give the same; else torch runs each once to see.
    """

    def __init__(
        self,
        engine: str,
        *,
        teacher: Sequence[nn.Module],
        student: Sequence[nn.Module],
        num_microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        hidden: Tensor | None = None,
    ) -> None:
        kind = getattr(pipelining, ENGINES[engine].schedule)
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        self._first = dist.get_rank() == 0
        wrapped = [
            _stages(teacher, hidden),
            _stages(student, hidden if hidden is None else hidden.clone().requires_grad_()),
        ]
        stages: list[Any] = [each[0] if single else each for each in wrapped]
        # Forwards alone have one order on single stages, whatever the schedule; GPipe takes any number of micro-batches.
        forwards = pipelining.ScheduleGPipe if single else kind
        self._teacher = forwards(stages[0], num_microbatches)
        self._student = kind(stages[1], num_microbatches, loss_fn=loss, scale_grads=False)

    def step(self, inputs: Tensor) -> list[Tensor]:
        """Run the teacher, then forwards and backwards of the student; gradients are added to the parameters'.

        Args:
            inputs: the whole batch, cut along its first dim; only the first rank's is used.
        Returns:
            The micro-batches' losses on the last rank, else nothing.
        """
        batch = (inputs,) if self._first else ()
        with torch.no_grad():
            targets = self._teacher.eval(*batch)
        losses: list[Tensor] = []
        self._student.step(*batch, target=targets, losses=losses, return_outputs=False)
        return losses


def _stages(modules: Sequence[nn.Module], hidden: Tensor | None) -> list[pipelining.PipelineStage]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return [
        pipelining.PipelineStage(
            module,
            rank + chunk * size,
            len(modules) * size,
            torch.device("cpu"),
            input_args=hidden,
            output_args=hidden,
        )
        for chunk, module in enumerate(modules)
    ]
