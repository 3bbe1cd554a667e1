from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from distill.balance import count_layers, count_work, split_models
from distill.config import Config, ConfigError, Data, Hidden, Loss, MeshShape, Pipeline, Train
from distill.costs import Profile, Split, stage_costs, stage_sums
from parallel.pipeline.partition import Layers
from tests.families import factored_config, tiny_config
from tests.pace import quiet_seconds

CONFIG = Config(
    mesh=MeshShape(pp=2, dp=1, tp=1),
    pipeline=Pipeline(teacher="inline"),
    data=Data(seq_len=8),
    train=Train(global_batch_size=8, microbatch_size=1),
)
TEACHER = tiny_config("qwen3", num_hidden_layers=8)
STUDENT = tiny_config("llama", num_hidden_layers=6)


def changed(pp: int = 2, loss: float = 0.3, rows: int = 8, **pipeline: Any) -> Config:
    return replace(
        CONFIG,
        mesh=MeshShape(pp=pp, dp=1, tp=1),
        loss=Loss(alpha=loss),
        train=replace(CONFIG.train, global_batch_size=rows),
        pipeline=replace(CONFIG.pipeline, **pipeline),
    )


def counts(split: Split) -> tuple[list[int], list[int]]:
    for ranges in (split.student, split.teacher):
        assert [index for part in ranges for index in part] == list(range(ranges[-1].stop))
    return [len(part) for part in split.student], [len(part) for part in split.teacher]


def alike(student: int, teacher: int, *, forward: float = 1.0, k: float = 1.0, heads: float = 0.0) -> Profile:
    """A model whose layers take F = B = W."""
    layers = Layers([forward] * student)
    return Profile(
        layers,
        Layers([forward] * student, last_s=heads),
        layers,
        Layers([k] * teacher),
        Layers([0.0] * student),
    )


def test_the_count_is_that_of_the_formulas() -> None:
    work = count_work(CONFIG, TEACHER, STUDENT)
    attention, ffn, norms, biases = (
        32 * 64 * 2 + 32 * 32 * 2,
        3 * 32 * 48,
        2 * 32,
        64 + 2 * 32 + 32 + 2 * 48 + 32,
    )
    parameters, scores = attention + ffn + norms + biases, 2 * 8 * 64
    assert work.forward == Layers([parameters + scores] * 6)
    assert work.backward_weight == Layers([parameters] * 6)
    assert work.backward_input == Layers([parameters + 2 * scores] * 6, last_s=4 * 97 * 32)
    assert len(work.teacher.layer_s) == 8
    full = count_work(replace(CONFIG, train=replace(CONFIG.train, recompute="full")), TEACHER, STUDENT)
    assert full.backward_input.layer_s == [2 * parameters + 3 * scores] * 6
    assert count_work(changed(loss=1.0), TEACHER, STUDENT).backward_input.last_s == 3 * 97 * 32
    compared = replace(CONFIG, loss=Loss(hidden=Hidden(weight=1.0, layers=((4, 0),))))
    with_projection = count_work(compared, tiny_config("qwen3", num_hidden_layers=8, hidden_size=48), STUDENT)
    for part, times in (("forward", 0), ("backward_input", 2), ("backward_weight", 1)):
        added = zip(getattr(with_projection, part).layer_s, getattr(work, part).layer_s, strict=True)
        assert [more - less for more, less in added] == [0, 0, 0, 0, times * 32 * 48, 0]


def test_heads_and_loss_weigh_on_the_last_stage() -> None:
    def busy(vocab_size: int) -> list[float]:
        models = (tiny_config("qwen3", num_hidden_layers=8, vocab_size=vocab_size), STUDENT)
        student, teacher = counts(split_models(CONFIG, *models))
        assert student[1] >= 1 and teacher[1] >= 1
        return [3 * student[rank] + teacher[rank] for rank in range(2)]

    assert busy(97)[1] > busy(5000)[1]


def test_no_other_split_has_a_shorter_step() -> None:
    """A measured profile decides. With two micro-batches the way in which the teacher runs decides as well."""
    profile, found = alike(9, 5, k=2.0, heads=9.0), []
    for teacher in ("inline", "fill"):
        config = changed(teacher=teacher, rows=2, slices=1)
        split = split_models(config, TEACHER, STUDENT, profile=profile)
        best = _step_s(profile, split, fills=teacher == "fill")
        for student, frozen in product(range(1, 9), range(1, 5)):
            other = Split((range(student), range(student, 9)), (range(frozen), range(frozen, 5)))
            assert best <= _step_s(profile, other, fills=teacher == "fill") + 1e-9
        found.append(split)
    assert _step_s(profile, found[0], fills=True) > _step_s(profile, found[1], fills=True)


def _step_s(profile: Profile, split: Split, *, fills: bool, m: int = 2) -> float:
    student, teacher = stage_sums(profile.student, split.student), stage_sums(profile.teacher, split.teacher)
    busiest = max(sum(rank) for rank in zip(student, teacher, strict=True))
    return max(m * busiest, sum(student) + (m - 1) * max(student)) if fills else busiest


def test_lists_of_the_user_win_and_the_rest_evens_them_out() -> None:
    both = split_models(changed(student_layers=(5, 1), teacher_layers=(1, 7)), TEACHER, STUDENT)
    assert counts(both) == ([5, 1], [1, 7])
    profile = alike(6, 8, k=3.0)
    assert counts(split_models(changed(student_layers=(5, 1)), TEACHER, STUDENT, profile=profile)) == (
        [5, 1],
        [2, 6],
    )
    assert counts(split_models(changed(teacher_layers=(6, 2)), TEACHER, STUDENT, profile=profile)) == (
        [1, 5],
        [6, 2],
    )


def test_virtual_stages_are_stages_of_the_student_alone() -> None:
    config = changed(schedule="interleaved", virtual_stages=2, rows=4)
    assert counts(split_models(config, TEACHER, STUDENT, profile=alike(6, 8, heads=4.0)))[0] == [1, 2, 2, 1]
    wanted = changed(schedule="interleaved", virtual_stages=2, student_layers=(3, 1, 1, 1))
    assert counts(split_models(wanted, TEACHER, STUDENT, profile=alike(6, 8))) == ([3, 1, 1, 1], [1, 7])


@pytest.mark.parametrize("layers", [(3, 2), (2, 2, 2), (6,)])
def test_lists_that_do_not_fit_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.student_layers=.* mesh\.pp=2 entries .* 6 layers"):
        split_models(changed(student_layers=layers), TEACHER, STUDENT)
    virtual = changed(student_layers=layers, schedule="interleaved", virtual_stages=2)
    with pytest.raises(ConfigError, match=r"mesh\.pp=2 x pipeline\.virtual_stages=2 = 4 entries"):
        split_models(virtual, TEACHER, STUDENT)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"mesh\.pp=4 x pipeline\.virtual_stages=2: 6 layers of the student"
    ):
        split_models(changed(pp=4, schedule="interleaved", virtual_stages=2), TEACHER, STUDENT)


def test_one_stage_holds_everything() -> None:
    assert split_models(changed(pp=1, teacher="fill"), TEACHER, STUDENT) == Split((range(6),), (range(8),))


def test_a_teacher_that_only_judges_weighs_nothing() -> None:
    split = split_models(changed(loss=1.0, teacher="fill"), TEACHER, STUDENT, profile=alike(6, 8, k=9.0))
    assert counts(split) == ([3, 3], [4, 4]) and split.num_slices == 1


def test_the_number_of_slices() -> None:
    """p = m = 8, a teacher of 4 F: whole, it misses the bound by 9 %; two slices reach it."""
    config, profile = changed(pp=8, teacher="fill"), alike(8, 32)
    assert split_models(config, TEACHER, STUDENT, profile=profile).num_slices == 2
    assert split_models(changed(pp=8), TEACHER, STUDENT, profile=profile).num_slices == 1
    chosen = changed(pp=8, teacher="fill", slices=4)
    assert split_models(chosen, TEACHER, STUDENT, profile=profile).num_slices == 4
    many = changed(pp=8, teacher="fill", slices=5)
    assert split_models(many, TEACHER, STUDENT, profile=profile).num_slices == 4, "no empty ones"
    few = alike(8, 8, k=4.0)
    assert split_models(config, TEACHER, STUDENT, profile=few).num_slices == 1, "no more than layers"


def test_a_long_pipeline_is_split_fast() -> None:
    models = tiny_config("qwen3", num_hidden_layers=40), tiny_config("llama", num_hidden_layers=32)
    config = changed(pp=8, rows=32, teacher="fill")
    profile = count_work(config, *models)
    seconds, split = quiet_seconds(lambda: split_models(config, *models, profile=profile))
    assert seconds < 1.0
    assert len(stage_costs(profile, split).forward) == 8


def test_factored_linears_count_as_their_factors() -> None:
    parameters, _, _ = count_layers(factored_config("llama", {"mlp.up_proj": 8}), seq_len=8)
    # Layers 0 to 2 have up [48, 32] and its bias in factors of rank 8, layer 3 has not.
    assert [parameters[3] - each for each in parameters] == [48 * 32 - 8 * (48 + 32)] * 3 + [0]
