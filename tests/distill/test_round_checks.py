from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, ConfigError
from distill.convert import config_from_dict
from distill.importance import random_scores
from distill.prune import choose, prune_checkpoint
from distill.round_checks import check_later_rounds
from distill.rounds import rounds_of
from distill.shape import resolve_shape
from distill.structure import Sizes
from distill.student_config import Prune
from parallel.mesh import Mesh
from tests.families import save_tiny, tiny_config

SHALLOW = {"student": {"prune": {"num_layers": 2}}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", tiny_config("qwen3"))


@pytest.fixture(scope="module")
def cut(teacher: Path) -> Path:
    """A student of two layers that knows what it was cut out of."""
    config, folder = tiny_config("qwen3"), teacher.parent / "cut"
    kept = choose(
        random_scores(Sizes.of(config), 0), config, resolve_shape(config, Prune(num_layers=2), tp=1)
    )
    prune_checkpoint(teacher, folder, config, kept, provenance={"teacher": str(teacher)})
    return folder


def settings(teacher: Path, *rounds: dict[str, Any], **groups: Any) -> tuple[Config, ...]:
    base = {
        "teacher": {"model": str(teacher)},
        "data": {"seq_len": 32, "cache_dir": str(teacher.parent / "cache")},
        "mesh": {"dp": 1},
        "run": {"dir": str(teacher.parent / "run")},
    }
    return rounds_of(config_from_dict({**base, "rounds": list(rounds), **groups}))


def refused(rounds: tuple[Config, ...], *, after: int = 0) -> str:
    with pytest.raises(ConfigError) as caught:
        check_later_rounds(rounds, Mesh.single(), after=after)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([{}, {"student": {"prune": {"num_layers": 9}}}], "rounds[1]: student.prune.num_layers=9 must be between 1 and the teacher's 4"),
        ([{}, {}, {"data": {"seq_len": 65}}], "rounds[2]: data.seq_len=65 is longer than max_position_embeddings=64"),
        ([{}, {"loss": {"kind": "top_k_kl", "top_k": 97}}], "rounds[1]: loss.top_k=97 must be less than vocab_size=97"),
        ([{}, {"teacher": {"model": "no/such/model/folder"}}], "rounds[1]: teacher.model=no/such/model/folder does not exist"),
        # What an earlier round leaves has the layers that it is planned with.
        ([SHALLOW, {"teacher": {"model": "previous"}, "loss": {"hidden": {"weight": 1, "layers": [[1, 3]]}}}], "rounds[1]: loss.hidden.layers=[[1,3]] names a layer that the teacher does not have"),
        ([{}, {**SHALLOW, "loss": {"hidden": {"weight": 1, "layers": [[3, 3]]}}}], "rounds[1]: loss.hidden.layers=[[3,3]] names a layer that the student does not have"),
        ([{}, {"student": {"low_rank": {"ratio": 0.5, "layers": [4]}}}], "rounds[1]: student.low_rank.layers=[4] names layer 4"),
    ],
)  # fmt: skip
def test_a_later_round_is_refused_before_the_first(rounds: list[Any], words: str, teacher: Path) -> None:
    found = settings(teacher, *rounds)
    assert refused(found).startswith(words)
    # Once its own round is under way, what is found there says it.
    check_later_rounds(found, Mesh.single(), after=len(rounds) - 1)


def test_rounds_that_can_be_done_pass(teacher: Path, cut: Path) -> None:
    whole = {"teacher": {"model": "previous"}, "loss": {"hidden": {"weight": 1, "layers": [[1, 3]]}}}
    check_later_rounds(settings(teacher, {}, whole, SHALLOW), Mesh.single(), after=0)
    ready = {"student": {"model": str(cut)}}
    check_later_rounds(settings(teacher, {}, SHALLOW, **ready), Mesh.single(), after=0)


def test_rounds_that_have_begun_are_not_held_to_another_teacher(teacher: Path) -> None:
    """A run is gone on with in its second round, whose teacher is deeper than the first's."""
    deep = save_tiny(teacher.parent / "deep", tiny_config("qwen3", num_hidden_layers=6))
    second = {"teacher": {"model": str(deep)}, "loss": {"hidden": {"weight": 1, "layers": [[1, 5]]}}}
    for after in (0, 1):
        check_later_rounds(settings(teacher, {}, second, SHALLOW), Mesh.single(), after=after)


def test_no_projection_between_widths_needs_channels_that_the_teacher_has(teacher: Path, cut: Path) -> None:
    narrow = {"student": {"prune": {"hidden_size": 16}}}
    term = {"loss": {"hidden": {"weight": 1, "projection": "none"}}}
    chain = {"teacher": {"model": "previous"}, "student": {"prune": {"hidden_size": 8}}, **term}
    check_later_rounds(settings(teacher, narrow, narrow | term), Mesh.single(), after=0)
    check_later_rounds(settings(teacher, narrow, chain), Mesh.single(), after=0)
    other = save_tiny(teacher.parent / "wide", tiny_config("qwen3", hidden_size=64))
    apart = narrow | term | {"teacher": {"model": str(other)}}
    assert refused(settings(teacher, {}, apart)).startswith(
        "rounds[1]: loss.hidden.projection=none needs one"
    )


def test_a_ready_student_is_cut_only_where_its_units_are_known(teacher: Path, cut: Path) -> None:
    plain = save_tiny(teacher.parent / "plain", tiny_config("qwen3", num_hidden_layers=3))
    for later in (SHALLOW, {"student": {"low_rank": {"ratio": 0.5}}}):
        rounds = settings(teacher, {}, later, student={"model": str(plain)})
        assert refused(rounds).startswith(
            f"rounds[1]: student.model={plain} was not cut out of {teacher}, so"
        )
    factored = settings(teacher, {}, {"student": {"low_rank": {"ratio": 0.5}}}, student={"model": str(cut)})
    assert refused(factored).startswith(
        "rounds[1]: student.low_rank factors what student.prune cuts, but how"
    )
