"""Which layers are compared, what projections start as, and whether a student's kept units say anything of a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.config import Config, ConfigError, Hidden, Loss
from distill.hidden_map import (
    check_widths,
    first_projection,
    layer_pairs,
    mapped_layers,
    shared_with,
    was_cut,
)
from distill.kept import Kept
from distill.prune import KEPT_FILE, KEPT_FOLDER

KEPT = Kept(
    hidden=torch.tensor([0, 2, 5]),
    ffn={layer: torch.tensor([0]) for layer in (0, 3, 4, 7)},
    groups={layer: torch.tensor([0]) for layer in (0, 3, 4, 7)},
    layers=(0, 3, 4, 7),
)
WIDTHS = {"student_width": 3, "teacher_width": 6}


def test_every_nth_layer_from_the_last_one_down() -> None:
    assert mapped_layers(Hidden(), 10) == [1, 5, 9]
    assert mapped_layers(Hidden(every=1), 3) == [0, 1, 2]
    assert mapped_layers(Hidden(every=9), 3) == [2]
    assert mapped_layers(Hidden(layers=((3, 0), (1, 1))), 9) == [1, 3]


@pytest.mark.parametrize(
    ("hidden", "sizes", "kept", "expected"),
    [
        (Hidden(every=1), (4, 8), None, [(0, 1), (1, 3), (2, 5), (3, 7)]),
        (Hidden(every=2), (4, 5), None, [(1, 1), (3, 4)]),
        (Hidden(every=1), (4, 8), KEPT, [(0, 0), (1, 3), (2, 4), (3, 7)]),
        (Hidden(every=3), (4, 8), KEPT, [(0, 0), (3, 7)]),
        (Hidden(layers=((2, 1), (0, 7))), (4, 8), KEPT, [(0, 7), (2, 1)]),
        # A deep student of a shallow teacher: never above the first layer, the last one at the last.
        (Hidden(every=1), (5, 2), None, [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]),
    ],
)
def test_counterparts(
    hidden: Hidden, sizes: tuple[int, int], kept: Kept | None, expected: list[tuple[int, int]]
) -> None:
    pairs = layer_pairs(
        hidden, student_layers=sizes[0], teacher_layers=sizes[1], shared=None if kept is None else kept.layers
    )
    assert [tuple(pair) for pair in pairs] == expected


def test_a_projection_starts_where_it_is_right() -> None:
    stream = torch.arange(12.0, dtype=torch.float64).view(2, 6)
    cut = first_projection(3, **WIDTHS, channels=KEPT.hidden, seed=0)
    kept_only = stream * torch.tensor([1, 0, 1, 0, 0, 1])
    assert torch.equal(stream[:, KEPT.hidden] @ cut.t(), kept_only), (
        "each channel is where the teacher has it"
    )
    equal = first_projection(3, student_width=6, teacher_width=6, channels=None, seed=0)
    assert torch.equal(equal, torch.eye(6, dtype=torch.float64))
    wide = {"student_width": 64, "teacher_width": 256}
    drawn = [
        first_projection(layer, **wide, channels=None, seed=seed) for layer, seed in ((3, 0), (3, 1), (4, 0))
    ]
    assert torch.equal(drawn[0], first_projection(3, **wide, channels=None, seed=0))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(1 / 8, rel=0.05)


def _cut(folder: Path, kept: Kept, model: str) -> Path:
    (folder / KEPT_FOLDER).mkdir(parents=True)
    kept.save(folder / KEPT_FOLDER / KEPT_FILE, {"teacher": model})
    return folder


def _kept(layers: tuple[int, ...], hidden: list[int]) -> Kept:
    ffn, groups = ({layer: torch.tensor([0]) for layer in layers} for _ in range(2))
    return Kept(torch.tensor(hidden), ffn, groups, layers)


def test_the_teacher_has_what_the_student_was_cut_from(tmp_path: Path) -> None:
    teacher, plain = tmp_path / "teacher", tmp_path / "plain"
    student = _cut(tmp_path / "student", KEPT, "big")
    assert was_cut(student, "big") and not was_cut(student, "other") and not was_cut(plain, "big")
    layers, channels = shared_with(student, teacher, "big")
    assert layers == KEPT.layers and channels.tolist() == KEPT.hidden.tolist()
    assert shared_with(student, teacher, "other") == (None, None)
    assert shared_with(plain, teacher, "big") == (None, None)


def test_a_model_may_be_named_by_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "big").mkdir(parents=True)
    student = _cut(tmp_path / "student", KEPT, "models/big")
    assert not was_cut(student, str(tmp_path / "models" / "big")), "there is no such place from here"
    monkeypatch.chdir(tmp_path)
    assert was_cut(student, str(tmp_path / "models" / "big"))
    assert shared_with(student, tmp_path, f"{tmp_path}/models/../models/big").layers == KEPT.layers
    assert not was_cut(student, "models")


def test_an_assistant_has_what_it_kept_too(tmp_path: Path) -> None:
    """Both count the units of the model that they were cut out of, not each other's."""
    student = _cut(tmp_path / "student", KEPT, "big")
    corrected = _cut(tmp_path / "corrected", _kept(tuple(range(8)), list(range(6))), "big")
    layers, channels = shared_with(student, corrected, str(corrected))
    assert layers == KEPT.layers and channels.tolist() == [0, 2, 5]
    assistant = _cut(tmp_path / "assistant", _kept((0, 2, 3, 4, 7), [0, 1, 2, 4, 5]), "big")
    layers, channels = shared_with(student, assistant, str(assistant))
    assert layers == (0, 2, 3, 4) and channels.tolist() == [0, 2, 4]
    # A student that grows beyond its assistant, in depth or in width.
    shallow = _cut(tmp_path / "shallow", _kept((0, 3, 4), [0, 2, 5]), "big")
    layers, channels = shared_with(student, shallow, str(shallow))
    assert layers is None and channels.tolist() == [0, 1, 2]
    narrow = _cut(tmp_path / "narrow", _kept((0, 3, 4, 7), [0, 2]), "big")
    assert shared_with(student, narrow, str(narrow)) == ((0, 1, 2, 3), None)
    foreign = _cut(tmp_path / "foreign", KEPT, "another")
    assert shared_with(student, foreign, str(foreign)) == (None, None)


def test_no_projection_needs_channels_to_compare() -> None:
    config = Config(loss=Loss(hidden=Hidden(weight=1.0, projection="none")))
    with pytest.raises(ConfigError) as caught:
        check_widths(config, **WIDTHS, shares_channels=False)
    assert str(caught.value) == (
        "loss.hidden.projection=none needs one hidden_size, but the student has 3, the teacher 6, which does not have "
        "the channels that the student kept; use learned"
    )
    check_widths(config, **WIDTHS, shares_channels=True)
    check_widths(config, student_width=6, teacher_width=6, shares_channels=False)
    for hidden in (Hidden(projection="none"), Hidden(weight=1.0)):
        check_widths(replace(config, loss=Loss(hidden=hidden)), **WIDTHS, shares_channels=False)
