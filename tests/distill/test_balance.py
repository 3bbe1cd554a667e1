from __future__ import annotations

from dataclasses import replace

import pytest

from distill.balance import split_models
from distill.config import Config, ConfigError, Data, MeshShape, Pipeline, Train
from tests.families import tiny_config

CONFIG = Config(
    mesh=MeshShape(pp=2, dp=1, tp=1),
    data=Data(seq_len=8),
    train=Train(global_batch_size=8, microbatch_size=1),
)
TEACHER = tiny_config("qwen3", num_hidden_layers=8)
STUDENT = tiny_config("llama", num_hidden_layers=6)


def _counts(config: Config, **student: object) -> tuple[list[int], list[int]]:
    split = split_models(config, TEACHER, tiny_config("llama", num_hidden_layers=6, **student))
    for ranges, total in ((split.student, 6), (split.teacher, 8)):
        assert [index for part in ranges for index in part] == list(range(total))
    return [len(part) for part in split.student], [len(part) for part in split.teacher]


def _work(counts: tuple[list[int], list[int]], rank: int) -> int:
    return 3 * counts[0][rank] + counts[1][rank]


def test_heads_and_loss_weigh_on_the_last_stage() -> None:
    small, large = _counts(CONFIG), _counts(CONFIG, vocab_size=5000)
    assert _work(small, 1) > _work(large, 1)
    assert large[0][1] >= 1 and large[1][1] >= 1


def test_lists_of_the_user_win() -> None:
    pipeline = Pipeline(student_layers=(5, 1), teacher_layers=(1, 7))
    assert _counts(replace(CONFIG, pipeline=pipeline)) == ([5, 1], [1, 7])


@pytest.mark.parametrize("layers", [(3, 2), (2, 2, 2), (6,)])
def test_lists_that_do_not_fit_are_refused(layers: tuple[int, ...]) -> None:
    pipeline = Pipeline(student_layers=layers)
    with pytest.raises(ConfigError, match=r"pipeline\.student_layers=.* mesh\.pp=2 entries .* 6 layers"):
        split_models(replace(CONFIG, pipeline=pipeline), TEACHER, STUDENT)


def test_one_stage_holds_everything() -> None:
    assert _counts(replace(CONFIG, mesh=MeshShape(pp=1, dp=1, tp=1))) == ([6], [8])
