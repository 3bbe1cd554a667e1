"""Five steps of one small distillation, twice: by the framework in any layout, and by plain PyTorch in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from distill.annealing import value_at
from distill.config import Hidden, Loss
from distill.costs import Split
from distill.data import IGNORE, MicroBatch
from distill.hidden_loss import HiddenTerm
from distill.hidden_map import Pair, first_projection, layer_pairs
from distill.step import DistillationStep, messages
from distill.step_stats import StepStats
from parallel.checkpoint import Saver
from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage, split_layers
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.pipeline.actions import Plan
from parallel.pipeline.course import Course
from parallel.pipeline.fill import fill_teacher
from parallel.pipeline.p2p import Links, Message
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.simulate import Costs
from parallel.update_rules import OptimizerOptions
from parallel.weights import gather_tensor, load_weights
from tests.families import factored_config, save_tiny, tiny_config, tiny_model

ROWS, SEQ_LEN, STEPS = 8, 9, 5
LOSS = Loss(kind="forward_kl", temperature=2.0, alpha=0.3)
ADAMW = OptimizerOptions(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, clip=0.2)
RATE = LearningRate(peak=1e-3, warmup_steps=2, total_steps=STEPS)
TEACHER = tiny_config("qwen3", hidden_size=48, num_hidden_layers=5, intermediate_size=40)
STUDENTS = {
    "untied": tiny_config("llama", tie_word_embeddings=False),
    "tied": tiny_config("qwen3", tie_word_embeddings=True),
    "deep": tiny_config("qwen3", tie_word_embeddings=True, num_hidden_layers=8),
    # Every linear of the layer, biases too, one of a rank that tp does not divide; and the feed-forward ones.
    "factored": factored_config(
        "llama",
        {
            **dict.fromkeys(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), 6
            ),
            "mlp.gate_proj": 8,
            "mlp.up_proj": 16,
            "mlp.down_proj": 7,
        },
        tie_word_embeddings=False,
    ),
    "factored tied": factored_config(
        "qwen3", {"mlp.gate_proj": 8, "mlp.down_proj": 8}, tie_word_embeddings=True
    ),
    "uneven": tiny_config(
        "qwen3",
        tie_word_embeddings=True,
        per_layer_config={
            1: {"intermediate_size": 24},
            2: {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        },
    ),
}
COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, teacher_slice=0.5, latency=0.2, step=1.0)
"""What plans with look-ahead are made from; no costs change what is computed."""


@dataclass(frozen=True)
class Case:
    """One way to run the same trajectory."""

    pp: int
    dp: int
    tp: int
    schedule: str
    teacher: str
    student: str
    num_microbatches: int
    slices: int = 1
    recompute: str = "none"
    compiled: bool = False
    virtual_stages: int = 1
    rows: int = ROWS
    """Of a global batch."""
    twin: bool = False
    """The teacher is the student's own model."""
    hidden: Hidden = field(default_factory=Hidden)
    """The hidden-state term of the loss."""
    student_layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None
    """Layers on each stage; None evens them out."""
    bucket_bytes: int = 25 * 1024**2
    """Of gradients that are reduced in one piece."""
    engine: str = "torch"
    """What reduces gradients and updates the weights."""

    @property
    def split(self) -> Split:
        """The layers of each stage of both models."""
        teacher = STUDENTS[self.student] if self.twin else TEACHER
        return Split(
            _ranges(STUDENTS[self.student], self.student_layers, self.pp * self.virtual_stages),
            _ranges(teacher, self.teacher_layers, self.pp),
        )


def _ranges(config: PretrainedConfig, counts: tuple[int, ...] | None, num_stages: int) -> tuple[range, ...]:
    if counts is None:
        return tuple(split_layers(config.num_hidden_layers, num_stages))
    return tuple(range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0)))


@dataclass(frozen=True)
class Trajectory:
    """What must agree: per step the losses and the norm, and the parameters at the end by name."""

    losses: list[tuple[float, float, float]]
    norms: list[float]
    parameters: dict[str, Tensor]
    hidden: list[float]
    """The hidden-state term of each step, without its weight."""


SINGLE = Case(1, 1, 1, "1f1b", "inline", "tied", 4)


def save_models(folder: Path) -> dict[str, str]:
    """Write the teacher and the students; return their folders."""
    configs = {"teacher": TEACHER, **STUDENTS}
    return {
        name: str(save_tiny(folder / name, config, seed=seed))
        for seed, (name, config) in enumerate(configs.items())
    }


def batch_of(step: int, rows: int = ROWS) -> MicroBatch:
    """Return the whole global batch of a step: packed documents, ignored positions, one row with nothing to learn."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, 97, (rows, SEQ_LEN), generator=generator)
    positions = torch.arange(SEQ_LEN).repeat(rows, 1)
    positions[1::2, 4:] -= 4
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    labels[1::2, 3] = IGNORE
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    labels[(step + 2) % rows] = IGNORE
    return MicroBatch(input_ids_BS=ids, position_ids_BS=positions, labels_BS=labels)


def load_stages(
    case: Case, folders: dict[str, str], mesh: Mesh, dtype: torch.dtype
) -> tuple[list[StageModel], StageModel]:
    """Build and load this rank's stages of the student, and its stage of the teacher."""
    shared = {"tp": mesh.tp, "dtype": dtype, "compile_layers": case.compiled}
    num_stages = case.pp * case.virtual_stages
    split = case.split
    students = [
        build_stage(
            STUDENTS[case.student],
            pp=Axis("stage", num_stages, stage),
            owned=split.student[stage],
            recompute=case.recompute,
            **shared,
        )
        for stage in range(mesh.pp.rank, num_stages, case.pp)
    ]
    config, source = (STUDENTS[case.student], case.student) if case.twin else (TEACHER, "teacher")
    teacher = build_stage(
        config,
        pp=mesh.pp,
        owned=split.teacher[mesh.pp.rank],
        trainable=False,
        num_slices=case.slices,
        **shared,
    )
    for student in students:
        load_weights(student, Path(folders[case.student]))
    load_weights(teacher, Path(folders[source]))
    return students, teacher


def mesh_of(case: Case) -> Mesh:
    """Return the mesh of a case, on the ranks of a test launch or on this process alone."""
    if case.pp * case.dp * case.tp == 1:
        return Mesh.single()
    return Mesh.create(pp=case.pp, dp=case.dp, tp=case.tp)


def plan_of(case: Case, *, teacher: str | None) -> Plan:
    """Return the plan of a step; `fill` is planned with `COSTS`."""
    plan = make_plan(
        schedule=case.schedule,
        teacher=None if teacher == "fill" else teacher,
        num_ranks=case.pp,
        num_microbatches=case.num_microbatches,
        num_slices=case.slices,
        virtual_stages=case.virtual_stages,
    )
    return fill_teacher(plan, COSTS, num_slices=case.slices) if teacher == "fill" else plan


def pairs_of(hidden: Hidden, student: PretrainedConfig, teacher: PretrainedConfig) -> list[Pair]:
    """Return the layers that are compared."""
    return layer_pairs(
        hidden, student_layers=student.num_hidden_layers, teacher_layers=teacher.num_hidden_layers
    )


def projection_of(layer: int, student: PretrainedConfig, teacher: PretrainedConfig) -> Tensor:
    """Return what a layer's projection starts as."""
    widths = {"student_width": student.hidden_size, "teacher_width": teacher.hidden_size}
    return first_projection(layer, **widths, channels=None, seed=7)


def hidden_term(
    case: Case, mesh: Mesh, students: list[StageModel], teacher: StageModel, hidden: Hidden
) -> HiddenTerm | None:
    """Build this rank's part of the hidden-state term."""
    if not hidden.is_on:
        return None
    configs = students[0].config, teacher.config
    rows = case.rows // (case.dp * case.num_microbatches)
    return HiddenTerm(
        mesh,
        pairs_of(hidden, *configs),
        split=case.split,
        message=Message((rows, SEQ_LEN, teacher.config.hidden_size), next(teacher.parameters()).dtype),
        kind=hidden.kind,
        students=students,
        first=(lambda layer: projection_of(layer, *configs)) if hidden.projection == "learned" else None,
    )


def make_step(
    case: Case,
    folders: dict[str, str],
    mesh: Mesh,
    *,
    loss: Loss = LOSS,
    with_teacher: bool = True,
    dtype: torch.dtype = torch.float64,
    num_steps: int = STEPS,
    rate: LearningRate = RATE,
    batch_at: Callable[[int], MicroBatch] | None = None,
) -> DistillationStep:
    """Build this rank's part of a case, ready for its first step; the teacher looks ahead until `num_steps`."""
    batch_at = batch_at or (lambda step: batch_of(step, case.rows))
    students, teacher = load_stages(case, folders, mesh, dtype)
    rows = case.rows // (case.dp * case.num_microbatches)
    traffic = messages(students[0], teacher, rows=rows, seq_len=SEQ_LEN)
    hidden = hidden_term(case, mesh, students, teacher, loss.hidden)
    return DistillationStep(
        mesh=mesh,
        students=students,
        teacher=teacher if with_teacher else None,
        optimizer=StageOptimizer.of_stages(
            students,
            mesh,
            replace(ADAMW, engine=case.engine),
            rate,
            bucket_bytes=case.bucket_bytes,
            beside=hidden.entries if hidden else None,
        ),
        course=Course(plan_of(case, teacher=case.teacher if with_teacher else None), num_steps=num_steps),
        loss=partial(loss.at, num_steps=num_steps),
        links=Links(mesh, traffic, num_stages=case.pp * case.virtual_stages),
        batches=lambda step: share_of(batch_at(step), case, mesh),
        hidden=hidden,
    )


def share_of(whole: MicroBatch, case: Case, mesh: Mesh) -> list[MicroBatch]:
    """Return the micro-batches of this rank's replica."""
    columns = (whole.input_ids_BS, whole.position_ids_BS, whole.labels_BS)
    mine = [column.chunk(mesh.dp.size)[mesh.dp.rank].chunk(case.num_microbatches) for column in columns]
    return [MicroBatch(*parts) for parts in zip(*mine, strict=True)]


def train(step: DistillationStep, steps: range) -> list[StepStats]:
    """Run optimizer steps on the batches of the trajectory, as a training does: each carries its parameters to the next."""
    stats = [step(index, carries=True) for index in steps]
    step.settle()
    return stats


def state_of(step: DistillationStep) -> dict[str, Tensor]:
    """Return copies of this rank's masters, moments and parameters by name."""
    state = {}
    for entry, parts in step.optimizer.state():
        name = entry.name + ("@tied" if entry.is_tied_copy else "")
        state |= {f"{key}/{name}": part.read().clone() for key, part in parts.items()}
        state[f"parameter/{name}"] = entry.parameter.detach().clone()
    return state


def run_case(
    case: Case, folders: dict[str, str], mesh: Mesh, dtype: torch.dtype = torch.float64
) -> Trajectory:
    """Run the framework's step five times in the case's layout; parameters are this rank's stage, whole tensors."""
    step = make_step(case, folders, mesh, dtype=dtype, loss=replace(LOSS, hidden=case.hidden))
    stats = train(step, range(STEPS))
    if step.hidden is not None:
        # Refuses to close while anything waits.
        step.hidden.handover.close()
    return Trajectory(
        losses=[(s.total, s.hard, s.soft) for s in stats],
        norms=[s.grad_norm for s in stats],
        hidden=[s.hidden for s in stats],
        parameters={
            entry.name + ("@tied" if entry.is_tied_copy else ""): gather_tensor(
                entry.parameter.detach(), entry
            ).clone()
            for entry, _ in step.optimizer.state()
        },
    )


def run_cases(cases: list[Case], folders: dict[str, str]) -> list[Trajectory]:
    """Run cases of one layout on the ranks of a test launch."""
    mesh = mesh_of(cases[0])
    return [run_case(case, folders, mesh) for case in cases]


class _Outputs:
    """What the decoder layers of a model made last."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.last: dict[int, Tensor] = {}
        for layer, module in enumerate(model.model.layers):
            module.register_forward_hook(lambda _, __, output, at=layer: self.last.__setitem__(at, output))


def _plain_hidden(
    hidden: Hidden,
    outputs: tuple[_Outputs, _Outputs],
    pair: Pair,
    projections: dict[int, Tensor],
    valid: Tensor,
) -> Tensor:
    """Return the mean distance over the valid tokens of one pair of layers."""
    ours, theirs = outputs[0].last[pair.student].flatten(0, 1), outputs[1].last[pair.teacher].flatten(0, 1)
    if pair.student in projections:
        ours = F.linear(ours, projections[pair.student])
    if hidden.kind == "cosine":
        distance = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    else:
        distance = (ours - theirs).pow(2).mean(-1) / theirs.pow(2).mean(-1)
    return distance[valid].sum() / valid.sum()


def run_reference(student: str, folders: dict[str, str], hidden: Hidden | None = None) -> Trajectory:
    """Run the same steps with plain transformers models, torch's AdamW and the loss written as its formula."""
    hidden = hidden or Hidden()
    model, teacher = tiny_model(STUDENTS[student]), tiny_model(TEACHER)
    for target, name in ((model, student), (teacher, "teacher")):
        load_model(target, Path(folders[name]) / "model.safetensors")
    outputs = _Outputs(model), _Outputs(teacher)
    pairs = pairs_of(hidden, STUDENTS[student], TEACHER) if hidden.is_on else []
    projections = {
        pair.student: torch.nn.Parameter(projection_of(pair.student, STUDENTS[student], TEACHER))
        for pair in pairs
        if hidden.projection == "learned"
    }
    trained = [*model.parameters(), *projections.values()]
    groups = [[p for p in trained if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": ADAMW.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        betas=ADAMW.betas,
        eps=ADAMW.eps,
    )
    losses, norms, distances = [], [], []
    for step in range(STEPS):
        batch = batch_of(step)
        inputs = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS, "use_cache": False}
        logits = model(**inputs).logits.flatten(0, 1)
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits.flatten(0, 1)
        labels = batch.labels_BS.flatten()
        valid = labels != IGNORE
        count = valid.sum()
        hard = F.cross_entropy(logits[valid], labels[valid], reduction="sum") / count
        log_q = torch.log_softmax(logits[valid] / LOSS.temperature, dim=-1)
        log_p = torch.log_softmax(teacher_logits[valid] / LOSS.temperature, dim=-1)
        soft = LOSS.temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / count
        total = LOSS.alpha * hard + (1 - LOSS.alpha) * soft
        far = sum(_plain_hidden(hidden, outputs, pair, projections, valid) for pair in pairs) / max(
            1, len(pairs)
        )
        total = total + value_at(hidden.weight, step, STEPS) * far
        optimizer.zero_grad()
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, ADAMW.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = RATE.at(step)
        optimizer.step()
        losses.append((total.item(), hard.item(), soft.item()))
        distances.append(far.item() if value_at(hidden.weight, step, STEPS) > 0 else 0.0)
    parameters = dict(model.named_parameters())
    parameters |= {f"hidden_projection.{layer}.weight": each for layer, each in projections.items()}
    return Trajectory(losses, norms, {name: p.detach() for name, p in parameters.items()}, distances)


def save_now(
    root: Path, step: int, optimizer: StageOptimizer, mesh: Mesh, *, extras: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint, wait until it is complete, and return its folder."""
    with Saver(root, optimizer, mesh, keep=keep) as saver:
        saver.save(step, extras)
    return root / f"step-{step:08d}"


def layout_name(layout: tuple[int, int, int]) -> str:
    """Return the name of a layout (pp, dp, tp) in a test's id."""
    return "pp{}-dp{}-tp{}".format(*layout)
