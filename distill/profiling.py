"""What the parts of both models cost on this device, measured on random weights in a few seconds.

Decides what is measured: single layers, the embeddings, both heads with the loss as a step calls them, and the optimizer,
at the run's micro-batch shape, dtype and recomputation, without tensor parallelism and without torch.compile. Layers are
taken to cost what they count (`balance.count_work`): of models whose layers differ the cheapest, the middle one and the
dearest are measured, and each other layer is scaled from the one that is nearest. One process, no torch.distributed; on
a CPU with as many threads as this process has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.annealing import extremes
from distill.balance import count_work
from distill.config import Config
from distill.costs import Profile
from distill.divergences import divergence_of
from distill.loading import DTYPES
from distill.losses import fused_distillation_loss
from distill.step import head_of
from parallel.gradients import grad_target, main_dtype
from parallel.mesh import Axis
from parallel.model import StageModel, build_stage
from parallel.pipeline.partition import Layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FEWEST, _MOST, _BUDGET_S = 3, 15, 0.5
"""Repetitions of a measurement: the fewest, and the most within a time."""
_LEAST_S = 1e-9
_STEPPED_NUMEL = 1 << 22

Work = Callable[[], object]


def measure(
    config: Config,
    teacher_config: PretrainedConfig,
    student_config: PretrainedConfig,
    *,
    device: torch.device | str = "cpu",
) -> Profile:
    """Return the seconds of the parts of both models for one micro-batch, each a median.

    Raises:
        UnsupportedModel: a family that cannot be cut into stages.
    """
    bench = _Bench(config, torch.device(device))
    counted = count_work(config, teacher_config, student_config)
    first = bench.stage(student_config, rank=0, trainable=True)
    embedding_s, call_s = bench.embedding(first)
    embedding_backward_s = bench.embedding_backward(first)
    del first
    forward, backward_input, backward_weight = bench.student_layers(
        student_config, counted.forward.layer_s, call_s
    )
    heads_s = bench.heads_and_loss(student_config, teacher_config)
    teacher_first = bench.stage(teacher_config, rank=0, trainable=False)
    teacher_embedding_s, teacher_call_s = bench.embedding(teacher_first)
    teacher = bench.teacher_layers(teacher_config, counted.teacher.layer_s, teacher_call_s)
    step_s = bench.optimizer_s_per_parameter()
    # The weights of a layer are what it counts for in its weight gradient.
    vocabulary = student_config.vocab_size * student_config.hidden_size
    return Profile(
        forward=Layers(forward, first_s=embedding_s),
        backward_input=Layers(backward_input, last_s=heads_s),
        backward_weight=Layers(backward_weight, first_s=embedding_backward_s),
        teacher=Layers(teacher, first_s=teacher_embedding_s),
        step=Layers(
            [step_s * each for each in counted.backward_weight.layer_s],
            first_s=step_s * vocabulary,
            last_s=step_s * vocabulary,
        ),
        call_s=max(call_s, teacher_call_s),
    )


class _Bench:
    """The shapes of a run on a device."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device, self._dtype = config, device, DTYPES[config.train.dtype]
        self._shape_BS = (config.train.microbatch_size, config.data.seq_len)
        self._position_ids_BS = torch.arange(config.data.seq_len, device=device).expand(self._shape_BS)

    def stage(
        self, model_config: PretrainedConfig, *, rank: int, trainable: bool, layer: int | None = None
    ) -> StageModel:
        """Return the first, a middle or the last of three stages, with one layer or none, and weights like fresh ones."""
        stage = build_stage(
            model_config,
            pp=Axis("stage", size=3, rank=rank),
            tp=Axis("tp"),
            owned=range(0) if layer is None else range(layer, layer + 1),
            device=self._device,
            dtype=self._dtype,
            trainable=trainable,
            recompute=self._config.train.recompute,
        )
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            if trainable:
                # As in training, where gradients are summed in float32 at least.
                parameter.main_grad = torch.zeros_like(parameter, dtype=main_dtype(self._dtype))
        return stage

    def embedding(self, stage: StageModel) -> tuple[float, float]:
        """Return the seconds of the embedding, and of calling a stage that has nothing else to do."""
        ids_BS = torch.randint(stage.config.vocab_size, self._shape_BS, device=self._device)
        hidden_BSD = self._hidden(stage)
        with torch.no_grad():
            whole_s, call_s = self._medians_s(
                partial(stage, ids_BS, self._position_ids_BS),
                partial(stage, hidden_BSD, self._position_ids_BS),
            )
        return max(_LEAST_S, whole_s - call_s), call_s

    def embedding_backward(self, stage: StageModel) -> float:
        """Return the seconds of the embedding's gradient."""
        ids_BS = torch.randint(stage.config.vocab_size, self._shape_BS, device=self._device)
        run = _TrainRun(stage, ids_BS, self._position_ids_BS)
        _, backward_s, weight_s = self._medians_s(run.forward, run.backward_input, run.backward_weight)
        return backward_s + weight_s

    def student_layers(
        self, model_config: PretrainedConfig, counted: Sequence[float], call_s: float
    ) -> tuple[list[float], ...]:
        """Return the seconds of each layer's forward, and of its backward for the input and for the weights."""
        measured = {}
        for layer in samples(counted):
            stage = self.stage(model_config, rank=1, trainable=True, layer=layer)
            x_BSD = self._hidden(stage).requires_grad_()
            run = _TrainRun(stage, x_BSD, self._position_ids_BS)
            forward_s, *rest = self._medians_s(run.forward, run.backward_input, run.backward_weight)
            measured[layer] = (max(_LEAST_S, forward_s - call_s), *rest)
        return tuple(
            scaled({layer: seconds[part] for layer, seconds in measured.items()}, counted)
            for part in range(3)
        )

    def teacher_layers(
        self, model_config: PretrainedConfig, counted: Sequence[float], call_s: float
    ) -> list[float]:
        """Return the seconds of each layer's forward."""
        measured = {}
        for layer in samples(counted):
            stage = self.stage(model_config, rank=1, trainable=False, layer=layer)
            with torch.no_grad():
                (forward_s,) = self._medians_s(partial(stage, self._hidden(stage), self._position_ids_BS))
            measured[layer] = max(_LEAST_S, forward_s - call_s)
        return scaled(measured, counted)

    def heads_and_loss(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> float:
        """Return the seconds of both heads and the loss with its gradients, every token valid."""
        # Of a step that computes all there is: with the teacher, and tempered.
        loss = self._config.loss
        temperature, alpha = max(extremes(loss.temperature)), min(extremes(loss.alpha))
        student = self.stage(student_config, rank=2, trainable=True)
        student_hidden_TD = self._hidden(student).flatten(0, 1)
        teacher_head, teacher_hidden_TE = None, None
        if self._config.needs_teacher:
            teacher = self.stage(teacher_config, rank=2, trainable=False)
            teacher_head, teacher_hidden_TE = head_of(teacher), self._hidden(teacher).flatten(0, 1)
        num_tokens = len(student_hidden_TD)
        labels_T = torch.randint(student.config.vocab_size, (num_tokens,), device=self._device)
        bias = student.head.bias
        (seconds,) = self._medians_s(
            lambda: fused_distillation_loss(
                student_hidden_TD,
                head_of(student),
                teacher_hidden_TE,
                teacher_head,
                labels_T,
                divergence=divergence_of(loss),
                temperature=temperature,
                alpha=alpha,
                num_valid_tokens=num_tokens,
                grad_weight_out_VD=grad_target(student.head.weight),
                grad_bias_out_V=None if bias is None else grad_target(bias),
            )
        )
        return seconds

    def optimizer_s_per_parameter(self) -> float:
        """Return the seconds of AdamW for each of many parameters."""
        run = torch.nn.Parameter(
            torch.zeros(_STEPPED_NUMEL, dtype=main_dtype(self._dtype), device=self._device)
        )
        run.grad = torch.ones_like(run)
        adam = torch.optim.AdamW([run], fused=True)
        (seconds,) = self._medians_s(adam.step)
        return seconds / _STEPPED_NUMEL

    def _hidden(self, stage: StageModel) -> Tensor:
        shape = (*self._shape_BS, stage.config.hidden_size)
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def _medians_s(self, *works: Work) -> list[float]:
        """Run the works one after another, again and again; return the median seconds of each."""
        self._laps_s(works)
        laps: list[list[float]] = []
        start_s = time.perf_counter()
        while len(laps) < _FEWEST or (len(laps) < _MOST and time.perf_counter() - start_s < _BUDGET_S):
            laps.append(self._laps_s(works))
        return [statistics.median(each) for each in zip(*laps, strict=True)]

    def _laps_s(self, works: Sequence[Work]) -> list[float]:
        if self._device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
            marks[0].record()
            for work, mark in zip(works, marks[1:], strict=True):
                work()
                mark.record()
            marks[-1].synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
        times_s = [time.perf_counter()]
        for work in works:
            work()
            times_s.append(time.perf_counter())
        return [after - before for before, after in pairwise(times_s)]


class _TrainRun:
    """A trainable stage's forward and the two parts of its backward, on the same input each time."""

    def __init__(self, stage: StageModel, x: Tensor, position_ids_BS: Tensor) -> None:
        self._stage, self._x, self._position_ids_BS = stage, x, position_ids_BS
        self._weight_work: list[Callable[[], None]] = []

    def forward(self) -> None:
        self._output = self._stage(self._x, self._position_ids_BS)
        self._grad = torch.ones_like(self._output)

    def backward_input(self) -> None:
        with self._stage.weight_gradients.hold() as self._weight_work:
            torch.autograd.backward(self._output, self._grad)
        self._x.grad = None

    @torch.no_grad()
    def backward_weight(self) -> None:
        for work in self._weight_work:
            work()


def samples(counted: Sequence[float]) -> list[int]:
    """Return the layers to measure: the first one of the least, the middle and the largest count that occur."""
    counts = sorted(set(counted))
    chosen = {counts[0], counts[len(counts) // 2], counts[-1]}
    return [counted.index(count) for count in sorted(chosen)]


def scaled(measured: dict[int, float], counted: Sequence[float]) -> list[float]:
    """Return the seconds of every layer: those of the measured layer with the nearest count, in proportion.

    Args:
        measured: seconds of some layers, by index.
        counted: multiply-adds of all layers.
    """

    def seconds(count: float) -> float:
        layer = min(measured, key=lambda each: abs(counted[each] - count))
        return measured[layer] * count / counted[layer]

    return [seconds(count) for count in counted]
