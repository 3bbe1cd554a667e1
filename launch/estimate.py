"""What a step of each layout is made of, when the user gives models instead of all costs.

Decides that costs are measured on this machine (`distill.profiling`), once for each shape of the student, and spread over the
layers of each stage as a run would split them. Only shapes matter, so weights are random and none are read. On a CPU one
thread computes, as in each process of a run, unless the layout is one process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.balance import count_layers, split_models
from distill.config import Config, ConfigError
from distill.costs import MOST_SLICES, Profile, Split, stage_costs, stage_sums
from distill.loading import DTYPES
from distill.planned_student import checked_student, without_padding
from distill.pretrained import load_config, resolve_model
from distill.profiling import measure
from distill.session import optimizer_options
from launch.environment import World
from launch.forecast import Job, Layout, seconds
from launch.plan_options import Options, given_costs
from launch.ranks import choose_device
from parallel.gradients import main_dtype
from parallel.pipeline.partition import Layers
from parallel.pipeline.simulate import Costs
from parallel.update_rules import element_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def measured_jobs(
    config: Config, cases: Sequence[Config], options: Options
) -> tuple[list[Job], list[str], dict[str, str]]:
    """Measure the models' parts and return the jobs, what to tell about them, and why some layouts do not fit.

    Args:
        config: the settings whose mesh given costs belong to.
        cases: a layout each, `mesh.dp` filled in.
    Raises:
        ConfigError: a model that is not there or that no layout fits.
    """
    device = choose_device(config.run.device, World())
    many = max(case.mesh.pp * case.mesh.dp * case.mesh.tp for case in cases) > 1
    if device.type == "cpu" and many:
        torch.set_num_threads(1)
    teacher = _find(config, "teacher.model")
    ready = None if config.student.model is None else _find(config, "student.model")
    if ready is not None:
        teacher = without_padding(teacher, ready.get_text_config().vocab_size)
    fitting: list[tuple[Config, PretrainedConfig]] = []
    left_out: dict[str, str] = {}
    for case in cases:
        try:
            fitting.append((case, _student(config, case, options, teacher, ready)))
        except ConfigError as error:
            if options.devices is None:
                raise
            left_out[str(Layout.of(case))] = str(error)
    if not fitting:
        raise ConfigError(next(iter(left_out.values())))
    profiles: dict[str, Profile] = {}
    jobs = []
    for case, student in fitting:
        profile = _profile(profiles, case, teacher, student, device)
        jobs.append(_job(config, case, options, teacher, student, profile))
    return jobs, _notes(config, options, device, list(profiles.values())), left_out


def _student(
    config: Config,
    case: Config,
    options: Options,
    teacher: PretrainedConfig,
    ready: PretrainedConfig | None,
) -> PretrainedConfig:
    """Return the shape of a layout's student.

    Raises:
        ConfigError: what would not fit once everything is measured, found before it is.
    """
    student = checked_student(case, teacher, ready)
    split_models(_filling(case), teacher, student)
    given_costs(Costs(0.0, 0.0, 0.0), options, config.mesh, case, 1)
    return student


def _filling(case: Config) -> Config:
    """Return the settings as they are split for filling, whatever way they take, without choosing slices."""
    return replace(case, pipeline=replace(case.pipeline, teacher="fill", slices=1))


def _find(config: Config, key: str) -> PretrainedConfig:
    name = config.teacher.model if key == "teacher.model" else config.student.model
    assert name is not None
    trust = config.teacher.trust_remote_code
    folder = resolve_model(name, cache_dir=Path(config.data.cache_dir), trust_remote_code=trust, key=key)
    return load_config(folder, trust_remote_code=trust, key=key)


def _profile(
    profiles: dict[str, Profile],
    case: Config,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    device: torch.device,
) -> Profile:
    """Return the measured profile of a student's shape, measuring it when it is new."""
    shape = json.dumps(student.to_dict(), sort_keys=True, default=str)
    if shape not in profiles:
        print(f"measuring one layer of each model, heads and loss on this machine ({device}) ...", flush=True)
        profiles[shape] = measure(case, teacher, student, device=device)
    return profiles[shape]


def _job(
    config: Config,
    case: Config,
    options: Options,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    profile: Profile,
) -> Job:
    """Return what a step of one layout is made of."""
    latency = options.costs.get("latency", 0.0)
    assert isinstance(latency, float)
    shared = profile.sharded(case.mesh.tp, message_s=latency)
    pipeline = case.pipeline
    by_user = pipeline.student_layers is not None or pipeline.teacher_layers is not None
    alternative = None
    if by_user:
        free = replace(case, pipeline=replace(pipeline, student_layers=None, teacher_layers=None))
        alternative = _job(config, free, options, teacher, student, profile)
    split = split_models(_filling(case), teacher, student, profile=shared)

    def costs_with(num_slices: int) -> Costs:
        base = stage_costs(shared, Split(split.student, split.teacher, num_slices), latency=latency)
        return given_costs(base, options, config.mesh, case, num_slices)

    rows, itemsize = case.train.microbatch_size, DTYPES[case.train.dtype].itemsize
    return Job(
        layout=Layout.of(case),
        schedule=pipeline.schedule,
        virtual_stages=pipeline.virtual_stages,
        costs_with=costs_with,
        has_teacher=case.needs_teacher,
        num_slices=options.slices or pipeline.slices,
        most_slices=min(MOST_SLICES, max(len(layers) for layers in split.teacher)),
        microbatch_size=rows,
        split_by="user" if by_user else "planner",
        alternative=alternative,
        student_layers=tuple(len(layers) for layers in split.student),
        teacher_layers=tuple(len(layers) for layers in split.teacher),
        state_bytes=_state_bytes(case, split, teacher, student),
        bytes_a_tensor=rows * case.data.seq_len * teacher.get_text_config().hidden_size * itemsize,
    )


def _state_bytes(case: Config, split: Split, teacher: PretrainedConfig, student: PretrainedConfig) -> int:
    """Return what the fullest rank holds between two steps: weights, and for the student gradients, moments and masters."""
    dtype = DTYPES[case.train.dtype]
    itemsize, main_itemsize = dtype.itemsize, main_dtype(dtype).itemsize
    owners = case.mesh.dp if case.optimizer.zero_stage else 1
    trained = itemsize + main_itemsize + element_bytes(optimizer_options(case), dtype) / owners
    ranks = [0.0] * case.mesh.pp
    for config, stages, num_bytes in ((student, split.student, trained), (teacher, split.teacher, itemsize)):
        parameters, _, head = count_layers(config, seq_len=case.data.seq_len)
        # An embedding is as large as its head; tied, they are one where they are on one rank.
        tied = len(stages) == 1 and getattr(config.get_text_config(), "tie_word_embeddings", False)
        sums = stage_sums(Layers(parameters, first_s=0.0 if tied else head, last_s=head), stages)
        for stage, count in enumerate(sums):
            ranks[stage % case.mesh.pp] += count * num_bytes / case.mesh.tp
    return round(max(ranks))


def _notes(config: Config, options: Options, device: torch.device, profiles: Sequence[Profile]) -> list[str]:
    """Say what was measured and what the figures leave out."""
    profile = profiles[0]
    backward_s = profile.backward_input.layer_s[0] + profile.backward_weight.layer_s[0]
    num_threads = torch.get_num_threads()
    where = str(device)
    if device.type == "cpu":
        where += f", {num_threads} thread{'s' if num_threads > 1 else ''}"
    shape = f"{config.train.microbatch_size} x {config.data.seq_len} tokens, {config.train.dtype}"
    measured = (
        f"Costs are measured on this machine ({where}; {shape}): a student layer {seconds(profile.forward.layer_s[0])} "
        f"forward, {seconds(backward_s)} backward; a teacher layer {seconds(profile.teacher.layer_s[0])}; both heads and "
        f"the loss {seconds(profile.backward_input.last_s)}."
    )
    memory = (
        "Queue: what the teacher has ahead, at most. State: weights, gradients and moments of the fullest rank; "
        "activations come on top, and whether they fit is not checked."
    )
    notes = [measured, memory]
    if config.loss.hidden.is_on:
        notes.append(
            "Queue leaves out what loss.hidden keeps: for each micro-batch ahead one more tensor of that size a mapped layer."
        )
    prune = config.student.prune
    if config.student.model is None and prune.target_params is not None:
        notes.append(
            f"The student is the first shape that meets student.prune.target_params={prune.target_params}; a run judges "
            f"up to {prune.candidates} and may take another."
        )
    if options.costs:
        notes.append(
            f"Of the costs these were given: {', '.join(f'plan.costs.{name}' for name in options.costs)}."
        )
    if "latency" not in options.costs:
        notes.append(
            "Not in the figures: messages between stages and sums over tp, which take no time here (plan.costs.latency "
            "gives each of them one), and the reduction of gradients over dp (plan.costs.step_end)."
        )
    else:
        notes.append(
            "A layer's work is divided by tp, and each of its four sums over tp takes plan.costs.latency; what they move is "
            "not in the figures, nor is the reduction of gradients over dp (plan.costs.step_end)."
        )
    if config.train.compile:
        notes.append("Nor is what train.compile saves.")
    return notes
