"""A distillation step of real models under our plans and under torch's engine: what the benchmark `pipeline` runs.

Decides what a turn of a side is (`Session`). Ours is put together as a training does it, with its split of the layers, its
costs from the first steps and its planner. The peer is what one would write around `torch.distributed.pipelining`: each
model's list of layers in even parts, transformers' own modules, a loss on whole logits, the sum of a tied weight's
gradients, a global norm, and fused AdamW. Both sides minimise the forward KL to the teacher alone, on the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from distill.config import Config, Pipeline, Train
from distill.planning import costs_of, make_step_plan, medians
from launch.benchmarks._inputs import BETAS, CLIP, load_step, microbatches, soft_config
from launch.benchmarks._torch_pipelining import TorchPipeline
from parallel.collectives import all_reduce_, barrier, gather_objects
from parallel.mesh import Mesh
from parallel.pipeline.fill import bound_s
from parallel.pipeline.simulate import Event, steady_state

OURS = ("fill", "inline", "batch")
PEER = "torch_1f1b"
_LR = 1e-4
MEASURED_STEPS = 3


@dataclass(frozen=True)
class Job:
    """A turn of one side: a few steps.

    Args:
        side: one of `OURS`, or `PEER`.
        teacher, student: folders.
        turn: steps to take; the first turn of a side also builds it.
    """

    side: str = ""
    teacher: str = ""
    student: str = ""
    pp: int = 2
    microbatches: int = 8
    rows: int = 1
    seq_len: int = 256
    turn: int = 1
    temperature: float = 2.0

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.microbatches * self.rows * self.seq_len

    def config(self) -> Config:
        """Return the settings of such a training, which never comes to its end here."""
        return soft_config(
            self.teacher,
            self.student,
            temperature=self.temperature,
            seq_len=self.seq_len,
            train=Train(
                global_batch_size=self.microbatches * self.rows,
                microbatch_size=self.rows,
                steps=10**6,
                dtype="float32",
            ),
            lr=_LR,
            pipeline=Pipeline(teacher=self.side, measure_steps=MEASURED_STEPS, replan_every=0),
            pp=self.pp,
        )

    def input_ids(self, step: int) -> Tensor:
        """Return the rows of a step, the same for all sides."""
        vocab_size = AutoConfig.from_pretrained(self.student).vocab_size
        generator = torch.Generator().manual_seed(step)
        shape = (self.microbatches * self.rows, self.seq_len)
        return torch.randint(0, vocab_size, shape, generator=generator)


class Theory(NamedTuple):
    """Seconds of a step of `fill`.

    Args:
        planned_s: by the costs that its first steps measured, from which the plan was made.
        replayed_s: of the same plan by the costs of the steps since.
        inline_s, bound_s: of `inline`, and the least possible, by the costs of the steps since.
    """

    planned_s: float
    replayed_s: float
    inline_s: float
    bound_s: float


class Result(NamedTuple):
    """What a rank measured: losses (of torch's engine on the last rank only), mean time of a step, theory of `fill`."""

    losses: list[float]
    step_s: float
    theory: Theory | None


class Session:
    """One process: its place among the ranks, and the sides that it has built."""

    def __init__(self) -> None:
        disable_progress_bar()
        self._mesh = Mesh.create(pp=dist.get_world_size(), dp=1, tp=1)
        self._sides: dict[str, _Ours | _Torch] = {}

    def __call__(self, job: Job) -> Result:
        """Let a side take its turn; its ranks start together, and nothing stands between the steps of a turn."""
        if job.side not in self._sides:
            self._sides[job.side] = (_Torch if job.side == PEER else _Ours)(job, self._mesh)
        side = self._sides[job.side]
        barrier(self._mesh.world)
        start_s = time.perf_counter()
        losses = [side.step() for _ in range(job.turn)]
        step_s = (time.perf_counter() - start_s) / job.turn
        return Result(losses, step_s, side.theory())


class _Ours:
    """A training of ours, step by step."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        self._mesh, self._config = mesh, job.config()
        self._step, self._planner = load_step(
            self._config, mesh, lambda step: microbatches(job.input_ids(step), job.rows)
        )
        self._number = 0
        self._filled: list[Event] = []

    def step(self) -> float:
        """Take a step and return its loss."""
        stats = self._step(self._number)
        plan = self._step.last_plan
        assert plan is not None
        self._planner.observe(plan, self._step.last_events)
        self._number += 1
        # The first step of the plan warms up.
        if self._number > MEASURED_STEPS + 1:
            self._filled += self._step.last_events
        return stats.total

    def theory(self) -> Theory | None:
        """Return what simulations say; None before the plan has run."""
        planned = self._planner.planned
        if not self._filled or planned is None or self._config.pipeline.teacher != "fill":
            return None
        plan = self._planner.course.plan
        seconds = {
            key: value
            for each in gather_objects(medians(self._filled), self._mesh.world)
            for key, value in each.items()
        }
        costs = costs_of(seconds, plan.shape)
        inline, student = (
            make_step_plan(self._config, teacher=teacher, num_slices=plan.shape.num_slices)
            for teacher in ("inline", None)
        )
        return Theory(
            planned_s=planned.step_s,
            replayed_s=steady_state(plan, costs).step_s,
            inline_s=steady_state(inline, costs).step_s,
            bound_s=bound_s(student, costs, num_slices=plan.shape.num_slices),
        )


class _Part(nn.Module):
    """The layers of a Llama-like model that one rank holds, from transformers' own modules."""

    def __init__(self, model: PreTrainedModel, rank: int, size: int) -> None:
        super().__init__()
        num_layers = len(model.model.layers)
        start, stop = (index * num_layers // size for index in (rank, rank + 1))
        self.embedding = model.model.embed_tokens if rank == 0 else None
        self.rotary = model.model.rotary_emb
        self.layers = nn.ModuleList(model.model.layers[start:stop])
        self.is_tied = model.config.tie_word_embeddings
        self.norm = model.model.norm if rank == size - 1 else None
        self.head = model.lm_head if rank == size - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states for the next part, or the logits."""
        hidden = x if self.embedding is None else self.embedding(x)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            # Without a mask scaled_dot_product_attention is told that attention is causal.
            hidden = layer(hidden, position_ids=positions, position_embeddings=rotary)
        return hidden if self.head is None else self.head(self.norm(hidden))


class _Torch:
    """The same training around torch's engine, step by step."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        self._job, self._mesh, self._number = job, mesh, 0
        teacher, self._student = (_load_part(folder, mesh) for folder in (job.teacher, job.student))
        teacher.requires_grad_(False)
        num_valid = job.microbatches * job.rows * (job.seq_len - 1)
        self._pipeline = TorchPipeline(
            PEER,
            teacher=[teacher],
            student=[self._student],
            num_microbatches=job.microbatches,
            loss=_loss(job.temperature, num_valid),
        )
        self._optimizer = torch.optim.AdamW(
            self._student.parameters(), lr=_LR, betas=BETAS, weight_decay=0.0, fused=True
        )

    def step(self) -> float:
        """Take a step and return its loss; 0 on ranks that are not the last."""
        losses = self._pipeline.step(self._job.input_ids(self._number))
        _clip(self._student, self._mesh)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._number += 1
        return sum(loss.item() for loss in losses)

    def theory(self) -> None:
        """Nothing is promised."""


def _load_part(folder: str, mesh: Mesh) -> _Part:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return _Part(model, mesh.pp.rank, mesh.pp.size)


def _loss(temperature: float, num_valid: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits_BSV: Tensor, target_BSV: Tensor) -> Tensor:
        # The last token of a row has nothing to predict.
        student = F.log_softmax(logits_BSV[:, :-1] / temperature, dim=-1)
        teacher = F.softmax(target_BSV[:, :-1] / temperature, dim=-1)
        return F.kl_div(student, teacher, reduction="sum") * temperature**2 / num_valid

    return loss


def _clip(student: _Part, mesh: Mesh) -> None:
    """Sum the tied weight's gradients over the first and last rank, and clip to the norm over all."""
    tie = mesh.gradients.tie
    end = student.embedding or student.head
    if student.is_tied and end is not None:
        all_reduce_(end.weight.grad, tie)
    counted = [
        parameter.grad
        for parameter in student.parameters()
        if not (student.is_tied and tie.is_last and end is not None and parameter is end.weight)
    ]
    squares = torch.nn.utils.get_total_norm(counted).square()
    all_reduce_(squares, mesh.pp)
    torch.nn.utils.clip_grads_with_norm_(student.parameters(), CLIP, squares.sqrt())
